"""What attention sampling costs, and how good its estimators are.

    python benchmarks/attention_sampling.py        one thread, one process, the sides of a ratio alternating, medians

Appends one record to benchmarks/results/attention_sampling.jsonl: the Monte Carlo table of the estimators, and CPU time
and added memory of one training step against convolutional networks on the whole image.
"""

import json
from pathlib import Path

import torch
from torch.nn.functional import normalize

from flopwise.attention_sampling import expectation, sample
from flopwise.attention_sampling.expectation import WITH_REPLACEMENT
from flopwise.experiments.attention import ESTIMATORS
from flopwise.experiments.attention_cost import added_megabytes, milliseconds
from flopwise.experiments.runner import provenance

RESULTS = Path(__file__).parent / "results" / "attention_sampling.jsonl"
POSITIONS, SAMPLES, WIDTH, PEAKS, DRAWS = 2500, 10, 32, 5, 4000
SHARES = {"peaked": 0.9, "diffuse": 0.0}  # of the mass on the peaks
SIDES = (752, 1504, 3000)  # pixels, multiples of 8
WHOLE = ("cnn_1", "cnn_2", "cnn_4", "lowres_4", "lowres_8")


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


def main() -> None:
    torch.set_num_threads(1)
    record: dict = {
        "benchmark": "attention_sampling",
        "estimators": {name: monte_carlo(share) for name, share in SHARES.items()},
        "step": {},
    }
    print(json.dumps(record["estimators"], indent=2), flush=True)
    for side in SIDES:
        times = milliseconds(("murthy", *WHOLE), side)
        megabytes = {method: added_megabytes(method, side) or float("nan") for method in times}
        record["step"][side] = {
            "ms": times,
            "mb": megabytes,
            "times_less_cpu": {m: times[m] / times["murthy"] for m in WHOLE},
            "times_less_memory": {m: megabytes[m] / megabytes["murthy"] for m in WHOLE},
        }
        print(side, json.dumps(record["step"][side], indent=2), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    main()
