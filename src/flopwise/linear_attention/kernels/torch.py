"""Linear attention in torch operations: every device, and differentiable as often as one likes.

The sequence is worked on in chunks whose temporaries stay in the cache: within a chunk the masked product of queries
and keys, across chunks the carried state. Values get a last column of ones here, v' = [v, 1], so that the normaliser
is one more column of the memory, S' = [S, z], and numerator and denominator are one product.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from flopwise.linear_attention.feature_maps import elu

CHUNK = 64  # positions


class Result(NamedTuple):
    """The output; what each position was divided by, 0 where nothing was attended to; and the last state, S and z."""

    out: Float[Tensor, "b h n m"]
    denominator: Float[Tensor, "b h n"]
    memory: Float[Tensor, "c g f m"]
    normaliser: Float[Tensor, "c g f"]


class Gradients(NamedTuple):
    """Of query, key and value, and of the first state."""

    query: Float[Tensor, "b h n e"]
    key: Float[Tensor, "b g s e"]
    value: Float[Tensor, "b g s m"]
    memory: Float[Tensor, "c g f m"]
    normaliser: Float[Tensor, "c g f"]


def forward(
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b g s e"],
    value: Float[Tensor, "b g s m"],
    memory: Float[Tensor, "c g f m"],
    normaliser: Float[Tensor, "c g f"],
    decay: Float[Tensor, "b g"] | None,
    cu_seqlens: Int[Tensor, " c1"] | None,
    *,
    causal: bool,
    use_elu: bool,
) -> Result:
    """Linear attention from the state (memory, normaliser) on; phi is elu + 1 or, without `use_elu`, the identity.

    If it is causal, s = n. With `cu_seqlens`, b = 1 and sequence c is at positions cu_seqlens[c] : cu_seqlens[c + 1];
    without, c = b.
    """
    if cu_seqlens is not None:
        parts = [
            forward(q, k, v, s, z, decay, None, causal=causal, use_elu=use_elu)
            for (q, k, v), (s, z) in _sequences(cu_seqlens, (query, key, value), (memory, normaliser))
        ]
        return Result(*(torch.cat(x, 2 if i < 2 else 0) for i, x in enumerate(zip(*parts, strict=True))))

    state = _joined(memory, normaliser)
    weights = _Weights(decay, state)
    outs = [query.new_empty(*query.shape[:2], 0, value.shape[3])]
    denominators = [state.new_empty(*query.shape[:2], 0)]
    if not causal:
        for at in _chunks(key):
            state = state + _features(key, at, use_elu).mT @ _with_one(value, at)
    for at in _chunks(query):
        q = _by_key_head(_features(query, at, use_elu), key)
        product = q @ state
        if causal:
            k, v = _features(key, at, use_elu), _with_one(value, at)
            product = weights.from_start(product, k) + weights.within(q @ k.mT) @ v
            state = weights.whole(state, k) + weights.to_end(k).mT @ v
        product = _by_query_head(product, query)
        d = product[..., -1:]
        y = torch.where(d == 0, 0.0, product[..., :-1] / torch.where(d == 0, 1.0, d))
        outs.append(y.to(query.dtype))
        denominators.append(d.squeeze(-1))
    return Result(torch.cat(outs, 2), torch.cat(denominators, 2), *_apart(state))


def backward(
    grad_out: Float[Tensor, "b h n m"],
    grad_memory: Float[Tensor, "c g f m"],
    grad_normaliser: Float[Tensor, "c g f"],
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b g s e"],
    value: Float[Tensor, "b g s m"],
    memory: Float[Tensor, "c g f m"],
    normaliser: Float[Tensor, "c g f"],
    decay: Float[Tensor, "b g"] | None,
    cu_seqlens: Int[Tensor, " c1"] | None,
    result: Result,
    *,
    causal: bool,
    use_elu: bool,
) -> Gradients:
    """The gradients of `forward`, to which the denominator is no output.

    With g' = [g, -(g . y)] / d, the gradient of numerator and denominator, and R'_j = sum_(i >= j) phi(q_i) g'_i^T, the
    same recurrence backwards in time that begins with the gradient of the last state:

        d phi(q_i) = S'_i g'_i        d phi(k_j) = R'_j v'_j        d v'_j = R'_j^T phi(k_j)
    """
    if cu_seqlens is not None:
        along = (grad_out, query, key, value, result.out, result.denominator)
        states = (grad_memory, grad_normaliser, memory, normaliser, result.memory, result.normaliser)
        parts = [
            backward(g, gs, gz, q, k, v, s, z, decay, None, Result(y, d, *last), causal=causal, use_elu=use_elu)
            for (g, q, k, v, y, d), (gs, gz, s, z, *last) in _sequences(cu_seqlens, along, states)
        ]
        return Gradients(*(torch.cat(x, 2 if i < 3 else 0) for i, x in enumerate(zip(*parts, strict=True))))

    state = _joined(memory, normaliser) if causal else _joined(result.memory, result.normaliser)
    reverse = _joined(grad_memory, grad_normaliser)  # R'
    weights = _Weights(decay, state)
    grad_query, grad_key, grad_value = [query[:, :, :0]], [key[:, :, :0]], [value[:, :, :0]]
    for at in _chunks(query):
        g = _by_key_head(_grad_product(grad_out, result, at), key)
        grad = g @ state.mT
        if causal:
            k, v = _features(key, at, use_elu), _with_one(value, at)
            grad = weights.from_start(grad, k) + weights.within(g @ v.mT) @ k
            state = weights.whole(state, k) + weights.to_end(k).mT @ v
        else:
            reverse = reverse + _by_key_head(_features(query, at, use_elu), key).mT @ g
        grad_query.append(_through_features(_by_query_head(grad, query), query, at, use_elu))
    for at in reversed(_chunks(key)):
        k, v = _features(key, at, use_elu), _with_one(value, at)
        grad_k, grad_v = v @ reverse.mT, k @ reverse
        if causal:
            q = _by_key_head(_features(query, at, use_elu), key)
            g = _by_key_head(_grad_product(grad_out, result, at), key)
            grad_k = weights.to_end(grad_k) + weights.within(g @ v.mT).mT @ q
            grad_v = weights.to_end(grad_v) + weights.within(q @ k.mT).mT @ g
            reverse = weights.whole(reverse, k) + weights.from_start(q, k).mT @ g
        grad_key.append(_through_features(grad_k, key, at, use_elu))
        grad_value.append(grad_v[..., :-1].to(value.dtype))
    grad_query, grad_key, grad_value = (torch.cat(x, 2) for x in (grad_query, grad_key[::-1], grad_value[::-1]))
    return Gradients(grad_query, grad_key, grad_value, *_apart(reverse))


class _Weights:
    """Powers of the decay within a chunk of n positions. Without one they are 1, and only what is to come gets 0.

    Rows (r n) are the positions of the r query heads that read one key head, head after head.
    """

    def __init__(self, decay: Float[Tensor, "b g"] | None, state: Float[Tensor, "b g f m1"]) -> None:
        i = torch.arange(CHUNK, device=state.device)
        self.past = (i[:, None] >= i).to(state.dtype)
        self.rate = None if decay is None else decay.to(state.dtype)[..., None, None]
        if self.rate is not None:
            self.past = self.past * self.rate ** (i[:, None] - i).clamp(min=0)
            self.powers = self.rate ** torch.arange(CHUNK + 1, device=state.device)[:, None]

    def within(self, product: Float[Tensor, "b g rn n"]) -> Float[Tensor, "b g rn n"]:
        """Times decay^(i - j) for j <= i, and 0 for later j."""
        n = product.shape[-1]
        past = self.past[..., :n, :n] if self.rate is None else self.past[:, :, None, :n, :n]
        return (product.unflatten(2, (-1, n)) * past).flatten(2, 3)

    def from_start(self, x: Float[Tensor, "b g rn _"], chunk: Float[Tensor, "b g n f"]) -> Float[Tensor, "b g rn _"]:
        """Times decay^(i + 1): what is left at position i of the state before the chunk."""
        if self.rate is None:
            return x
        n = chunk.shape[2]
        return (x.unflatten(2, (-1, n)) * self.powers[:, :, None, 1 : n + 1]).flatten(2, 3)

    def to_end(self, x: Float[Tensor, "b g n _"]) -> Float[Tensor, "b g n _"]:
        """Times decay^(n - 1 - j): what is left of position j after the chunk."""
        return x if self.rate is None else x * self.powers[:, :, : x.shape[2]].flip(2)

    def whole(self, state: Float[Tensor, "b g f m1"], chunk: Float[Tensor, "b g n f"]) -> Float[Tensor, "b g f m1"]:
        """Times decay^n."""
        return state if self.rate is None else state * self.rate ** chunk.shape[2]


def _chunks(x: Float[Tensor, "b h n e"]) -> list[slice]:
    length = x.shape[2]
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _sequences(
    cu_seqlens: Int[Tensor, " c1"], along: tuple[Tensor, ...], states: tuple[Tensor, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """For every sequence its part of the tensors that have positions, and its row of the states."""
    bounds = cu_seqlens.tolist()
    for c, (start, stop) in enumerate(pairwise(bounds)):
        yield [x[:, :, start:stop] for x in along], [x[c : c + 1] for x in states]


def _features(x: Float[Tensor, "b h n e"], at: slice, use_elu: bool) -> Float[Tensor, "b h c f"]:
    """phi of a chunk, in the dtype that is computed in."""
    x = _at_least_float32(x[:, :, at])
    return elu(x) if use_elu else x


def _through_features(
    grad: Float[Tensor, "b h c f"], x: Float[Tensor, "b h n e"], at: slice, use_elu: bool
) -> Float[Tensor, "b h c e"]:
    """The gradient of a chunk of x from that of phi(x): elu's derivative is min(phi, 1)."""
    return (grad * _features(x, at, use_elu).clamp(max=1) if use_elu else grad).to(x.dtype)


