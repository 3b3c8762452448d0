"""Clustering and clustered attention compiled by numba: CPU only, the extra `cpu`.

The same functions as in `torch.py`. Large matrix products stay with torch. What torch has no good operation for is in
`numba_loops.py`: k-means, the search for the top keys, and the members of a cluster against its few keys. Attention
between centroids and keys is worked on in blocks that stay in the cache and is not kept for the backward pass, which
computes it again: fresh memory costs more than the products.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flopwise.clustered_attention.kernels.torch import offset
from flopwise.core.threads import over_rows

AVAILABLE = find_spec("numba") is not None
BLOCK = 2**20  # numbers in a block: 4 MB of float32


def obstacle(query: Tensor) -> str:
    """Why numba cannot run on this tensor, with the remedy; empty when it can."""
    if not AVAILABLE:
        return "numba is not installed; pip install 'flopwise[cpu]'."
    if query.device.type != "cpu":
        return f"numba runs on the CPU and the query is on {query.device}; move it with .cpu()."
    return ""


def fit(
    sample: Float[Tensor, "r s e"],
    weight: Float[Tensor, "r s"],
    picks: Float[Tensor, "clusters candidates"],
    iterations: int,
) -> Float[Tensor, "r clusters e"]:
    """`kernels.torch.fit`."""
    centroid = sample.new_empty(len(sample), len(picks), sample.shape[2])
    _run("fit", len(sample), sample.contiguous(), sample.mT.contiguous(), weight, picks, iterations, centroid)
    return centroid


def nearest(
    x: Float[Tensor, "r n e"], centroid: Float[Tensor, "r clusters e"], origin: Float[Tensor, "r e"] | None = None
) -> Int[Tensor, "r n"]:
    """`kernels.torch.nearest`; the first of equally near centroids."""
    added = offset(centroid, origin)
    assignment = x.new_empty(x.shape[:2], dtype=torch.int64)
    for block, score in _blocks(centroid, x):
        torch.baddbmm(added[block], centroid[block], x[block].mT, out=score)
        _run("nearest", len(score), score, assignment[block])
    return assignment


def attend(
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b g s e"],
    value: Float[Tensor, "b g s m"],
    key_mask: Bool[Tensor, "b s"] | None,
    assignment: Int[Tensor, "b h n"],
    *,
    clusters: int,
    topk: int,
    scale: float,
) -> Float[Tensor, "b h n m"]:
    """`kernels.torch.attend`, as one differentiable operator. Computes in float32, or float64 for float64."""
    return clustered_attend(query, key, value, key_mask, assignment, clusters, topk, scale)[0]


@torch.library.custom_op("flopwise::clustered_attend", mutates_args=())
def clustered_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    assignment: Tensor,
    clusters: int,
    topk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, then what the backward pass needs, none of it of size C S.

    Centroids and the sizes of clusters; the top keys (-1 for want of one) and the centroids' attention to them; the
    logarithm of the softmax's normaliser.
    """
    q, k, v, members = _rows(query), _heads(key), _heads(value), assignment.flatten(0, 1).contiguous()
    rows, group, seen = len(q), query.shape[1] // key.shape[1], _seen(key_mask, key)
    centroid, number = q.new_empty(rows, clusters, q.shape[2]), members.new_empty(rows, clusters)
    top, top_attention = members.new_empty(rows, clusters, topk, dtype=torch.int32), q.new_empty(rows, clusters, topk)
    summary, normaliser = q.new_empty(rows, clusters, v.shape[2]), q.new_empty(rows, clusters)
    out = q.new_empty(rows, q.shape[1], v.shape[2])

    _run("centroids", rows, q, members, centroid, number)
    scaled, *found = _by_key_row(group, centroid * scale, summary, top, top_attention, normaliser)
    for block, attention in _blocks(scaled, k):
        block_summary, *block_found = (x[block] for x in found)
        torch.bmm(scaled[block], k[block].mT, out=attention)
        _run("softmax_and_top", len(attention), attention, seen[block], *block_found)
        torch.bmm(attention, v[block], out=block_summary)
    _run("attend_members", rows, group, q, k, v, members, summary, top, top_attention, scale, out)
    out = out.view(*query.shape[:3], v.shape[2]).to(query.dtype)
    return out, centroid, number, top, top_attention, normaliser


