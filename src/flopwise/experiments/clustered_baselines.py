"""Training-free replacements for softmax attention that clustered attention is compared with, and the comparison.

All take (query, key, value), each (b, h, n, width) with one n, and give (b, h, n, width). They are written for a fair
cost: none builds an n x n matrix but `exact_top_keys`, which is there for its error, not its time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from flopwise.clustered_attention import clustered_attention
from flopwise.core.timing import take_turns
from flopwise.experiments.operators import Attention, forward, relative_error

SETTINGS = ((16, 32), (32, 0), (32, 32), (64, 32), (64, 64), (100, 64), (200, 64))  # clusters, top-k


def contenders() -> dict[str, Attention]:
    """Clustered attention in several settings, then the others; each of them costs less than softmax at some length."""
    return {
        **{f"clustered, C={c}, top-{k}": partial(clustered_attention, clusters=c, topk=k) for c, k in SETTINGS},
        **{f"local window {w} and 32 global": partial(local_and_global, window=w, first=32) for w in (64, 128)},
        **{f"Nystrom, {m} landmarks": partial(nystrom, landmarks=m) for m in (64, 128)},
        **{f"FAVOR+, {m} features": partial(favor, features=m) for m in (128, 256)},
        **{f"buckets of 64, {r} rounds": partial(buckets, size=64, rounds=r) for r in (2, 4)},
        "exact top-32": partial(exact_top_keys, topk=32),
    }


def compare(inputs: tuple[Tensor, Tensor, Tensor], *, rounds: int) -> list[dict[str, Any]]:
    """Each contender's forward time in turns, and its relative error, against `scaled_dot_product_attention`."""
    exact = scaled_dot_product_attention(*inputs)
    works = {name: partial(forward, attention, *inputs) for name, attention in contenders().items()}
    seconds = take_turns({"sdpa": partial(forward, scaled_dot_product_attention, *inputs), **works}, rounds)
    return [
        {
            "method": name,
            "milliseconds": 1e3 * seconds[name],
            "speedup": seconds["sdpa"] / seconds[name],
            "error": relative_error(work()[0], exact),
        }
        for name, work in works.items()
    ]


def local_and_global(query: Tensor, key: Tensor, value: Tensor, *, window: int, first: int) -> Tensor:
    """Every query sees the keys in its block of `window`, in the blocks beside it, and the `first` keys of the text.

    Source: Beltagy, Peters & Cohan 2020 (Longformer), with blocks for its sliding window.
    """
    batch, heads, length, width = query.shape
    blocks = -(-length // window)
    missing = blocks * window - length
    place = torch.arange(length, device=query.device)
    place = pad(place, (window, missing + window), value=-1).unfold(0, 3 * window, window)  # (blocks, 3 window)
    seen = torch.cat([place >= first, place.new_ones(blocks, first, dtype=torch.bool)], -1)[:, None]

    def beside(x: Tensor) -> Tensor:
        near = pad(x, (0, 0, window, missing + window)).unfold(2, 3 * window, window).mT
        return torch.cat([near, x[:, :, None, :first].expand(-1, -1, blocks, -1, -1)], 3)

    tiles = pad(query, (0, 0, 0, missing)).view(batch, heads, blocks, window, width)
    out = scaled_dot_product_attention(tiles, beside(key), beside(value), attn_mask=seen)
    return out.reshape(batch, heads, blocks * window, width)[:, :, :length]


def nystrom(query: Tensor, key: Tensor, value: Tensor, *, landmarks: int, iterations: int = 6) -> Tensor:
    """softmax(Q K'^T) softmax(Q' K'^T)^+ softmax(Q' K^T) V, Q' and K' means of segments, the inverse by Newton steps.

    Source: Xiong et al. 2021 (Nyströmformer), equations 13 and 14.
    """
    scale = query.shape[-1] ** -0.5
    q, k = (torch.nn.functional.adaptive_avg_pool2d(x, (landmarks, x.shape[-1])) for x in (query, key))
    middle = (q @ k.mT * scale).softmax(-1)
    inverse = middle.mT / (middle.sum(-1).amax(-1) * middle.sum(-2).amax(-1))[..., None, None]
    one = torch.eye(landmarks, device=query.device, dtype=query.dtype)
    for _ in range(iterations):
        step = middle @ inverse
        inverse = inverse @ (13 * one - step @ (15 * one - step @ (7 * one - step))) / 4
    summary = inverse @ scaled_dot_product_attention(q, key, value)
    return (query @ k.mT * scale).softmax(-1) @ summary


def favor(query: Tensor, key: Tensor, value: Tensor, *, features: int, seed: int = 0) -> Tensor:
    """Positive orthogonal random features for exp(q . k): FAVOR+.

    Source: Choromanski et al. 2021 (Performer).
    """
    width = query.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for _ in range(-(-features // width))]
    norms = torch.randn(features, width, generator=generator).norm(dim=-1)
    projection = (torch.cat(blocks, 1)[:, :features] * norms).to(query)

    def mapped(x: Tensor, over: tuple[int, ...]) -> Tensor:
        x = x * width**-0.25
        logits = x @ projection - x.square().sum(-1, keepdim=True) / 2
        return (logits - logits.amax(over, keepdim=True)).exp() + 1e-6

    q, k = mapped(query, (-1,)), mapped(key, (-1, -2))
    return q @ (k.mT @ value) / (q @ k.sum(-2)[..., None])


def buckets(query: Tensor, key: Tensor, value: Tensor, *, size: int, rounds: int, seed: int = 0) -> Tensor:
    """Queries and keys sorted by one random projection and cut into equal buckets; attention inside each.

    Several rounds are weighted by the mass that each found. Source: Daras et al. 2020 (SMYRF), whose transformation
    makes the largest inner products the smallest distances.
    """
    batch, heads, length, width = query.shape
    generator = torch.Generator().manual_seed(seed)
    count = length // size
    if count * size != length:
        raise ValueError(f"the length is a multiple of size; got {length} and {size}.")
    largest = query.norm(dim=-1).amax(-1) ** 2 + key.norm(dim=-1).amax(-1) ** 2
    lift = (largest[..., None, None] - query.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    drop = (largest[..., None, None] - key.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    lifted_query = torch.cat([query, torch.zeros_like(lift), lift], -1)
    lifted_key = torch.cat([key, drop, torch.zeros_like(drop)], -1)

    outs, masses = [], []
    for _ in range(rounds):
        direction = torch.randn(width + 2, generator=generator).to(query)
        order, key_order = ((x @ direction).argsort(-1) for x in (lifted_query, lifted_key))

        def bucketed(x: Tensor, order: Tensor) -> Tensor:
            return x.gather(2, order[..., None].expand_as(x)).view(batch, heads, count, size, width)

        logits = bucketed(query, order) @ bucketed(key, key_order).mT * width**-0.5
        back = order.argsort(-1)
        out = (logits.softmax(-1) @ bucketed(value, key_order)).view_as(query)
        outs.append(out.gather(2, back[..., None].expand_as(out)))
        masses.append(logits.logsumexp(-1).view(batch, heads, length).gather(2, back))
    weight = torch.stack(masses).softmax(0)[..., None]
    return (weight * torch.stack(outs)).sum(0)


def exact_top_keys(query: Tensor, key: Tensor, value: Tensor, *, topk: int) -> Tensor:
    """Every query's own `topk` keys and nothing else: what a perfect search for large logits would give."""
    logits = query @ key.mT * query.shape[-1] ** -0.5
    top = logits.topk(topk, -1)
    kept = torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)
    return kept.softmax(-1) @ value
