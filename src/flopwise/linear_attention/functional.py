"""Linear attention: the function, and which kernels run it."""

from typing import Literal, NamedTuple, get_args, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from flopwise.core.attention import check_attention, check_mask
from flopwise.linear_attention.feature_maps import FeatureMap, features_of
from flopwise.linear_attention.kernels import numba as numba_kernels
from flopwise.linear_attention.kernels.operator import attend
from flopwise.linear_attention.recurrent import LinearState, init_state

Backend = Literal["auto", "torch", "numba"]


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    feature_map: FeatureMap = "elu",
    key_mask: Tensor | None = None,
    decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    feature_map: FeatureMap = "elu",
    key_mask: Tensor | None = None,
    decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, LinearState]: ...
def linear_attention(
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b g s e"],
    value: Float[Tensor, "b g s m"],
    *,
    causal: bool = False,
    feature_map: FeatureMap = "elu",
    key_mask: Bool[Tensor, "b s"] | None = None,
    decay: Float[Tensor, " g"] | None = None,
    cu_seqlens: Int[Tensor, " c1"] | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b h n m"] | tuple[Float[Tensor, "b h n m"], LinearState]:
    """phi(Q) (phi(K)^T V), normalised: attention in time and memory that grow with n, not with n^2.

        y_i = phi(q_i)^T S / phi(q_i)^T z,    S = sum_j phi(k_j) v_j^T,    z = sum_j phi(k_j)

    over all j, or over j <= i if it is `causal`. Where nothing is attended to (z = 0, all keys masked), y is 0.
    Computes in float32, or float64 for float64, whatever the inputs.

    Args:
        query: b texts, h heads, n positions of width e.
        key, value: s positions with g heads; query head i reads key head i // (h / g).
        causal: position i sees keys j <= i, also where n and s differ: as `is_causal` of torch's own attention.
        feature_map: phi, by name or as a function or module; see `feature_maps`. "identity" if query and key are
            features already.
        key_mask: True = keep. What stands in masked places, even nan, does not matter.
        decay: in (0, 1], one a key head: position j counts decay^(i - j) at i. Causal attention only.
        cu_seqlens: texts of different lengths as one without padding, b = 1: text c is at positions
            cu_seqlens[c] : cu_seqlens[c + 1], the first 0, the last n = s. Its texts are the batch of the states.
        state: of what came before, as if those positions stood in front of the keys.
        return_state: also return the state after the last position: a prompt in one pass, then `step`.
        backend: "torch" runs anywhere, "numba" on the CPU; "auto" takes the fastest that can run, see `chosen_backend`.

    Returns:
        The output, in the query's dtype; with `return_state` also the state, float32 or float64.

    Raises:
        ValueError: shapes, masks or settings do not fit together.
        RuntimeError: `backend` cannot run here.

    Source: Katharopoulos, Vyas, Pappas & Fleuret, ICML 2020, sections 3.2 and 3.3. Decay: Sun et al. 2023.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, causal, key_mask, decay, cu_seqlens)
    name, _ = chosen_backend(query, backend=backend)

    use_elu = feature_map == "elu"  # the kernels know this one: its features need no memory of their own
    if not use_elu:
        query, key = features_of(feature_map, query), features_of(feature_map, key)
    no_key = -torch.inf if use_elu else 0.0  # phi(k) = 0
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, None, :, None], no_key)
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)

    lowered = query.dtype
    if decay is not None and decay.requires_grad and torch.is_grad_enabled():
        # Its gradient is a small difference of large sums over those of the keys: not to be had from bfloat16.
        query, key, value = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))

    length, missing = query.shape[2], query.shape[2] - key.shape[2]
    if causal and missing > 0:
        key, value = pad(key, (0, 0, 0, missing), value=no_key), pad(value, (0, 0, 0, missing))
    elif causal and missing < 0:
        query = pad(query, (0, 0, 0, -missing))

    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    texts = len(query) if cu_seqlens is None else len(cu_seqlens) - 1
    if state is None:
        state = init_state(texts, key.shape[1], key.shape[3], value.shape[3], dtype, query.device)
    _check_state(state, (texts, key.shape[1], key.shape[3], value.shape[3]))
    memory, normaliser = (x.to(dtype) for x in state)
    rate = None if decay is None else decay.to(dtype).expand(len(query), -1)
    out, _, *last = attend(query, key, value, memory, normaliser, rate, cu_seqlens, causal, use_elu, name)
    out = out[:, :, :length].to(lowered)
    return (out, LinearState(*last)) if return_state else out


class Choice(NamedTuple):
    """What runs, "torch" or "numba", and why."""

    name: str
    reason: str


def chosen_backend(query: Tensor, *, backend: Backend = "auto") -> Choice:
    """What `linear_attention` runs for this query, and why.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend that was asked for cannot run here; "auto" never raises.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is one of {', '.join(get_args(Backend))}; got {backend!r}.")
    obstacle = numba_kernels.obstacle(query)
    if backend == "numba" and obstacle:
        raise RuntimeError(f"backend='numba' cannot run here: {obstacle} Or take backend='torch'.")
    if backend != "auto":
        return Choice(backend, "asked for")
    return Choice("torch", obstacle) if obstacle else Choice("numba", "on the CPU, the fastest")


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument that does not fit."""
    check_attention(query, key, value)
    batch, length, groups, source_length = len(query), query.shape[2], *key.shape[1:3]
    check_mask("key_mask", key_mask, batch, source_length)
    if decay is not None and (decay.shape != (groups,) or not causal):
        raise ValueError(
            f"decay is one number a key head, shape {(groups,)}, with causal=True: without an order of the positions "
            f"nothing decays; got shape {tuple(decay.shape)} and causal={causal}."
        )
    if cu_seqlens is not None and (
        batch != 1 or length != source_length or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2
    ):
        raise ValueError(
            "cu_seqlens (c + 1,) cuts one packed text into c: batch 1, as many queries as keys; got "
            f"{tuple(cu_seqlens.shape)}, query {tuple(query.shape)} and key {tuple(key.shape)}."
        )


def _check_state(state: LinearState, shape: tuple[int, int, int, int]) -> None:
    found = tuple(state.memory.shape), tuple(state.normaliser.shape)
    if found != (shape, shape[:3]):
        raise ValueError(
            f"a state for these inputs has a memory (batch, key heads, features, value width) of shape {shape} and a "
            f"normaliser of shape {shape[:3]}; got {found[0]} and {found[1]}. `init_state` makes one."
        )
