"""What every attention function asks of its arguments."""

import torch
from torch import Tensor


def check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a ValueError unless query (b, h, n, e), key (b, g, s, e) and value (b, g, s, m) fit: g divides h."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} is (batch, heads, length, width); got {tuple(tensor.shape)}. "
                "Split the heads off the width with `unflatten(-1, (heads, -1)).transpose(1, 2)`."
            )
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            raise ValueError(
                "query, key and value share one floating-point dtype; "
                f"got {query.dtype}, {key.dtype} and {value.dtype}. Convert them with `.to(query.dtype)`."
            )
    (batch, heads, _, width), (_, groups, source_length, _) = query.shape, key.shape
    if key.shape != (batch, groups, source_length, width) or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "query (b, h, n, e), key (b, g, s, e) and value (b, g, s, m) share the letters they have in common; "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if groups == 0 or heads % groups:
        raise ValueError(
            f"the query heads are a multiple of the key heads; got {heads} and {groups}. "
            "Repeat or drop heads until they are."
        )


def check_mask(name: str, mask: Tensor | None, batch: int, length: int) -> None:
    """Raise a ValueError unless the mask is boolean and (batch, length), or None."""
    if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
        raise ValueError(
            f"{name} is boolean, True = keep, of shape {(batch, length)}; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}. An additive mask becomes one by `mask == 0`."
        )