@clustered_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    assignment: Tensor,
    clusters: int,
    topk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, length, width), value_width = query.shape, value.shape[3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    of_cluster = query.new_empty(batch * heads, clusters, dtype=dtype)
    top_attention = query.new_empty(batch * heads, clusters, topk, dtype=dtype)
    return (
        query.new_empty(batch, heads, length, value_width),
        query.new_empty(batch * heads, clusters, width, dtype=dtype),
        torch.empty_like(of_cluster, dtype=torch.int64),
        torch.empty_like(top_attention, dtype=torch.int32),
        top_attention,
        of_cluster,
    )


@torch.library.custom_op("flopwise::clustered_attend_backward", mutates_args=())
def clustered_attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    assignment: Tensor,
    centroid: Tensor,
    number: Tensor,
    top: Tensor,
    top_attention: Tensor,
    normaliser: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    g, q, k, v, members = *map(_rows, (grad_out, query, key, value)), assignment.flatten(0, 1).contiguous()
    rows, group, seen = len(q), query.shape[1] // key.shape[1], _seen(key_mask, key)
    grad_query, grad_key, grad_value = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_centroid, grad_mass = torch.empty_like(centroid), torch.empty_like(normaliser)
    grad_summary = centroid.new_empty(rows, centroid.shape[1], v.shape[2])

    of_members = g, q, k, v, members, top, top_attention, scale, grad_query, grad_key, grad_value
    _run("attend_members_backward", len(k), group, *of_members, grad_summary, grad_mass)
    scaled, grad_scaled, grad_summary, *found = _by_key_row(
        group, centroid * scale, grad_centroid, grad_summary, normaliser, top, top_attention, grad_mass
    )
    for (block, attention), (_, grad) in zip(_blocks(scaled, k), _blocks(scaled, k), strict=True):
        torch.bmm(scaled[block], k[block].mT, out=attention)
        torch.bmm(grad_summary[block], v[block].mT, out=grad)
        _run("attend_centroids_backward", len(grad), attention, grad, seen[block], *(x[block] for x in found))
        grad_value[block].baddbmm_(attention.mT, grad_summary[block])
        grad_key[block].baddbmm_(grad.mT, scaled[block])
        torch.bmm(grad, k[block], out=grad_scaled[block])
    _run("add_shares", rows, grad_centroid.mul_(scale), number, members, grad_query)
    return (
        grad_query.view_as(query).to(query.dtype),
        grad_key.view_as(key).to(key.dtype),
        grad_value.view_as(value).to(value.dtype),
    )


@clustered_attend_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:
    query, key, value, key_mask, assignment, _, _, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, key_mask, assignment, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_out, *_):
    grads = clustered_attend_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None, None


clustered_attend.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.flopwise.clustered_attend)
def _flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    key_mask: torch.Size | None,
    assignment: torch.Size,
    clusters: int,
    topk: int,
    *_: object,
    **__: object,
) -> int:
    """Centroids with all keys and members with the top keys, q k^T and p v each."""
    batch, heads, length, width = query
    pairs = batch * heads * (clusters * key[2] + length * topk)
    return 2 * pairs * (width + value[3])


@register_flop_formula(torch.ops.flopwise.clustered_attend_backward)
def _backward_flops(
    grad_out: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    key_mask: torch.Size | None,
    assignment: torch.Size,
    centroid: torch.Size,
    number: torch.Size,
    top: torch.Size,
    *_: object,
    **_keywords: object,
) -> int:
    """q k^T once more, then the gradients of v, p, q and k, over the same pairs."""
    batch, heads, length, width = query
    pairs = batch * heads * (top[1] * key[2] + length * top[2])
    return 2 * pairs * (3 * width + 2 * value[3])


def _rows(x: Float[Tensor, "b h n e"]) -> Float[Tensor, "bh n e"]:
    """Texts and heads as one dimension, contiguous, float32 or float64."""
    x = x.flatten(0, 1).contiguous()
    return x if x.dtype == torch.float64 else x.float()


def _heads(x: Float[Tensor, "b g s e"]) -> Float[Tensor, "bg s e"]:
    """The same without a copy where one text has its heads interleaved, as a projection does: few rows are read."""
    x = x.flatten(0, 1)
    if x.stride(2) != 1:
        x = x.contiguous()
    return x if x.dtype == torch.float64 else x.float()


def _seen(key_mask: Bool[Tensor, "b s"] | None, key: Float[Tensor, "b g s e"]) -> Bool[Tensor, "r s"]:
    """The mask of each key row; no rows for no mask."""
    if key_mask is None:
        return key.new_empty(0, key.shape[2], dtype=torch.bool)
    return key_mask.repeat_interleave(key.shape[1], 0)


def _by_key_row(group: int, *tensors: Tensor) -> list[Tensor]:
    """Rows (b h) of clusters as key rows (b g), with the clusters of all query heads that share the key head."""
    return [x.view(len(x) // group, group * x.shape[1], *x.shape[2:]) for x in tensors]


def _blocks(
    centroid: Float[Tensor, "r c e"], x: Float[Tensor, "r n e"]
) -> Iterator[tuple[slice, Float[Tensor, "block c n"]]]:
    """Slices of the rows, each with memory for a (centroid, x) matrix a row; all are given the same memory."""
    size = max(torch.get_num_threads(), BLOCK // max(1, centroid.shape[1] * x.shape[1]))
    buffer = x.new_empty(min(size, len(x)), centroid.shape[1], x.shape[1])
    for start in range(0, len(x), size):
        block = slice(start, min(start + size, len(x)))
        yield block, buffer[: block.stop - start]


def _run(name: str, rows: int, *arguments: Tensor | int | float) -> None:
    """Call a compiled loop over all rows."""
    from flopwise.clustered_attention.kernels import numba_loops

    loop: Callable[..., None] = getattr(numba_loops, name)
    arrays = [x.numpy() if isinstance(x, Tensor) else x for x in arguments]
    over_rows(loop, rows, arrays)
