"""Which queries are alike: k-means on the queries, or on hashes of them. A decision: nothing here has a gradient."""

from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flopwise.clustered_attention.kernels import numba as numba_kernels
from flopwise.clustered_attention.kernels import torch as torch_kernels

Clustering = Literal["kmeans", "hamming"]

# The sample holds 8 queries a cluster: among 4, one of 16 planted clusters is missing every fourth time.
SAMPLE = 8
# The next seed is the best of 4 draws: with one draw, the error of attention can double.
CANDIDATES = 4
# Lloyd steps on the sample: after such a seeding, ten are hardly better.
ITERATIONS = 2
BITS, HAMMING_ITERATIONS = 63, 10  # the paper's


def kmeans(
    query: Float[Tensor, "b h n e"],
    *,
    clusters: int,
    generator: torch.Generator,
    query_mask: Bool[Tensor, "b n"] | None = None,
    kernels: ModuleType = torch_kernels,
) -> Int[Tensor, "b h n"]:
    """k-means in the distance that bounds the error: ||softmax(q K^T) - softmax(q^c K^T)|| <= ||q - q^c|| ||K||.

    Fitted on `SAMPLE * clusters` queries, spread evenly over each text: greedy k-means++ seeding, then Lloyd steps.
    Then every query joins its nearest centroid.

    Args:
        clusters: at most this many are used. A text with no more queries than that gets one cluster a query.
        generator: all texts and heads share its draws, so that none depends on the others.
        query_mask: True = a query; padding joins no cluster.
        kernels: `kernels.torch` or `kernels.numba`.

    Returns:
        The cluster of each query, -1 for padding.

    Source: Lloyd 1982; Arthur & Vassilvitskii 2007 for the seeding. The paper's own clustering is `hamming`.
    """
    spread = torch.rand(SAMPLE * clusters, generator=generator, dtype=torch.float64, device=generator.device)
    picks = torch.rand(clusters, CANDIDATES, generator=generator, dtype=torch.float64, device=generator.device)
    x = _rows(query)
    sample, weight = _evenly_spread(x, query_mask, spread.to(x.device), query.shape[1])
    number = weight.sum(1, keepdim=True).clamp(min=1)
    origin = (sample * weight[..., None]).sum(1) / number
    sample = (sample - origin[:, None]) * weight[..., None]  # distances between small numbers keep their digits
    centroid = kernels.fit(sample, weight, picks.to(x.device), ITERATIONS)
    return _finish(kernels.nearest(x, centroid, origin), query_mask, query.shape, clusters)


def hamming(
    query: Float[Tensor, "b h n e"],
    *,
    clusters: int,
    generator: torch.Generator,
    query_mask: Bool[Tensor, "b n"] | None = None,
    kernels: ModuleType = torch_kernels,
) -> Int[Tensor, "b h n"]:
    """The paper's clustering (section 3.2): k-means in Hamming space on the signs of `BITS` random projections.

    A centroid's bit is the majority of its members' bits. With bits written as -1 and 1 the squared distance is four
    times the Hamming distance, so the nearest centroid is the same. The arguments are those of `kmeans`.
    """
    projection = torch.randn(query.shape[-1], BITS, generator=generator, device=generator.device)
    spread = torch.rand(clusters, generator=generator, dtype=torch.float64, device=generator.device)
    x = _rows(query)
    code = torch.where(x @ projection.to(x) > 0, 1.0, -1.0).to(x.dtype)
    centroid, _ = _evenly_spread(code, query_mask, spread.to(x.device), query.shape[1])
    keep = 1.0 if query_mask is None else query_mask.repeat_interleave(query.shape[1], 0)[:, None].to(x.dtype)
    index = torch.arange(centroid.shape[1], device=x.device)[:, None]
    for _ in range(HAMMING_ITERATIONS):
        member = keep * (kernels.nearest(code, centroid)[:, None] == index).to(x.dtype)
        votes = torch.bmm(member, code)
        centroid = torch.where(votes == 0, centroid, votes.sign())  # a tie, or no member, changes nothing
    return _finish(kernels.nearest(code, centroid), query_mask, query.shape, clusters)


