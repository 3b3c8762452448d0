"""What linear attention is measured against: the same model with softmax attention, decoded with a key-value cache."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from flopwise.models import LinearCausalLM
from flopwise.models.decoding import pack

EPS = 1e-5


class SoftmaxCausalLM(LinearCausalLM):
    """`LinearCausalLM`, recipe "thesis", with torch's softmax attention in every block and the same initial weights.

    It has no state: `model(ids)` is what it can do, and `CacheDecoder` decodes it.
    """

    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int, ff: int, **options: Any) -> None:
        super().__init__(vocab_size, dim, depth, heads, ff, **options)
        for block in self.blocks:
            linear: Any = block.attention
            block.attention = SoftmaxAttention(heads, linear.project, linear.out)


class SoftmaxAttention(nn.Module):
    """Causal softmax attention; takes and returns what `LinearCausalLM`'s blocks expect, without a state."""

    def __init__(self, heads: int, project: nn.Linear, out: nn.Linear) -> None:
        super().__init__()
        self.heads, self.project, self.out = heads, project, out

    def forward(self, x: Float[Tensor, "b n dim"], key_mask: None, state: None) -> tuple[Tensor, None]:
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)), None


class CacheDecoder:
    """Decodes `SoftmaxCausalLM` with keys and values in preallocated memory: as fast as torch's own operations go.

    One fused projection, the norms' factors folded into the matrices as in `Decoder`, SDPA over the part of the cache
    that is filled. Use it in inference mode.

    Args:
        length: tokens for which the cache has room.
    """

    def __init__(self, model: SoftmaxCausalLM, batch: int, length: int) -> None:
        self.packed = pack(model, "float32")
        depth, heads, width = len(model.blocks), model.heads, self.packed.embedding.shape[1] // model.heads
        self.keys, self.values = torch.zeros(2, depth, batch, heads, length, width).unbind(0)
        self.table = model.positions(torch.arange(length))
        self.position = 0  # tokens seen
        matrices = (self.packed.project, self.packed.out, self.packed.up, self.packed.down)
        self._layers = [
            (self.keys[layer], self.values[layer], *((m.bias[layer], m.values[layer].T) for m in matrices))
            for layer in range(depth)
        ]

    def step(self, ids: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        """Take up one token for each sequence and return the logits of the one that comes next."""
        packed, t = self.packed, self.position
        (batch, dim), heads = (len(ids), packed.embedding.shape[1]), self.keys.shape[2]
        x = packed.embedding[ids]
        if self.table is not None:
            x = x + self.table[t]
        for keys, values, project, out, up, down in self._layers:
            qkv = torch.addmm(project[0], layer_norm(x, (dim,), eps=EPS), project[1]).view(batch, 3, heads, 1, -1)
            keys[:, :, t : t + 1], values[:, :, t : t + 1] = qkv[:, 1], qkv[:, 2]
            y = scaled_dot_product_attention(qkv[:, 0], keys[:, :, : t + 1], values[:, :, : t + 1])
            x = x + torch.addmm(out[0], y.view(batch, dim), out[1])
            hidden = torch.addmm(up[0], layer_norm(x, (dim,), eps=EPS), up[1]).relu_()
            x = x + torch.addmm(down[0], hidden, down[1])
        self.position += 1
        head = packed.head
        return torch.addmm(head.bias[0], layer_norm(x, (dim,), eps=EPS), head.values[0].T)
