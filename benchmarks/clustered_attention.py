"""Clustered attention against `scaled_dot_product_attention`: time, error, and where it begins to pay.

    python benchmarks/clustered_attention.py [speed breakeven frontier]

One thread, one process, everything taking turns, medians of CPU time; 8 heads of width 64, float32, top-32, the default
clustering. Every row carries its error against softmax, on inputs with structure: on white noise nothing can win.
Appends to benchmarks/results/clustered_attention.jsonl.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from clustered_baselines import buckets, exact_top_keys, favor, local_and_global, nystrom
from parts import run_parts
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flopwise.clustered_attention import clustered_attention

RESULTS = Path(__file__).parent / "results" / "clustered_attention.jsonl"
HEADS, WIDTH, TOPK = 8, 64, 32
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
GOALS = {  # speedup over SDPA
    ("numba", 32, 8192, "forward"): 20,
    ("numba", 64, 8192, "forward"): 14,
    ("numba", 64, 8192, "forward and backward"): 22,
}
BREAKEVEN_GOALS = {"numba": 600, "torch": 1200}

Attention = Callable[..., Tensor]


def structured(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: 60 planted centres in random order, plus a smooth path of rank 8, plus a little noise.

    Queries and keys share the centres, so that attention has somewhere to go: about half of it to the nearest centre.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency, time_ = torch.arange(1, 9), torch.linspace(0, 1, length)
    centre = torch.randn(HEADS, 60, WIDTH, generator=generator)

    def one() -> Tensor:
        phase = torch.rand(HEADS, 8, 1, generator=generator)
        path = (2 * torch.pi * (frequency[:, None] * time_ + phase)).sin()
        smooth = path.mT @ torch.randn(HEADS, 8, WIDTH, generator=generator) / 6
        which = torch.randint(60, (HEADS, length, 1), generator=generator).expand(-1, -1, WIDTH)
        noise = torch.randn(HEADS, length, WIDTH, generator=generator)
        return (centre.gather(1, which) + smooth + noise / 5)[None]

    return one() / 2, one(), one()


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each, all of them taking turns after one call that warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_:
                times[name].append(1000 * (time.process_time() - start))
    return {name: median(each) for name, each in times.items()}


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


def error(out: Tensor, exact: Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


def forward(attention: Attention, tensors: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        attention(*tensors)


def forward_and_backward(attention: Attention, tensors: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(attention(*tensors), tensors, grad)


def ways(clusters: tuple[int, ...] = (32, 64)) -> dict[tuple[str, int], Attention]:
    return {
        (backend, c): partial(clustered_attention, clusters=c, topk=TOPK, backend=backend)
        for backend in ("numba", "torch")
        for c in clusters
    }


def speed() -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward, at every length."""
    for length in LENGTHS:
        tensors = tuple(x.requires_grad_() for x in structured(length))
        grad = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(1))
        work = {"forward": forward, "forward and backward": partial(forward_and_backward, grad=grad)}
        rounds = {"forward": max(5, 20480 // length), "forward and backward": max(3, 10240 // length)}
        with torch.no_grad():
            exact = sdpa(*tensors)
            errors = {way: error(attention(*tensors), exact) for way, attention in ways().items()}
            plain = {c: error(clustered_attention(*tensors, clusters=c, topk=0), exact) for c in (32, 64)}
        for direction, run in work.items():
            timed = {str(way): partial(run, attention, tensors) for way, attention in ways().items()}
            found = medians({"sdpa": partial(run, sdpa, tensors), **timed}, rounds[direction])
            for backend, clusters in ways():
                milliseconds = found[str((backend, clusters))]
                yield {
                    "kind": "speed",
                    "direction": direction,
                    "length": length,
                    "clusters": clusters,
                    "backend": backend,
                    "milliseconds": milliseconds,
                    "sdpa_milliseconds": found["sdpa"],
                    "speedup": found["sdpa"] / milliseconds,
                    "goal": GOALS.get((backend, clusters, length, direction)),
                    "error": errors[backend, clusters],
                    "plain_error": plain[clusters],
                }


def breakeven() -> Iterator[dict[str, Any]]:
    """The length from which on the forward pass is faster than SDPA's, the two taking turns.

    Measured every 32 positions; between the last that is slower and the next, on a straight line.
    """
    for (backend, clusters), attention in ways().items():
        speedups = {}
        for length in range(384, 1601, 32):
            tensors = structured(length)
            found = medians({"sdpa": partial(forward, sdpa, tensors), "ours": partial(forward, attention, tensors)}, 21)
            speedups[length] = found["sdpa"] / found["ours"]
        slower = max((length for length, speedup in speedups.items() if speedup < 1), default=352)
        before, after = speedups.get(slower, 1.0), speedups.get(slower + 32, float("nan"))
        yield {
            "kind": "breakeven",
            "clusters": clusters,
            "backend": backend,
            "length": slower + 32 * (1 - before) / (after - before),
            "goal": BREAKEVEN_GOALS[backend] if clusters == 32 else None,
            "speedups": speedups,
        }


def frontier() -> Iterator[dict[str, Any]]:
    """Error against time for what else needs no training, at 2048 positions."""
    tensors = structured(2048)
    candidates: dict[str, Attention] = {
        **{f"clustered, C={c}, top-{k}": partial(clustered_attention, clusters=c, topk=k) for c, k in SETTINGS},
        **{f"local window {w} and 32 global": partial(local_and_global, window=w, first=32) for w in (64, 128)},
        **{f"Nystrom, {m} landmarks": partial(nystrom, landmarks=m) for m in (64, 128)},
        **{f"FAVOR+, {m} features": partial(favor, features=m) for m in (128, 256)},
        **{f"buckets of 64, {r} rounds": partial(buckets, size=64, rounds=r) for r in (2, 4)},
        "exact top-32": partial(exact_top_keys, topk=32),
    }
    exact = sdpa(*tensors)
    timed = {name: partial(forward, attention, tensors) for name, attention in candidates.items()}
    found = medians({"sdpa": partial(forward, sdpa, tensors), **timed}, 9)
    for name, attention in candidates.items():
        yield {
            "kind": "frontier",
            "length": 2048,
            "method": name,
            "milliseconds": found[name],
            "speedup": found["sdpa"] / found[name],
            "error": error(attention(*tensors), exact),
        }


SETTINGS = ((16, 32), (32, 0), (32, 32), (64, 32), (64, 64), (100, 64), (200, 64))
PARTS = {"speed": speed, "breakeven": breakeven, "frontier": frontier}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, RESULTS)
