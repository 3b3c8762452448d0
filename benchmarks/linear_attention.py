"""Linear attention against `scaled_dot_product_attention`: time, error, memory, and what compiling costs.

    python benchmarks/linear_attention.py [speed memory warmup step]

One thread, one process, everything taking turns, medians of CPU time; 8 heads of width 64, float32, feature map and
normaliser included. Every row carries the error against float64 of the calls that are timed, and at what share of the
speed of a large matrix product in the same run it did its FLOPs. Appends to benchmarks/results/linear_attention.jsonl.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parts import run_parts
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flopwise.core.timing import take_turns
from flopwise.experiments.operators import (
    HEADS,
    WIDTH,
    Attention,
    flops,
    forward,
    forward_and_backward,
    noise,
    relative_error,
)
from flopwise.linear_attention import init_state, linear_attention, step

RESULTS = Path(__file__).parent / "results" / "linear_attention.jsonl"
ROUNDS = {512: 41, 1024: 21, 4096: 9, 8192: 5, 16384: 3}
FORWARD, BOTH = "forward", "forward and backward"
GOALS = {(BOTH, 512): 3.5, (BOTH, 4096): 17, (BOTH, 16384): 55, (FORWARD, 8192): 40}  # causal, numba: times SDPA
MEMORY_GOAL = 2000  # MB at 65536 positions


def relative_errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [relative_error(x, y) for x, y in zip(found, exact, strict=True)]


def speed() -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward, causal at every length and full at one."""
    torch.ones(2**23 - 2**16)  # freed at once: from then on the allocator keeps what is freed, as after a training step
    square = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    product = torch.empty_like(square)
    for causal, lengths in ((True, list(ROUNDS)), (False, [4096])):
        ways: dict[str, Attention] = {
            backend: partial(linear_attention, causal=causal, backend=backend) for backend in ("numba", "torch")
        }
        ways["sdpa"] = partial(scaled_dot_product_attention, is_causal=causal)
        for length in lengths:
            for direction, run in ((FORWARD, forward), (BOTH, forward_and_backward)):
                given = noise(length)
                timed = {name: partial(run, attention, *given) for name, attention in ways.items()}
                limit = partial(torch.mm, square, square, out=product)
                # a call before each: pages that SDPA freed cost ten times as much to map again as the way's own
                taken = take_turns({**timed, "matmul": limit}, ROUNDS[length], lead=1)
                found = {name: 1e3 * seconds for name, seconds in taken.items()}
                exact = run(partial(linear_attention, causal=causal, backend="torch"), *noise(length, torch.float64))
                fastest = 2 * 1024**3 / found["matmul"]
                for backend in ("numba", "torch"):
                    yield {
                        "kind": "speed",
                        "causal": causal,
                        "direction": direction,
                        "length": length,
                        "backend": backend,
                        "milliseconds": found[backend],
                        "sdpa_milliseconds": found["sdpa"],
                        "speedup": found["sdpa"] / found[backend],
                        "goal": GOALS.get((direction, length)) if causal and backend == "numba" else None,
                        "errors": relative_errors(timed[backend](), exact),
                        "gigaflops_per_second": flops(timed[backend]) / found[backend] / 1e6,
                        "matmul_gigaflops_per_second": fastest / 1e6,
                        "share_of_matmul": flops(timed[backend]) / found[backend] / fastest,
                    }


PEAK = """
import resource, sys, torch
from flopwise.linear_attention import linear_attention
torch.set_num_threads(1)
def run(length):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 8, length, 64, generator=generator).requires_grad_() for _ in range(3)]
    linear_attention(*tensors, causal=True, backend=sys.argv[2]).sum().backward()
run(16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(int(sys.argv[1]))
print(before / 1000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
"""


def memory() -> Iterator[dict[str, Any]]:
    """The process' peak for one forward and backward pass, causal: inputs, output and gradients are in it."""
    for backend in ("numba", "torch"):
        for length in (4096, 16384, 65536):
            command = [sys.executable, "-c", PEAK, str(length), backend]
            before, peak = map(
                float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            )
            yield {
                "kind": "memory",
                "backend": backend,
                "length": length,
                "peak_megabytes": peak,
                "of_the_library_alone": before,
                "goal": MEMORY_GOAL if length == 65536 else None,
            }


WARM_UP = """
import time
start = time.process_time()
import torch
with_torch = time.process_time()
torch.set_num_threads(1)
from flopwise.linear_attention import linear_attention
imported = time.process_time()
tensors = [torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(3)]
linear_attention(*tensors, causal=True).sum().backward()
first = time.process_time()
linear_attention(*tensors).sum().backward()
print(with_torch - start, imported - with_torch, first - imported, time.process_time() - first)
"""


def warmup() -> Iterator[dict[str, Any]]:
    """CPU seconds of the import and of the first calls: compiling, from the cache on disk, and without numba."""
    with tempfile.TemporaryDirectory() as cache:
        for name, program in (
            ("compiled", WARM_UP),
            ("cached", WARM_UP),
            (
                "without numba",
                "import sys; sys.modules['numba'] = None" + WARM_UP.replace("True)", "True, backend='torch')"),
            ),
        ):
            environment = os.environ | {"NUMBA_CACHE_DIR": cache}
            command = [sys.executable, "-c", program]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            of_torch, of_import, causal, full = map(float, done.stdout.split())
            yield {
                "kind": "warmup",
                "name": name,
                "import_torch_seconds": of_torch,
                "import_seconds": of_import,
                "first_causal_seconds": causal,
                "first_full_seconds": full,
            }


def one_step() -> Iterator[dict[str, Any]]:
    """One position of `step`, 8 heads of 64, after 1 and after any number of others: its state does not grow."""
    for batch in (1, 32):
        generator = torch.Generator().manual_seed(0)
        state = init_state(batch, HEADS, WIDTH, WIDTH)
        tensors = [torch.randn(batch, HEADS, WIDTH, generator=generator) for _ in range(3)]

        def hundred(state=state, tensors=tensors) -> None:
            with torch.inference_mode():
                for _ in range(100):
                    state, _ = step(state, *tensors)

        yield {"kind": "step", "batch": batch, "microseconds": 1e4 * take_turns({"step": hundred}, 21)["step"]}


PARTS = {"speed": speed, "memory": memory, "warmup": warmup, "step": one_step}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, RESULTS)
