"""Tokens per second of `LinearCausalLM` against the same model with softmax: with a key-value cache, and without.

    python benchmarks/linear_decoding.py        one thread, one process, alternating, medians of CPU time; ten minutes

256 wide, 8 layers, 8 heads, feed-forward 1024, vocabulary 256, float32, random weights, inference mode. A generation
of T tokens is timed at its positions: what a softmax step costs is smooth in the position, so the mean over Gauss'
points is the mean over all. Appends one record to benchmarks/results/linear_decoding.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flopwise.experiments.linear_baseline import CacheDecoder, SoftmaxCausalLM
from flopwise.experiments.runner import provenance
from flopwise.models import Decoder, LinearCausalLM
from flopwise.models.decoding import Packed

RESULTS = Path(__file__).parent / "results" / "linear_decoding.jsonl"
SIZE: dict[str, Any] = {"vocab_size": 256, "dim": 256, "depth": 8, "heads": 8, "ff": 1024}
LENGTHS = (784, 3072)
# Gauss-Legendre on [0, 1] with 4 points: exact for costs that are polynomials of degree 7 in the position
GAUSS = ((0.069432, 0.173927), (0.330009, 0.326073), (0.669991, 0.326073), (0.930568, 0.173927))
ROUNDS = {1: 15, 32: 5}
BURST = {1: 6, 32: 1}  # steps in a row, as in a generation, where weights are in the cache from the step before
SLICES = 8  # sequences of a batch without a cache that go through the model together, so that they stay in the cache


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def alternating(works: dict[str, Callable[[], object]], batch: int) -> dict[str, float]:
    """Median seconds of each, one after the other, round after round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS[batch]):
        for name, work in works.items():
            work()
            times[name].append(seconds(work, BURST[batch]))
    return {name: median(values) for name, values in times.items()}


def positions(length: int) -> list[int]:
    return [round(place * length) for place, _ in GAUSS]


def mean_over(length: int, at: dict[int, float]) -> float:
    return sum(weight * at[position] for position, (_, weight) in zip(positions(length), GAUSS, strict=True))


def linear_layers(packed: Packed, batch: int) -> Callable[[], None]:
    """The matrix products of a step and nothing else, with torch."""
    matrices = (packed.project, packed.out, packed.up, packed.down)
    pairs = [
        (matrix, torch.ones(batch, matrix.values.shape[2]), torch.empty(batch, matrix.rows)) for matrix in matrices
    ]

    def work() -> None:
        for layer in range(len(packed.project.values)):
            for matrix, x, out in pairs:
                matrix.multiply(layer, x, out)

    return work


def gemv(packed: Packed) -> Callable[[], None]:
    """The same for one sequence, with the kernel that `stack` uses."""
    from flopwise.models.kernels.numba import multiply

    calls = [
        (
            *(part[layer].numpy() for part in (matrix.values, matrix.scale, matrix.bias)),
            *(torch.ones(1, n).numpy() for n in (matrix.values.shape[2], matrix.rows)),
            False,
        )
        for layer in range(len(packed.project.values))
        for matrix in (packed.project, packed.out, packed.up, packed.down)
    ]

    def work() -> None:
        for arguments in calls:
            multiply(*arguments)

    return work


