"""Linear attention as a module."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flopwise.linear_attention.feature_maps import FeatureMap, feature_width
from flopwise.linear_attention.functional import Backend, linear_attention
from flopwise.linear_attention.recurrent import LinearState, init_state, step


class LinearAttention(nn.Module):
    """Multi-head linear attention, in parallel over all positions or one `step` at a time; see `linear_attention`.

    Args:
        width: of the input and output.
        heads: query heads; `width` is a multiple of them.
        causal: position i sees positions j <= i.
        feature_map: a name, a function, or a module: `Hedgehog` is trained with the rest, and random maps save their
            draw with it.
        key_heads: fewer heads for keys and values (grouped queries); as many as `heads` by default.
        bias: of the four projections.
        backend: as in `linear_attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = False,
        feature_map: FeatureMap = "elu",
        key_heads: int | None = None,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is a multiple of heads; got {width} and {heads}.")
        self.head_width, self.key_heads = width // heads, key_heads or heads
        self.causal = causal
        self.feature_map: FeatureMap = feature_map
        self.backend: Backend = backend
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, self.key_heads * self.head_width, bias=bias)
        self.value = nn.Linear(width, self.key_heads * self.head_width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n width"],
        context: Float[Tensor, "b s width"] | None = None,
        *,
        key_mask: Bool[Tensor, "b s"] | None = None,
        cu_seqlens: Int[Tensor, " c1"] | None = None,
    ) -> Float[Tensor, "b n width"]:
        """Attention of `x` to `context`, or to itself."""
        return self._attend(x, x if context is None else context, key_mask=key_mask, cu_seqlens=cu_seqlens)[0]

    def prefill(
        self,
        x: Float[Tensor, "b n width"],
        state: LinearState | None = None,
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[LinearState, Float[Tensor, "b n width"]]:
        """All of `x` in one pass, from `state` on, and the state after it."""
        out, state = self._attend(x, x, key_mask=key_mask, state=state)
        return state, out

    def step(self, state: LinearState, x: Float[Tensor, "b width"]) -> tuple[LinearState, Float[Tensor, "b width"]]:
        """One position after those in `state`, which is left as it was."""
        query, key, value = (f(x).unflatten(-1, (-1, self.head_width)) for f in (self.query, self.key, self.value))
        state, out = step(state, query, key, value, feature_map=self.feature_map)
        return state, self.out(out.flatten(1))

    def init_state(self, batch: int) -> LinearState:
        """The state before the first position."""
        weight = self.key.weight
        features = feature_width(self.feature_map, self.head_width)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return init_state(batch, self.key_heads, features, self.head_width, dtype, weight.device)

    def _attend(
        self,
        x: Float[Tensor, "b n width"],
        context: Float[Tensor, "b s width"],
        *,
        key_mask: Bool[Tensor, "b s"] | None = None,
        cu_seqlens: Int[Tensor, " c1"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Tensor, "b n width"], LinearState]:
        out, state = linear_attention(
            self._heads(self.query(x)),
            self._heads(self.key(context)),
            self._heads(self.value(context)),
            causal=self.causal,
            feature_map=self.feature_map,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=True,
            backend=self.backend,
        )
        return self.out(out.transpose(1, 2).flatten(2)), state

    def _heads(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b h n e"]:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def extra_repr(self) -> str:
        name = self.feature_map if isinstance(self.feature_map, str) else type(self.feature_map).__name__
        return f"causal={self.causal}, feature_map={name!r}, backend={self.backend!r}"
