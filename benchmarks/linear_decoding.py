"""Tokens per second of `LinearCausalLM` against the same model with softmax: with a key-value cache, and without.

The cache is there twice: tuned like our own decoder ("cache"), and as one writes it with torch's modules ("modules").

    python benchmarks/linear_decoding.py        one thread, one process, alternating, medians of CPU time; two minutes

256 wide, 8 layers, 8 heads, feed-forward 1024, vocabulary 256, float32, random weights, inference mode; beside the
speeds stand those of the matrices alone, which bound them, and what int8 costs the shipped digit model. Appends one
record to benchmarks/results/linear_decoding.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch

from flopwise.core.timing import Work
from flopwise.experiments import digits
from flopwise.experiments.linear import bits_decoded, shipped
from flopwise.experiments.linear_baseline import SoftmaxCausalLM
from flopwise.experiments.linear_speed import measure
from flopwise.experiments.runner import provenance
from flopwise.models import LinearCausalLM
from flopwise.models.decoding import Matrix, Packed, Weights, pack, pieces

RESULTS = Path(__file__).parent / "results" / "linear_decoding.jsonl"
SIZE: dict[str, Any] = {"vocab_size": 256, "dim": 256, "depth": 8, "heads": 8, "ff": 1024}
LENGTHS = (784, 3072)
ROUNDS = {1: 15, 32: 5}
BURST = {1: 6, 32: 1}


def matrices(packed: Packed) -> list[Matrix]:
    return [packed.project, packed.out, packed.up, packed.down]


def products(packed: Packed, batch: int) -> Work:
    """The matrix products of a step and nothing else, with torch."""
    pairs = [(m, torch.ones(batch, m.values.shape[2]), pieces(torch.empty(batch, m.rows))) for m in matrices(packed)]

    def work() -> None:
        for layer in range(len(packed.project.values)):
            for matrix, x, out in pairs:
                matrix.multiply(layer, x, out)

    return work


def gemv(packed: Packed) -> Work:
    """The same for one sequence, with the kernel that `stack` uses."""
    from flopwise.models.kernels.numba import multiply

    calls = [
        (
            *(part[layer].numpy() for part in (m.values, m.scale, m.bias)),
            *(torch.ones(1, n).numpy() for n in (m.values.shape[2], m.rows)),
            False,
        )
        for layer in range(len(packed.project.values))
        for m in matrices(packed)
    ]

    def work() -> None:
        for arguments in calls:
            multiply(*arguments)

    return work


def decode(linear: LinearCausalLM, softmax: SoftmaxCausalLM, batch: int) -> dict[str, Any]:
    """Speeds, and the shares of what the matrices alone allow."""
    packed: dict[Weights, Packed] = {weights: pack(linear, weights) for weights in ("float32", "int8")}
    if batch == 1:
        beside = {f"matrices, {weights}": gemv(weights_packed) for weights, weights_packed in packed.items()}
    else:
        beside = {"matrices, float32": products(packed["float32"], batch)}
    result = measure(
        linear, softmax, batch=batch, lengths=LENGTHS, rounds=ROUNDS[batch], burst=BURST[batch], beside=beside
    )
    numbers = sum(m.values.numel() for m in matrices(packed["float32"]))
    step, alone = result["step_ms"], result["beside_ms"]
    result["matrices_gflops"] = 2e-6 * batch * numbers / alone["matrices, float32"]
    result["share_of_matrices"] = {"linear": alone["matrices, float32"] / step["linear"]}
    if batch == 1:
        result["matrices_gb_per_s"] = 4e-6 * numbers / alone["matrices, float32"]
        result["share_of_matrices"]["linear, int8"] = alone["matrices, int8"] / step["linear, int8"]
        result["int8_gain"] = step["linear"] / step["linear, int8"]
    return result


def warm_up() -> dict[str, float]:
    """Seconds of the first step in a new process: compiled, then from numba's cache on disk, and without numba."""
    code = """
import time, torch
from flopwise.models import LinearCausalLM
decoder = LinearCausalLM(256).decoder(backend="torch")
start = time.perf_counter()
LinearCausalLM(256).decoder(backend={backend!r}).step(torch.tensor([0]))
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
    record: dict[str, Any] = {"benchmark": "linear_decoding", "size": SIZE, "threads": 1}
    record["first_step_seconds"] = warm_up()
    held_out = digits.load()[1][::10].long()
    trained = shipped("digits")
    record["bits_per_pixel"] = {weights: bits_decoded(trained, held_out, weights) for weights in get_args(Weights)}
    record["batches"] = [decode(linear, softmax, batch) for batch in (1, 32)]
    print(json.dumps(record, indent=2))
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    main()
