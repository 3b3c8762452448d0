"""Clustering and clustered attention in torch operations: every device, differentiable, compilable.

Rows are r = b h, a text and a query head; key rows b g. The exact part of the improved form is a batch of equal matrix
products over tiles: queries sorted by cluster and packed into tiles of T slots, each tile owned by one cluster.
Cluster j needs ceil(n_j / T) of them, so ceil(N / T) + C are always enough and no shape depends on the data.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def fit(
    sample: Float[Tensor, "r s e"],
    weight: Float[Tensor, "r s"],
    picks: Float[Tensor, "clusters candidates"],
    iterations: int,
) -> Float[Tensor, "r clusters e"]:
    """k-means centroids of the `sample`, whose `weight` is 0 or 1: greedy k-means++ seeding, then Lloyd steps.

    `picks` are uniform draws in [0, 1): the candidates for each seed. A centroid without members stays where it was.
    """
    centroid = _greedy_seeds(sample, weight, picks)
    for _ in range(iterations):
        member = weight[:, None] * (nearest(sample, centroid)[:, None] == _arange(len(picks), sample)[:, None])
        number = member.sum(-1, keepdim=True)
        centroid = torch.where(number > 0, torch.bmm(member, sample) / number.clamp(min=1), centroid)
    return centroid


def _greedy_seeds(
    sample: Float[Tensor, "r s e"], weight: Float[Tensor, "r s"], picks: Float[Tensor, "clusters candidates"]
) -> Float[Tensor, "r clusters e"]:
    """Candidates are drawn with a probability proportional to their squared distance from the seeds so far.

    Of the candidates of one draw, the one that leaves the smallest sum of squared distances is the next seed.
    """
    rows, length, width = sample.shape
    each = _arange(rows, sample)
    # [-2 x, |x|^2, 1] . [y, 1, |y|^2] = |x - y|^2 in one product, and 0 where y is padding
    squares, one = sample.square().sum(-1, keepdim=True), torch.ones_like(sample[..., :1])
    others = torch.cat([sample, one, squares], -1) * weight[..., None]
    candidates = torch.cat([-2 * sample, squares, one], -1).flatten(0, 1)

    # Two near queries leave equal sums whichever is taken: the first, then, not whichever rounding prefers.
    handicap = 1 + 1e-5 * torch.arange(picks.shape[1], device=sample.device)
    distance = weight  # the first draw is uniform
    seeds = []
    for draw in picks:
        cumulated = distance.cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(cumulated, draw * cumulated[:, -1:], right=True).clamp_(max=length - 1)
        drawn += length * each[:, None]
        candidate = candidates.index_select(0, drawn.flatten()).view(rows, picks.shape[1], width + 2)
        apart = torch.bmm(candidate, others.mT).clamp_(min=0)
        left = torch.minimum(apart, distance[:, None]) if seeds else apart
        best = (left.sum(-1) * handicap).argmin(-1)
        distance = left[each, best]
        seeds.append(drawn[each, best])
    return sample.flatten(0, 1).index_select(0, torch.stack(seeds, 1).flatten()).view(rows, len(picks), width)


def nearest(
    x: Float[Tensor, "r n e"], centroid: Float[Tensor, "r clusters e"], origin: Float[Tensor, "r e"] | None = None
) -> Int[Tensor, "r n"]:
    """argmin_j ||x - origin - c_j||^2 = argmax_j (x - origin) . c_j - ||c_j||^2 / 2."""
    return torch.baddbmm(offset(centroid, origin), centroid, x.mT).max(1).indices


def offset(
    centroid: Float[Tensor, "r clusters e"], origin: Float[Tensor, "r e"] | None
) -> Float[Tensor, "r clusters 1"]:
    """What `nearest` adds to x . c_j: -origin . c_j - ||c_j||^2 / 2."""
    half_square = -0.5 * centroid.square().sum(-1, keepdim=True)
    return half_square if origin is None else torch.baddbmm(half_square, centroid, origin[..., None], alpha=-1)


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
    """What `functional.clustered_attention` documents, once the clusters are known.

    Every text needs a key that is not masked. A query in no cluster (-1) gets whatever is cheapest. Gradients take the
    clusters, and the choice of the `topk` keys, as fixed.
    """
    batch, heads, length, width = query.shape
    (_, groups, source_length, _), value_width = key.shape, value.shape[3]
    rows, key_rows = batch * heads, batch * groups
    query, assignment = query.reshape(rows, length, width), assignment.reshape(rows, length)
    key, value = key.reshape(key_rows, source_length, width), value.reshape(key_rows, source_length, value_width)
    seen = None if key_mask is None else key_mask.repeat_interleave(groups, 0)

    # The query heads that share a key head share its products: (key rows, heads per key head * clusters, ...).
    centroid = _centroids(query, assignment, clusters).reshape(key_rows, heads // groups * clusters, width)
    rest, top, mass = _attend_centroids(centroid * scale, key, value, seen, topk)
    rest = rest.view(rows * clusters, value_width)
    if topk == 0:
        out = rest.index_select(0, _flat(assignment.clamp(min=0), clusters))
        return out.view(batch, heads, length, value_width)

    # Keys are gathered once a cluster, then copied to its tiles whole: few, long copies.
    size = _tile_size(length, clusters)
    tiles = _pack(assignment, clusters, size)
    owner = _flat(tiles.owner, clusters)
    at = _flat(top, source_length)
    members = query.reshape(-1, width).index_select(0, _flat(tiles.query, length)).view(len(owner), size, width)
    top_key = key.reshape(-1, width).index_select(0, at).view(rows * clusters, topk, width) * scale
    logits = _at_least_float32(torch.bmm(members, top_key.index_select(0, owner).mT))
    if seen is not None:  # a text with fewer than `topk` keys has masked ones among them
        unseen = ~seen.gather(1, top).view(rows * clusters, 1, topk)
        logits = logits.masked_fill(unseen.index_select(0, owner), -torch.inf)
    exact = (logits.softmax(-1) * mass.view(-1, 1, 1).index_select(0, owner)).to(value.dtype)
    top_value = value.reshape(-1, value_width).index_select(0, at).view(rows * clusters, topk, value_width)
    out = torch.baddbmm(rest.index_select(0, owner)[:, None], exact, top_value.index_select(0, owner))
    out = out.view(-1, value_width).index_select(0, _flat(tiles.slot, tiles.query.shape[1]))
    return out.view(batch, heads, length, value_width)


def _attend_centroids(
    centroid: Float[Tensor, "r c e"],
    key: Float[Tensor, "r s e"],
    value: Float[Tensor, "r s m"],
    seen: Bool[Tensor, "r s"] | None,
    topk: int,
) -> tuple[Float[Tensor, "r c m"], Int[Tensor, "r top"], Float[Tensor, "r c"]]:
    """A^c V without the `topk` keys of each cluster; these keys, all clusters' in one row; and their mass."""
    logits = _at_least_float32(torch.bmm(centroid, key.mT))
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
    top = logits.detach().topk(topk, -1, sorted=False).indices
    attention = logits.softmax(-1)
    rest = torch.bmm(attention.scatter(-1, top, 0.0).to(value.dtype), value)
    return rest, top.flatten(1), attention.gather(-1, top).sum(-1)


