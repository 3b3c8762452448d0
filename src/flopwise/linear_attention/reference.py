"""The method as the paper writes it, twice: as attention, in N x N matrices, and as a recurrence, position by position.

The tests hold everything else to it. Shapes: `query` (B, H, N, F), `key` (B, G, S, F), `value` (B, G, S, M), features
already, with query head h reading key head h // (H / G). Output: (B, H, N, M), 0 where no key is attended to.
"""

import torch
from torch import Tensor


def quadratic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Equation 4: y_i = sum_j a_ij v_j / sum_j a_ij, with a_ij = phi(q_i) . phi(k_j) decay^(i - j)."""
    key, value = _for_each_query_head(query, key, value)
    attention = query @ key.mT  # (B, H, N, S)
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    if decay is not None:
        rate = decay.repeat_interleave(query.shape[1] // len(decay))[:, None, None]
        attention = attention * rate ** (i - j).clamp(min=0)
    if causal:
        attention = attention * (j <= i)
    if key_mask is not None:
        attention = attention * key_mask[:, None, None]
    total = attention.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, attention @ value / torch.where(total == 0, 1.0, total))


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    decay: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Equations 16 to 20: S and z take in one position after the other. The output, and the last S and z."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    memory = query.new_zeros(batch, groups, width, value.shape[-1])
    normaliser = query.new_zeros(batch, groups, width)
    if state is not None:
        memory, normaliser = state
    out = []
    for i in range(max(length, key.shape[2])):
        if decay is not None:
            memory, normaliser = memory * decay[:, None, None], normaliser * decay[:, None]
        if i < key.shape[2]:
            k = key[:, :, i] if key_mask is None else key[:, :, i] * key_mask[:, i, None, None]
            memory = memory + k[..., :, None] * value[:, :, i, None, :]
            normaliser = normaliser + k
        if i < length:
            of_query = torch.arange(heads) // (heads // groups)
            total = (query[:, :, i] * normaliser[:, of_query]).sum(-1, keepdim=True)
            y = (query[:, :, i, :, None] * memory[:, of_query]).sum(-2)
            out.append(torch.where(total == 0, 0.0, y / torch.where(total == 0, 1.0, total)))
    return torch.stack(out, 2), (memory, normaliser)


def _for_each_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