def decode(linear: LinearCausalLM, softmax: SoftmaxCausalLM, batch: int) -> dict:
    """Milliseconds a step and tokens a second, with every baseline."""
    ids = torch.zeros(batch, dtype=torch.int64)
    decoders: dict[str, Decoder] = {"linear": linear.decoder(batch)}
    if batch == 1:
        decoders["linear, int8"] = linear.decoder(batch, weights="int8")
    places = sorted({position for length in LENGTHS for position in positions(length)})
    cache = CacheDecoder(softmax, batch, max(LENGTHS))
    packed = decoders["linear"]._packed

    def cached(position: int) -> Callable[[], object]:
        def work() -> object:
            cache.position = position
            return cache.step(ids)

        return work

    works: dict[str, Callable[[], object]] = {}
    for position in places:  # linear steps between those of the cache, so that all see the same machine
        works |= {f"{name} {position}": lambda d=d: d.step(ids) for name, d in decoders.items()}
        works[f"cache {position}"] = cached(position)
    works["products"] = linear_layers(packed, batch)
    if batch == 1:
        works["gemv"] = gemv(packed)
        works["gemv, int8"] = gemv(decoders["linear, int8"]._packed)
    times = alternating(works, batch)

    def of(name: str) -> dict[int, float]:
        return {position: times[f"{name} {position}"] for position in places}

    step = {name: median(of(name).values()) for name in decoders}
    result: dict = {
        "batch": batch,
        "backend": decoders["linear"].backend,
        "step_ms": {name: 1e3 * value for name, value in step.items()},
        "products_ms": 1e3 * times["products"],
        "products_gflops": 2e-9 * batch * sum(m.numel() for m in _matrices(packed)) / times["products"],
        "by_position": {
            name: [{"position": p, "tokens_per_second": batch / t} for p, t in of(name).items()]
            for name in (*decoders, "cache")
        },
        "lengths": [],
    }
    if batch == 1:
        megabytes = 4e-6 * sum(m.numel() for m in _matrices(packed))
        result |= {
            "weights_mb": megabytes,
            "gemv_gb_per_s": 1e-3 * megabytes / times["gemv"],
            "share_of_gemv": times["gemv"] / step["linear"],
            "share_of_gemv_int8": times["gemv, int8"] / step["linear, int8"],
            "int8_gain": step["linear"] / step["linear, int8"],
        }
    else:
        result["share_of_products"] = times["products"] / step["linear"]
    for length in LENGTHS:
        with_cache = mean_over(length, of("cache"))
        without = mean_over(length, {position: no_cache(softmax, batch, position) for position in positions(length)})
        row = {
            "length": length,
            "tokens_per_second": {name: batch / value for name, value in step.items()}
            | {"cache": batch / with_cache, "no cache": batch / without},
            "gain over cache": {name: with_cache / value for name, value in step.items()},
            "gain over no cache": {name: without / value for name, value in step.items()},
        }
        print(json.dumps({"batch": batch, **row}), flush=True)
        result["lengths"].append(row)
    return result


def no_cache(model: SoftmaxCausalLM, batch: int, position: int) -> float:
    """Seconds for one more token when everything before is computed anew; the logits of the last position only."""
    ids = torch.zeros(min(batch, SLICES), position + 1, dtype=torch.int64)

    def work() -> None:
        x, _ = model._blocks(ids, None, None)
        model.head(model.norm(x[:, -1]))

    rounds = 3 if batch == 1 else 1
    return median(seconds(work) for _ in range(rounds)) * batch / len(ids)


def _matrices(packed: Packed) -> list[torch.Tensor]:
    return [matrix.values for matrix in (packed.project, packed.out, packed.up, packed.down)]


def warm_up() -> dict[str, float]:
    """Seconds of the first step in a new process: compiled, then from numba's cache on disk, and without numba."""
    code = """
import time, torch
from flopwise.models import LinearCausalLM
model = LinearCausalLM(256)
start = time.perf_counter()
model.decoder(backend={backend!r}).step(torch.tensor([0]))
print(time.perf_counter() - start)
"""
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, backend in (("compiling", "numba"), ("cached", "numba"), ("torch", "torch")):
            environment = os.environ | {"NUMBA_CACHE_DIR": folder}
            command = [sys.executable, "-c", code.format(backend=backend)]
            taken[name] = float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    return taken


def main() -> None:
    torch.set_num_threads(1)
    linear, softmax = LinearCausalLM(**SIZE), SoftmaxCausalLM(**SIZE)
    record = {"benchmark": "linear_decoding", "size": SIZE, "threads": 1, "first_step_seconds": warm_up()}
    with torch.inference_mode():
        record["batches"] = [decode(linear, softmax, batch) for batch in (1, 32)]
    print(json.dumps(record, indent=2))
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    main()
