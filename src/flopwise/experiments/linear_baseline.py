"""What linear attention is measured against: the same model with softmax attention, decoded with a key-value cache.

As fast as it goes (`CacheDecoder`), and as one writes it with torch's modules (`ModuleDecoder`).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from flopwise.models import LinearCausalLM
from flopwise.models.decoding import pack, pieces

EPS = 1e-5


class SoftmaxCausalLM(LinearCausalLM):
    """`LinearCausalLM`, recipe "thesis", with torch's softmax attention in every block and the same initial weights.

    It has no state: `model(ids)` is what it can do; `CacheDecoder` and `ModuleDecoder` decode it.
    """

    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int, ff: int, **options: Any) -> None:
        super().__init__(vocab_size, dim, depth, heads, ff, **options)
        for block in self.blocks:
            linear: Any = block.attention
            block.attention = SoftmaxAttention(heads, linear.project, linear.out)


class LayerCache(NamedTuple):
    """Preallocated memory for the keys and values of a layer, of which `filled` positions are taken."""

    keys: Float[Tensor, "b h length e"]
    values: Float[Tensor, "b h length e"]
    filled: int


class SoftmaxAttention(nn.Module):
    """Causal softmax attention; takes and returns what `LinearCausalLM`'s blocks expect.

    With a cache as the state, `x` is one token, whose key and value are written into it.
    """

    def __init__(self, heads: int, project: nn.Linear, out: nn.Linear) -> None:
        super().__init__()
        self.heads, self.project, self.out = heads, project, out

    def forward(self, x: Float[Tensor, "b n dim"], key_mask: None, state: LayerCache | None) -> tuple[Tensor, None]:
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if state is not None:
            keys, values, t = state
            keys[:, :, t : t + 1], values[:, :, t : t + 1] = key, value
            key, value = keys[:, :, : t + 1], values[:, :, : t + 1]
        y = scaled_dot_product_attention(query, key, value, is_causal=state is None)
        return self.out(y.transpose(1, 2).flatten(2)), None


class ModuleDecoder:
    """Decodes `SoftmaxCausalLM` with keys and values in preallocated memory, by calling its own modules one by one.

    Args:
        length: tokens for which the cache has room.
    """

    def __init__(self, model: SoftmaxCausalLM, batch: int, length: int) -> None:
        self.model, self.position = model, 0  # tokens seen
        self.keys, self.values = _empty_cache(model, batch, length)
        self.table = model.positions(torch.arange(length))

    def step(self, ids: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        """Take up one token for each sequence and return the logits of the one that comes next."""
        model, t = self.model, self.position
        x = model.embedding(ids[:, None])
        if self.table is not None:
            x = x + self.table[t]
        blocks: list[Any] = list(model.blocks)
        for block, keys, values in zip(blocks, self.keys, self.values, strict=True):
            x = x + block.attention(block.attention_norm(x), None, LayerCache(keys, values, t))[0]
            x = x + block.down(block.up(block.ff_norm(x)).relu())
        self.position += 1
        return model.head(model.norm(x[:, 0]))


class CacheDecoder:
    """Decodes `SoftmaxCausalLM` with keys and values in preallocated memory: as fast as torch's own operations go.

    One fused projection, the norms' factors folded into the matrices and these read as `Decoder` reads them, SDPA over
    the part of the cache that is filled. Use it in inference mode.

    Args:
        length: tokens for which the cache has room.
    """

    def __init__(self, model: SoftmaxCausalLM, batch: int, length: int) -> None:
        self.packed = packed = pack(model, "float32")
        self.keys, self.values = _empty_cache(model, batch, length)
        self.table = model.positions(torch.arange(length))
        self.position = 0  # tokens seen
        matrices = (packed.project, packed.up, packed.head)
        self._projected, self._hidden, self._logits = (torch.empty(batch, matrix.rows) for matrix in matrices)
        self._pieces = list(map(pieces, (self._projected, self._hidden, self._logits)))

    def step(self, ids: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        """Take up one token for each sequence and return the logits of the one that comes next."""
        packed, t = self.packed, self.position
        (batch, dim), heads = (len(ids), packed.embedding.shape[1]), self.keys.shape[2]
        qkv, hidden = self._projected.view(batch, 3, heads, 1, -1), self._hidden
        into_projected, into_hidden, into_logits = self._pieces
        x = packed.embedding[ids]
        if self.table is not None:
            x += self.table[t]
        into_x = pieces(x)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            packed.project.multiply(layer, layer_norm(x, (dim,), eps=EPS), into_projected)
            keys[:, :, t : t + 1], values[:, :, t : t + 1] = qkv[:, 1], qkv[:, 2]
            y = scaled_dot_product_attention(qkv[:, 0], keys[:, :, : t + 1], values[:, :, : t + 1])
            packed.out.multiply(layer, y.view(batch, dim), into_x, add=True)
            packed.up.multiply(layer, layer_norm(x, (dim,), eps=EPS), into_hidden)
            packed.down.multiply(layer, hidden.relu_(), into_x, add=True)
        self.position += 1
        packed.head.multiply(0, layer_norm(x, (dim,), eps=EPS), into_logits)
        return self._logits.clone()


def _empty_cache(model: SoftmaxCausalLM, batch: int, length: int) -> Float[Tensor, "2 layers b h length e"]:
    width = model.config["dim"] // model.heads
    return torch.zeros(2, len(model.blocks), batch, model.heads, length, width)