# One operator for torch.compile, export and FlopCounterMode: it draws random numbers, which a graph could not hold.
@torch.library.custom_op("flopwise::cluster", mutates_args=())
def cluster(
    query: Tensor, query_mask: Tensor | None, clusters: int, clustering: str, seed: int, backend: str
) -> Tensor:
    """`kmeans` or `hamming`, in torch or numba, with a generator made from `seed`."""
    find = kmeans if clustering == "kmeans" else hamming
    return find(
        query,
        clusters=clusters,
        generator=torch.Generator().manual_seed(seed),
        query_mask=query_mask,
        kernels=numba_kernels if backend == "numba" else torch_kernels,
    )


@cluster.register_fake
def _(query: Tensor, query_mask: Tensor | None, clusters: int, clustering: str, seed: int, backend: str) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.int64)


@register_flop_formula(torch.ops.flopwise.cluster)
def _cluster_flops(
    query: torch.Size, query_mask: torch.Size | None, clusters: int, clustering: str, *_: object, **__: object
) -> int:
    """k-means: queries with centroids, the sample with candidates and centroids. Hamming: projections and codes."""
    batch, heads, length, width = query
    if clustering == "hamming":
        return 2 * batch * heads * length * BITS * (width + clusters * (HAMMING_ITERATIONS + 1))
    sample = min(SAMPLE * clusters, length)
    return 2 * batch * heads * clusters * width * (length + sample * (CANDIDATES + ITERATIONS))


def _rows(query: Float[Tensor, "b h n e"]) -> Float[Tensor, "bh n e"]:
    """Texts and heads as one dimension, in float32 or wider."""
    query = query.detach().flatten(0, 1)
    return query if query.dtype == torch.float64 else query.float()


def _evenly_spread(
    x: Float[Tensor, "r n e"], query_mask: Bool[Tensor, "b n"] | None, spread: Float[Tensor, " sample"], heads: int
) -> tuple[Float[Tensor, "r s e"], Float[Tensor, "r s"]]:
    """One query from each of len(spread) equal stretches of a text, or every query of a shorter one.

    Which ones depends on the text's own number of queries alone, never on how far it is padded.

    Returns:
        The queries, and 1 for each but 0 where a text has fewer than the longest.
    """
    length = x.shape[1]
    positions = torch.arange(min(len(spread), length), device=x.device)
    if query_mask is None:
        return x.index_select(1, _one_of_each(positions, spread, length)), x.new_ones(len(x), len(positions))
    number = query_mask.sum(-1, keepdim=True)
    rank = _one_of_each(positions, spread, number).minimum(number - 1).clamp(min=0)
    index = (~query_mask).byte().argsort(dim=-1, stable=True).gather(1, rank)  # the rank-th that is no padding
    index = index.repeat_interleave(heads, 0) + length * torch.arange(len(x), device=x.device)[:, None]
    sample = x.reshape(-1, x.shape[-1]).index_select(0, index.flatten()).view(*index.shape, x.shape[-1])
    return sample, (positions < number).repeat_interleave(heads, 0).to(x.dtype)


def _one_of_each(
    positions: Int[Tensor, " s"], spread: Float[Tensor, " sample"], number: Int[Tensor, "b 1"] | int
) -> Int[Tensor, "*b s"]:
    """A place in each of the stretches that `number` queries are cut into; every place if they are few."""
    stretches = min(number, len(spread)) if isinstance(number, int) else number.clamp(min=1, max=len(spread))
    return ((positions + spread[: len(positions)]) * number / stretches).long()


def _finish(
    nearest: Int[Tensor, "r n"], query_mask: Bool[Tensor, "b n"] | None, shape: torch.Size, clusters: int
) -> Int[Tensor, "b h n"]:
    """Padding joins no cluster; a text with no more queries than clusters gets one cluster a query, as if alone."""
    assignment = nearest.view(shape[:3])
    if query_mask is None:
        if shape[2] > clusters:
            return assignment
        query_mask = torch.ones(shape[0], shape[2], dtype=torch.bool, device=nearest.device)
    rank = query_mask.cumsum(-1) - 1
    short = rank[:, -1:] < clusters
    assignment = torch.where(short[:, None], rank[:, None], assignment)
    return assignment.masked_fill(~query_mask[:, None], -1)
