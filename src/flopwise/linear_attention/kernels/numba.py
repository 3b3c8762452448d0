"""Linear attention compiled by numba: CPU only, float32, the extra `cpu`. The loops are in `numba_loops.py`."""

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flopwise.core.threads import over_rows
from flopwise.linear_attention.kernels.torch import Gradients, Result

AVAILABLE = find_spec("numba") is not None
CHUNK = 16  # positions, what every kind of vector and tile divides; 32 costs more within a chunk than it saves across
LARGE = 2**22  # bytes


def obstacle(query: Tensor) -> str:
    """Why numba cannot run on this tensor, with the remedy; empty when it can."""
    if not AVAILABLE:
        return "numba is not installed; pip install 'flopwise[cpu]'."
    if query.device.type != "cpu":
        return f"numba runs on the CPU and the query is on {query.device}; move it with .cpu()."
    if query.dtype == torch.float64:
        return "the numba kernels compute in float32 and the query is float64; convert it with .float()."
    return ""


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
    """`kernels.torch.forward`."""
    out, denominator = _empty(*query.shape[:3], value.shape[3]), _empty(*query.shape[:3])
    last = _empty(*memory.shape), _empty(*normaliser.shape)
    inputs = _inputs(query, key, value, memory, normaliser, decay, cu_seqlens, use_elu)
    packed = cu_seqlens is not None
    _run("forward", causal, memory, *inputs, _flat(out, packed), _flat(denominator, packed), *last)
    return Result(out.to(query.dtype), denominator, *last)


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
    """`kernels.torch.backward`."""
    grads = [_empty(*x.shape) for x in (query, key, value, memory, normaliser)]
    inputs = _inputs(query, key, value, memory, normaliser, decay, cu_seqlens, use_elu)
    packed = cu_seqlens is not None
    results = _flat(result.out, packed), _flat(result.denominator, packed), result.memory, result.normaliser
    upstream = _flat(grad_out, packed), grad_memory, grad_normaliser
    _run("backward", causal, memory, *inputs, *results, *upstream, *(_flat(x, packed) for x in grads[:3]), *grads[3:])
    return Gradients(
        *(x.to(like.dtype) for x, like in zip(grads, (query, key, value, memory, normaliser), strict=True))
    )


def _empty(*shape: int) -> Tensor:
    """Uninitialised float32 memory; if it is large, on large pages where Linux has them.

    Otherwise the first write to each 4096 bytes of fresh memory is a page fault, and those cost as much as a third of
    the time that the kernels take.
    """
    x = torch.empty(shape, dtype=torch.float32)
    if sys.platform == "linux" and x.nbytes >= LARGE:
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # a hint: whether it is taken does not matter
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(x.nbytes - mmap.PAGESIZE), mmap.MADV_HUGEPAGE)
    return x


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    use_elu: bool,
) -> tuple:
    """What both loops take first: where each text lies among queries and keys, the tensors, the settings."""
    packed = cu_seqlens is not None
    if cu_seqlens is not None:
        bounds = key_bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1).long().numpy()
    else:
        bounds, key_bounds = (_whole(len(x), x.shape[2]) for x in (query, key))
    heads = query.shape[1] // key.shape[1]
    rates = memory.new_empty(0, 0) if decay is None else decay.expand(memory.shape[:2])
    tensors = (*_flat(query, packed), heads), _flat(key, packed), _flat(value, packed)
    return bounds, key_bounds, *tensors, rates, memory, normaliser, use_elu


@lru_cache
def _whole(texts: int, length: int) -> Any:
    """Where texts of one length begin and end; kept, since to make it costs a tenth of a call for a short text."""
    return torch.tensor([[0, length]] * texts).numpy()


def _flat(x: Tensor, packed: bool) -> tuple[Any, int, int, int]:
    """The numbers of a tensor as one row, with the strides of text, head and position: nothing is copied.

    Only a last dimension that is not contiguous is, and what is not float32. Packed texts share the first dimension.
    """
    x = x.detach().float()
    if x.ndim == 4 and x.stride(3) != 1:
        x = x.contiguous()
    text, head, position = x.stride()[:3]
    if not x.is_contiguous():
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        x = x.as_strided((extent if x.numel() else 0,), (1,))
    return x.numpy().reshape(-1), 0 if packed else text, head, position


def _run(direction: str, causal: bool, memory: Tensor, *arguments: Any) -> None:
    """Call a compiled loop over all rows."""
    from flopwise.linear_attention.kernels import numba_loops

    loop: Callable[..., None] = getattr(numba_loops, f"{'causal' if causal else 'full'}_{direction}")
    arrays = [x.detach().contiguous().numpy() if isinstance(x, Tensor) else x for x in arguments]
    rows = memory.shape[0] * memory.shape[1]
    over_rows(loop, rows, arrays)