def _centroids(
    query: Float[Tensor, "r n e"], assignment: Int[Tensor, "r n"], clusters: int
) -> Float[Tensor, "r {clusters} e"]:
    """Q^c_j = the mean of cluster j's queries, summed in float32 or wider; 0 for an empty cluster."""
    rows, length, width = query.shape
    # Queries in no cluster are added up in one more cluster, which is cut off.
    where = _flat(torch.where(assignment < 0, clusters, assignment), clusters + 1)
    x = _at_least_float32(query).reshape(-1, width)
    total = x.new_zeros(rows * (clusters + 1), width).index_add(0, where, x)
    number = x.new_zeros(rows * (clusters + 1)).index_add(0, where, x.new_ones(rows * length))
    mean = total / number.clamp(min=1)[:, None]
    return mean.view(rows, clusters + 1, width)[:, :clusters].to(query.dtype)


class _Tiles(NamedTuple):
    """Queries packed into tiles of slots, every tile owned by one cluster."""

    query: Int[Tensor, "r slots"]  # the query in each slot; an empty slot holds query 0
    owner: Int[Tensor, "r tiles"]  # the cluster of each tile
    slot: Int[Tensor, "r n"]  # the slot of each query; of one in no cluster, any


def _pack(assignment: Int[Tensor, "r n"], clusters: int, size: int) -> _Tiles:
    """Give every cluster its ceil(n_j / size) tiles of `size` slots, and every query a slot in one of them."""
    rows, length = assignment.shape
    tiles = -(-length // size) + clusters
    ids = torch.where(assignment < 0, clusters, assignment)
    ordered, order = ids.sort(dim=-1, stable=True)

    number = ids.new_zeros(rows, clusters + 1).scatter_add_(1, ids, torch.ones_like(ids))
    end = ((number + size - 1) // size).cumsum(-1)  # the tile after a cluster's last
    start = torch.nn.functional.pad(end[:, :-1], (1, 0))
    first_query = number.cumsum(-1) - number
    rank = _arange(length, ids) - first_query.gather(1, ordered)
    slot = start.gather(1, ordered) * size + rank
    nowhere = tiles * size  # one more slot, cut off below, takes the queries in no cluster
    slot = torch.where(ordered == clusters, nowhere, slot)

    query = ids.new_zeros(rows, tiles * size + 1).scatter_(1, slot, order)[:, :-1]
    owner = torch.searchsorted(end, _arange(tiles, ids).expand(rows, -1).contiguous(), right=True)
    slot = torch.empty_like(order).scatter_(1, order, slot.clamp(max=nowhere - 1))
    return _Tiles(query, owner.clamp(max=clusters - 1), slot)


def _tile_size(length: int, clusters: int) -> int:
    """Slots in a tile: the more queries a cluster has, the larger; powers of two from 8 to 64."""
    return min(64, max(8, 1 << (length // (2 * clusters)).bit_length()))


def _flat(index: Int[Tensor, "r i"], stride: int) -> Int[Tensor, " ri"]:
    """`index` into each of r blocks of length `stride`, as an index into all of them."""
    return (index + stride * _arange(len(index), index)[:, None]).flatten()


def _arange(n: int, like: Tensor) -> Int[Tensor, " n"]:
    return torch.arange(n, device=like.device)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
