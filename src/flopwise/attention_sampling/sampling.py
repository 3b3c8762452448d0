"""Drawing positions from an attention distribution."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

MASK = 0xFFFFFFFF  # the hash works on 32 bits, inside int64 so that no product overflows


def sample(
    log_attention: Float[Tensor, "b k"], n: int, *, replace: bool = False, generator: torch.Generator | None = None
) -> Int[Tensor, "b n"]:
    """n positions for each row, in the order they are drawn, position i with probability proportional to a_i.

    Without replacement: one after another, each in proportion to its attention among those that are left. With
    exponential times E_i / a_i, the first n to arrive are that draw (Gumbel-top-k, in descending order). Positions with
    attention 0 (log -inf) come last: they are drawn only where fewer than n have any.

    Args:
        log_attention: log a, (B, K), normalised or not.
        n: how many positions, at most K without replacement.
        generator: None is torch's default generator, as in `torch.multinomial`.

    Raises:
        ValueError: n is not between 1 and K.

    Source: Kool, van Hoof & Welling 2019 for Gumbel-top-k; Efraimidis & Spirakis 2006 for the exponential times.
    """
    check_draw(log_attention, n, replace)
    shape = (len(log_attention), n if replace else log_attention.shape[1])
    u = torch.rand(shape, generator=generator, device=log_attention.device, dtype=torch.float64)
    return draw(log_attention, n, u, replace=replace)


def topk(log_attention: Float[Tensor, "b k"], n: int) -> Int[Tensor, "b n"]:
    """The n positions with the most attention, largest first: the deterministic choice, for inference."""
    check_draw(log_attention, n, replace=False)
    return log_attention.topk(n, dim=-1).indices


def draw(
    log_attention: Float[Tensor, "b k"], n: int, u: Float[Tensor, "b columns"], *, replace: bool
) -> Int[Tensor, "b n"]:
    """`sample` from given uniform numbers in [0, 1): K a row without replacement, n with."""
    log_attention = log_attention.detach()
    if replace:
        ends = log_attention.double().softmax(-1).cumsum(-1)
        # right=True: position i owns [end_{i-1}, end_i), nothing where a_i = 0
        found = torch.searchsorted(ends, u.double() * ends[:, -1:], right=True)
        last = (log_attention > -torch.inf).long().cumsum(-1).argmax(-1, keepdim=True)  # for a mark on the very end
        return torch.minimum(found, last)
    tiny = 2.0**-33
    log_times = (-torch.log1p(-u.clamp(tiny, 1 - 2.0**-24))).log() - log_attention
    return log_times.topk(n, dim=-1, largest=False).indices


def uniforms(log_attention: Float[Tensor, "b k"], columns: int, seed: int) -> Float[Tensor, "b columns"]:
    """Uniform numbers that are a function of the seed, the row and the attention's own bits: a draw without a state.

    For a network's forward, where a `torch.Generator` breaks `fullgraph` and activation checkpointing. Recomputed in a
    backward pass, the same attention gives the same draw; after an optimizer step, another one. Processes of a
    distributed run draw differently because their data differ, and a resumed run draws as the uninterrupted one.
    """
    device = log_attention.device
    bits = log_attention.detach().float().view(torch.int32).long() & MASK
    place = torch.arange(bits.shape[1], device=device)
    content = _hash(bits ^ ((place * 0x1E3779B9) & MASK)).sum(-1)
    row = torch.arange(len(bits), device=device)
    stream = _hash(row ^ _hash(torch.full_like(row, seed & MASK)))
    key = _hash(_hash((content ^ (content >> 32)) & MASK) ^ stream)
    numbers = _hash(_hash((key[:, None] + torch.arange(columns, device=device) * 0x1E3779B9) & MASK) ^ key[:, None])
    return numbers.float() / 2.0**32


def _hash(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Mixes 32 bits: shifts and odd multipliers, each a bijection."""
    x = x ^ (x >> 16)
    x *= 0x2C1B3C6D  # in place: at thousands of positions the copies cost as much as the arithmetic
    x &= MASK
    x ^= x >> 12
    x *= 0x297A2D39
    x &= MASK
    x ^= x >> 15
    return x


def check_draw(log_attention: Tensor, n: int, replace: bool) -> None:
    positions = log_attention.shape[-1]
    if n < 1 or (n > positions and not replace):
        raise ValueError(
            f"a draw takes between 1 and K positions{'' if replace else ' without replacement'}; got n = {n} of "
            f"K = {positions}. Take fewer patches, or an attention map with more positions (a larger low-resolution "
            "view, or a smaller stride in the attention network)."
        )
