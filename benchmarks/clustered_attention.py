"""Clustered attention against `scaled_dot_product_attention`: time, error, and where it begins to pay.

    python benchmarks/clustered_attention.py [speed breakeven frontier]

One thread, one process, everything taking turns, medians of CPU time; 8 heads of width 64, float32, top-32, the default
clustering. Every row carries its error against softmax, on inputs with structure: on white noise nothing can win.
Appends to benchmarks/results/clustered_attention.jsonl.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parts import run_parts
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flopwise.clustered_attention import clustered_attention
from flopwise.core.timing import take_turns
from flopwise.experiments.clustered_baselines import compare
from flopwise.experiments.operators import Attention, forward, forward_and_backward, relative_error, structured

RESULTS = Path(__file__).parent / "results" / "clustered_attention.jsonl"
TOPK = 32
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
GOALS = {  # speedup over SDPA
    ("numba", 32, 8192, "forward"): 20,
    ("numba", 64, 8192, "forward"): 14,
    ("numba", 64, 8192, "forward and backward"): 22,
}
BREAKEVEN_GOALS = {"numba": 600, "torch": 1200}


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    return {name: 1e3 * seconds for name, seconds in take_turns(functions, rounds).items()}


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


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
            errors = {way: relative_error(attention(*tensors), exact) for way, attention in ways().items()}
            plain = {c: relative_error(clustered_attention(*tensors, clusters=c, topk=0), exact) for c in (32, 64)}
        for direction, run in work.items():
            timed = {str(way): partial(run, attention, *tensors) for way, attention in ways().items()}
            found = medians({"sdpa": partial(run, sdpa, *tensors), **timed}, rounds[direction])
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
            found = medians(
                {"sdpa": partial(forward, sdpa, *tensors), "ours": partial(forward, attention, *tensors)}, 21
            )
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
    for found in compare(structured(2048), rounds=9):
        yield {"kind": "frontier", "length": 2048, **found}


PARTS = {"speed": speed, "breakeven": breakeven, "frontier": frontier}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, RESULTS)
