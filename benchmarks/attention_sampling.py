"""What attention sampling costs, and how good its estimators are.

    python benchmarks/attention_sampling.py        one thread, one process, the sides of a ratio alternating, medians

Appends one record to benchmarks/results/attention_sampling.jsonl: the Monte Carlo table of the estimators, and CPU time
and added memory of one training step against convolutional networks on the whole image.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from flopwise.attention_sampling import expectation, sample
from flopwise.attention_sampling.expectation import WITH_REPLACEMENT
from flopwise.experiments.attention import ESTIMATORS, Run, make_model
from flopwise.experiments.runner import provenance
from flopwise.models import GlimpseClassifier

RESULTS = Path(__file__).parent / "results" / "attention_sampling.jsonl"
POSITIONS, SAMPLES, WIDTH, PEAKS, DRAWS = 2500, 10, 32, 5, 4000
SHARES = {"peaked": 0.9, "diffuse": 0.0}  # of the mass on the peaks
SIDES = (752, 1504, 3000)  # pixels, multiples of 8
WHOLE = ("cnn_1", "cnn_2", "cnn_4")
BATCH = 8  # of attention sampling; the whole image goes one by one
ROUNDS = 5


def monte_carlo(share: float) -> dict[str, dict[str, float]]:
    """Relative root mean square error of Phi, and relative mean square error of the gradient at the logits."""
    g = torch.Generator().manual_seed(0)
    a = torch.full((POSITIONS,), (1 - share) / POSITIONS, dtype=torch.float64)
    weights = 0.5 + torch.rand(PEAKS, generator=g, dtype=torch.float64)
    a[:PEAKS] += share * weights / weights.sum()
    log_a = a.log()
    features = normalize((1 + torch.randn(POSITIONS, WIDTH, generator=g, dtype=torch.float64)).relu(), dim=1)
    towards = 0.3 + torch.randn(WIDTH, generator=g, dtype=torch.float64)
    h = features @ towards
    phi, gradient = a @ features, a * (h - a @ h)
    found = {}
    for estimator in ESTIMATORS:
        errors, gradient_errors = [], []
        for _ in range(DRAWS // 500):
            logits = log_a.expand(500, -1).clone().requires_grad_()
            log_attention = logits.log_softmax(1)
            index = sample(log_attention, SAMPLES, replace=estimator in WITH_REPLACEMENT, generator=g)
            value = expectation(log_attention.gather(1, index), features[index], estimator=estimator)
            (at_logits,) = torch.autograd.grad((value @ towards).sum(), logits)
            errors.append((value.detach() - phi).square().sum(1))
            gradient_errors.append((at_logits - gradient).square().sum(1))
        found[estimator] = {
            "rmse": float((torch.cat(errors).mean() / phi.square().sum()).sqrt()),
            "gradient_mse": float(torch.cat(gradient_errors).mean() / gradient.square().sum()),
        }
    return found


def training_step(method: str, side: int) -> tuple[Callable[[], None], int]:
    """A whole training step on images that are in memory, low-resolution view and all; and how many images it takes."""
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


def times(side: int) -> dict[str, float]:
    """CPU milliseconds of a training step for one image: medians, the methods alternating."""
    steps = {method: training_step(method, side) for method in ("murthy", *WHOLE)}
    taken: dict[str, list[float]] = {method: [] for method in steps}
    for round_number in range(ROUNDS + 1):
        for method, (step, images) in steps.items():
            start = time.process_time()
            step()
            if round_number:  # the first warms up
                taken[method].append(1000 * (time.process_time() - start) / images)
    return {method: median(values) for method, values in taken.items()}


def added_memory(method: str, side: int) -> float:
    """MB that a training step adds to the process for one image, at its peak: in a process of its own."""
    asked = [sys.executable, __file__, "memory", method, str(side)]
    return float(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)


def print_added_memory(method: str, side: int) -> None:
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


def main() -> None:
    torch.set_num_threads(1)
    record: dict = {
        "benchmark": "attention_sampling",
        "estimators": {name: monte_carlo(share) for name, share in SHARES.items()},
        "step": {},
    }
    print(json.dumps(record["estimators"], indent=2), flush=True)
    for side in SIDES:
        milliseconds = times(side)
        megabytes = {method: added_memory(method, side) for method in milliseconds}
        record["step"][side] = {
            "ms": milliseconds,
            "mb": megabytes,
            "times_less_cpu": {m: milliseconds[m] / milliseconds["murthy"] for m in WHOLE},
            "times_less_memory": {m: megabytes[m] / megabytes["murthy"] for m in WHOLE},
        }
        print(side, json.dumps(record["step"][side], indent=2), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        torch.set_num_threads(1)
        print_added_memory(sys.argv[2], int(sys.argv[3]))
    else:
        main()
