"""Attention over clusters of queries: the function, and which kernels run it."""

from typing import Literal, NamedTuple, get_args

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flopwise.clustered_attention.clustering import Clustering, cluster
from flopwise.clustered_attention.kernels import numba as numba_kernels
from flopwise.clustered_attention.kernels import torch as torch_kernels
from flopwise.core.attention import check_attention, check_mask

Backend = Literal["auto", "torch", "numba"]


def clustered_attention(
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b g s e"],
    value: Float[Tensor, "b g s m"],
    *,
    clusters: int,
    topk: int = 32,
    clustering: Clustering = "kmeans",
    key_mask: Bool[Tensor, "b s"] | None = None,
    query_mask: Bool[Tensor, "b n"] | None = None,
    seed: int = 0,
    backend: Backend = "auto",
    scale: float | None = None,
) -> Float[Tensor, "b h n m"]:
    """softmax(Q K^T / sqrt(e)) V, computed once a cluster of queries instead of once a query.

        A^c = softmax(Q^c K^T / sqrt(e)),   Q^c_j the mean query of cluster j
        out_i = m_j sum_{t in top_j} softmax_{top_j}(q_i . k_t / sqrt(e)) v_t  +  sum_{t not in top_j} A^c_jt v_t

    for a query i of cluster j; top_j are the `topk` keys with the largest A^c_j, and m_j is what those add up to. Costs
    O(n clusters (e + m)) instead of O(n s (e + m)). Gradients are those of this function with clusters and top_j fixed.

    With `clusters >= n` or `topk >= s` nothing is left to approximate: this *is* `scaled_dot_product_attention`, and
    `chosen_backend` says so. A short text padded among long ones gets the same, to rounding: no text's result depends
    on its padding or on the others.

    Args:
        query: b texts, h heads, n queries of width e.
        key, value: s keys with g heads; query head i reads key head i // (h / g).
        clusters: how many, for each text and head.
        topk: keys of a cluster that its members attend to exactly; 0 is the paper's plain form.
        clustering: "kmeans" on the queries or the paper's "hamming" on their hashes; see `clustering`.
        key_mask: True = keep. Masked keys get no attention; a text without any key gets 0.
        query_mask: True = a query; padding joins no cluster and gets 0. Self-attention passes its mask twice: padding
            that joined clusters would move their centroids.
        seed: of the clustering, which is the same for the same seed and queries.
        backend: "torch" runs anywhere, "numba" on the CPU; "auto" takes the fastest that can run.
        scale: instead of 1 / sqrt(e).

    Raises:
        ValueError: shapes, masks or settings do not fit together.
        RuntimeError: `backend` cannot run here.

    Source: Vyas, Katharopoulos & Fleuret, NeurIPS 2020, sections 3.1 to 3.3. Departs from it in the clustering, and in
    the gradient of m_j, which the authors' code drops.
    """
    _check(query, key, value, key_mask, query_mask, clusters, topk, clustering)
    name, _ = chosen_backend(query, key, clusters=clusters, topk=topk, backend=backend)
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    if query_mask is not None:  # padding may hold anything, and 0 * nan is nan
        query = query.masked_fill(~query_mask[:, None, :, None], 0.0)
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
        # A softmax needs something to attend to: a text without keys attends to all of them, whose values are 0 now.
        key_mask = key_mask | ~key_mask.any(-1, keepdim=True)

    if name == "exact":
        grouped = query.shape[1] != key.shape[1]
        keep = None if key_mask is None else key_mask[:, None, None]
        out = scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=factor, enable_gqa=grouped)
    else:
        kernels = numba_kernels if name == "numba" else torch_kernels
        query = query.contiguous()  # once, for both steps
        assignment = cluster(query.detach(), query_mask, clusters, clustering, seed, name)
        out = kernels.attend(query, key, value, key_mask, assignment, clusters=clusters, topk=topk, scale=factor)

    return out if query_mask is None else out.masked_fill(~query_mask[:, None, :, None], 0.0)


class Choice(NamedTuple):
    """What runs, "exact", "torch" or "numba", and why."""

    name: str
    reason: str


def chosen_backend(query: Tensor, key: Tensor, *, clusters: int, topk: int = 32, backend: Backend = "auto") -> Choice:
    """What `clustered_attention` runs for these arguments, and why.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend that was asked for cannot run here; "auto" never raises.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is one of {', '.join(get_args(Backend))}; got {backend!r}.")
    if backend == "numba" and (obstacle := numba_kernels.obstacle(query)):
        raise RuntimeError(f"backend='numba' cannot run here: {obstacle} Or take backend='torch'.")
    length, source_length = query.shape[2], key.shape[2]
    if clusters >= length:
        return Choice("exact", "clusters >= number of queries: every query would be its own centroid")
    if topk >= source_length:
        return Choice("exact", "topk >= number of keys: every key would be attended to exactly")
    if backend != "auto":
        return Choice(backend, "asked for")
    obstacle = numba_kernels.obstacle(query)
    return Choice("torch", obstacle) if obstacle else Choice("numba", "on the CPU, the fastest")


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    clusters: int,
    topk: int,
    clustering: str,
) -> None:
    """Raise a ValueError that names the argument that does not fit."""
    check_attention(query, key, value)
    check_mask("key_mask", key_mask, len(query), key.shape[2])
    check_mask("query_mask", query_mask, len(query), query.shape[2])
    if clusters < 1:
        raise ValueError(f"clusters is at least 1; got {clusters}. For exact attention take as many as queries.")
    if topk < 0:
        raise ValueError(f"topk is at least 0, which is the plain form; got {topk}.")
    if clustering not in get_args(Clustering):
        raise ValueError(f"clustering is one of {', '.join(get_args(Clustering))}; got {clustering!r}.")
