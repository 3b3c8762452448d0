"""The method as the paper writes it: loops over texts, heads and clusters, slow and plain, for given clusters.

The tests hold everything else to it. Shapes: `query` (B, H, N, E), `key` (B, G, S, E), `value` (B, G, S, M), with query
head h reading key head h // (H / G). `assignment` (B, H, N) names each query's cluster, -1 for none.
"""

import torch
from torch import Tensor


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V, what clustered attention approximates."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b, h, k, v in _heads(query, key, value, key_mask):
        out[b, h] = _softmax(query[b, h], k) @ v
    return out


def clustered(
    query: Tensor, key: Tensor, value: Tensor, assignment: Tensor, clusters: int, key_mask: Tensor | None = None
) -> Tensor:
    """Section 3.1: V^c = softmax(Q^c K^T / sqrt(E)) V, Q^c_j the mean query of cluster j; all its members get V^c_j."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b, h, k, v in _heads(query, key, value, key_mask):
        for members in _clusters(assignment[b, h], clusters):
            centroid = query[b, h, members].mean(0, keepdim=True)  # equation 3
            out[b, h, members] = _softmax(centroid, k) @ v  # equations 4-6
    return out


def improved(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    clusters: int,
    topk: int,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Section 3.3: a cluster's `topk` keys, of total mass m, are attended to exactly; the others keep A^c."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b, h, k, v in _heads(query, key, value, key_mask):
        for members in _clusters(assignment[b, h], clusters):
            out[b, h, members] = improved_attention(query[b, h, members], k, topk) @ v
    return out


def improved_attention(members: Tensor, key: Tensor, topk: int) -> Tensor:
    """The (members, S) attention of one cluster's members: equations 9-11."""
    centroid_attention = _softmax(members.mean(0, keepdim=True), key)[0]
    top = centroid_attention.detach().topk(min(topk, len(key))).indices
    mass = centroid_attention[top].sum()  # m_j: part of the function, never detached
    attention = centroid_attention.repeat(len(members), 1)
    attention[:, top] = mass * _softmax(members, key[top])
    return attention


def _softmax(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)


def _heads(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None):
    """Batch index, head index, and the keys and values that this head sees; heads that see none are left out."""
    for b in range(query.shape[0]):
        seen = slice(None) if key_mask is None else key_mask[b]
        for h in range(query.shape[1]):
            g = h // (query.shape[1] // key.shape[1])
            if len(key[b, g, seen]):
                yield b, h, key[b, g, seen], value[b, g, seen]


def _clusters(assignment: Tensor, clusters: int) -> list[Tensor]:
    """The members of every cluster that has any."""
    return [members for j in range(clusters) if len(members := torch.nonzero(assignment == j)[:, 0])]
