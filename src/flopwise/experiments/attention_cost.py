"""What a training step of attention sampling costs, against networks over all pixels: processor time and memory."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flopwise.core.timing import take_turns
from flopwise.experiments.attention import Run, make_model
from flopwise.experiments.runner import run_all
from flopwise.models import GlimpseClassifier

BATCH = 8  # of attention sampling; the whole image goes one by one


@dataclass(frozen=True)
class Step:
    """What one training step costs; two with equal fields are the same."""

    method: str
    side: int
    kind: str = "cost"

    @property
    def name(self) -> str:
        return f"cost-{self.method}-side{self.side}"


def compare_steps(folder: Path, methods: Sequence[str], sides: Sequence[int]) -> None:
    """The cost of a step by every method at every side, in `folder`/records.jsonl; what is there is not run again."""
    for side in sides:
        for method in methods:  # one after the other: they are timed
            run_all([Step(method, side)], cost, folder, title=f"a step on {side} x {side} pixels")


def cost(step: Step, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """The record of a step: processor time, and what it adds to the process' memory. `checkpoint` is not used."""
    del checkpoint, progress
    return {
        "experiment": "attention",
        "kind": "cost",
        "method": step.method,
        "side": step.side,
        "milliseconds": milliseconds([step.method], step.side, rounds=3)[step.method],
        "megabytes": added_megabytes(step.method, step.side),
    }


def training_step(method: str, side: int) -> tuple[Callable[[], None], int]:
    """A whole training step on images that are in memory, low-resolution view and all; and how many images it takes.

    Args:
        side: of an image in pixels, a multiple of 8.
    """
    g = torch.Generator().manual_seed(0)
    model = make_model(Run(method, 0, 1.0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    images = BATCH if isinstance(model, GlimpseClassifier) else 1
    reduction = 8 if isinstance(model, GlimpseClassifier) else Run(method, 0, 1.0).reduction
    low = torch.rand(images, 1, side // reduction, side // reduction, generator=g)
    high = torch.rand(images, 1, side, side, generator=g) if isinstance(model, GlimpseClassifier) else None
    labels = torch.zeros(images, dtype=torch.long)

    def logits() -> Tensor:
        return model(low, high).logits if isinstance(model, GlimpseClassifier) else model(low)

    def step() -> None:
        cross_entropy(logits(), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, images


def milliseconds(methods: Sequence[str], side: int, rounds: int = 5) -> dict[str, float]:
    """CPU milliseconds of a training step for one image, the methods taking turns, as if each were in a training.

    A step right after another method's spends a seventh of its time on memory that the other has given back.
    """
    steps = {method: training_step(method, side) for method in methods}
    taken = take_turns({method: step for method, (step, _) in steps.items()}, rounds, lead=1)
    return {method: 1e3 * taken[method] / images for method, (_, images) in steps.items()}


def added_megabytes(method: str, side: int) -> float | None:
    """MB that a training step adds to a process for one image, at its peak; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    asked = [sys.executable, "-m", "flopwise.experiments.attention_cost", method, str(side)]
    return float(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)


def _print_added_megabytes(method: str, side: int) -> None:
    step, images = training_step(method, side)
    small, _ = training_step(method, 400)  # brings in what is paid once a process: code, threads, workspaces
    small()
    del small
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that the step has to ask for it again
    status = Path("/proc/self/status")

    def megabytes(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = megabytes("VmRSS")
    step()
    print((megabytes("VmHWM") - before) / images)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _print_added_megabytes(sys.argv[1], int(sys.argv[2]))