def _with_one(value: Float[Tensor, "b g s m"], at: slice) -> Float[Tensor, "b g c m1"]:
    return pad(_at_least_float32(value[:, :, at]), (0, 1), value=1.0)


def _grad_product(grad_out: Float[Tensor, "b h n m"], result: Result, at: slice) -> Float[Tensor, "b h c m1"]:
    """g' = [g, -(g . y)] / d, of a chunk; 0 where nothing was attended to."""
    g, y = _at_least_float32(grad_out[:, :, at]), _at_least_float32(result.out[:, :, at])
    d = result.denominator[:, :, at, None]
    return torch.where(d == 0, 0.0, torch.cat([g, -(g * y).sum(-1, keepdim=True)], -1) / d)


def _by_key_head(x: Float[Tensor, "b h n _"], key: Float[Tensor, "b g s e"]) -> Float[Tensor, "b g rn _"]:
    """The rows of all r = h / g query heads that read one key head, together."""
    return x.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _by_query_head(x: Float[Tensor, "b g rn _"], query: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h c _"]:
    return x.view(*query.shape[:2], -1, x.shape[-1])


def _joined(memory: Float[Tensor, "b g f m"], normaliser: Float[Tensor, "b g f"]) -> Float[Tensor, "b g f m1"]:
    return torch.cat([memory, normaliser[..., None]], -1)


def _apart(state: Float[Tensor, "b g f m1"]) -> tuple[Float[Tensor, "b g f m"], Float[Tensor, "b g f"]]:
    return state[..., :-1].contiguous(), state[..., -1].contiguous()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
