"""Clustered attention as a module."""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from flopwise.clustered_attention.clustering import Clustering
from flopwise.clustered_attention.functional import Backend, clustered_attention

# Activation checkpointing that keeps the clusters instead of finding them again; everything else is recomputed:
# `checkpoint(module, x, use_reentrant=False, context_fn=save_clusters)`
save_clusters = partial(create_selective_checkpoint_contexts, [torch.ops.flopwise.cluster.default])


class ClusteredAttention(nn.Module):
    """Multi-head attention whose softmax is computed once a cluster of queries; see `clustered_attention`.

    The clusters depend on `seed` and the queries alone, so a checkpointed forward finds the same ones when it is
    recomputed. It need not look for them: pass `context_fn=save_clusters` to `torch.utils.checkpoint.checkpoint`.

    Args:
        width: of the input and output.
        heads: query heads; `width` is a multiple of them.
        key_heads: fewer heads for keys and values (grouped queries); as many as `heads` by default.
        clusters, topk, clustering, seed, backend: as in `clustered_attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        clusters: int,
        topk: int = 32,
        clustering: Clustering = "kmeans",
        key_heads: int | None = None,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is a multiple of heads; got {width} and {heads}.")
        self.head_width = width // heads
        self.clusters, self.topk, self.seed = clusters, topk, seed
        self.clustering: Clustering = clustering
        self.backend: Backend = backend
        key_width = (key_heads or heads) * self.head_width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, key_width)
        self.value = nn.Linear(width, key_width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n width"],
        context: Float[Tensor, "b s width"] | None = None,
        *,
        key_mask: Bool[Tensor, "b s"] | None = None,
        query_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n width"]:
        """Attention of `x` to `context`, or to itself, where one mask alone stands for both."""
        if context is None:
            context = x
            key_mask = query_mask if key_mask is None else key_mask
            query_mask = key_mask if query_mask is None else query_mask
        out = clustered_attention(
            self._heads(self.query(x)),
            self._heads(self.key(context)),
            self._heads(self.value(context)),
            clusters=self.clusters,
            topk=self.topk,
            clustering=self.clustering,
            key_mask=key_mask,
            query_mask=query_mask,
            seed=self.seed,
            backend=self.backend,
        )
        return self.out(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b h n e"]:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"clusters={self.clusters}, topk={self.topk}, clustering={self.clustering!r}, backend={self.backend!r}"
