"""Cheaper scores: what each costs, and what drawing by it is really worth, against exact gradient norms.

    python benchmarks/importance_cheap_scores.py [SETTING ...]      three to eight minutes a setting on one thread

The network of each setting of `flopwise.experiments.importance_settings` is trained uniformly with Adam, batch size and
rate in the middle of their grids, for the setting's whole budget. Along with it, on the same batches and at the same
rate, learn small networks (proxies; one of them on a reduced picture) and heads on its first layers (a truncated model;
the model is not changed). Scores remembered from the last time cost nothing. The model itself scores in bfloat16 and,
where it has no proxy, on half the resolution. At a quarter, a half and three quarters of the budget, for each:
R = (1 + c r + t) * variance(r) at its best r, c the cost of scoring and t that of training the scorer along, both
relative to training the model on one example. Appends one record a setting to
benchmarks/results/importance_cheap_scores.jsonl.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from flopwise import Ledger
from flopwise.experiments.importance import small_cnn
from flopwise.experiments.importance_settings import RATIO, SETTINGS, Setting, loss_per_example, passes, uniform_steps
from flopwise.experiments.runner import provenance
from flopwise.importance_sampling import cosine, gradient_norm_score, relative_variance, upper_bound_score
from flopwise.importance_sampling.gate import RATIOS

RESULTS = Path(__file__).parent / "results" / "importance_cheap_scores.jsonl"
MEASURED = 6000  # with 1200, R moves by 0.1 from one sample to the next
SHARES = (0.25, 0.5, 0.75)


class Exit(nn.Module):
    """A linear layer on the mean over squares of a model's first layers, whose gradient stops there."""

    def __init__(self, model: nn.Sequential, depth: int, channels: int) -> None:
        super().__init__()
        self.first = [model[:depth]]  # in a list: not its own
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, 10))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.first[0](x)
        return self.head(hidden)


class Itself(nn.Module):
    """The model itself, at less cost: nothing learns along."""

    def __init__(self, model: nn.Module, inputs: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.inputs, self.dtype = [model], inputs, dtype  # in a list: not its own

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.model[0](self.inputs(x)).float()


def scorers(setting: Setting, model: nn.Module) -> dict[str, nn.Module]:
    """The model's cheaper forms, and what learns along."""
    found: dict[str, nn.Module] = {"the model in bfloat16": Itself(model, lambda x: x, torch.bfloat16)}
    if setting.proxy:
        found["the setting's proxy"] = setting.proxy(0)
    else:  # convolutions, whatever the size
        found["the model on half the resolution"] = Itself(model, lambda x: avg_pool2d(x, 2))
    if isinstance(model, nn.Sequential):  # the small CNN
        found |= {
            "proxy of width 4 (the model: 24)": small_cnn(1, 4),
            "proxy of width 8": small_cnn(1, 8),
            "exit after convolution 1": Exit(model, 2, 24),
            "exit after convolution 2": Exit(model, 4, 48),
        }
    return found


def learning(scorers: dict[str, nn.Module]) -> list[nn.Module]:
    return [scorer for scorer in scorers.values() if not isinstance(scorer, Itself)]


def flops(work: Callable[[], Any]) -> int:
    with Ledger() as ledger:
        work()
    return ledger.flops


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return loss_per_example(outputs, (targets, targets, targets))


@torch.no_grad()
def scores_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    pieces = zip(x.split(100), y.split(100), strict=True)
    return torch.cat([upper_bound_score(model(inputs), targets, loss) for inputs, targets in pieces])


def measure(
    setting: Setting, model: nn.Module, beside: dict[str, nn.Module], x: Tensor, y: Tensor, remembered: Tensor
) -> dict[str, Any]:
    """c, t, the best r and R of every score, on one large batch."""
    model.eval()  # an example has no gradient of its own with batch statistics
    norms = gradient_norm_score(model, x, y, loss, chunk=8)
    batch_size, _ = setting.middle
    few, targets = x[:batch_size], y[:batch_size]

    def step(network: nn.Module) -> int:
        spent = flops(lambda: loss(network(few), targets).mean().backward())
        network.zero_grad()
        return spent

    rows: dict[str, tuple[Tensor, float, float]] = {
        "exact gradient norms, free": (norms, 0.0, 0.0),
        "remembered from the last time": (remembered, 0.0, 0.0),
    }
    for name, scorer in {"the model": model, **beside}.items():
        with torch.no_grad():
            scoring = flops(lambda scorer=scorer: scorer(few))
        training = step(model)
        t = step(scorer) / training if scorer in learning(beside) else 0.0
        rows[name] = (scores_of(scorer, x, y), scoring / training, t)
    model.train()
    found = {}
    for name, (score, c, t) in rows.items():
        at = {r: (1 + c * r + t) * relative_variance(score, r, norms=norms) for r in RATIOS if r <= RATIO}
        best = min(at, key=at.__getitem__)
        rank = torch.corrcoef(torch.stack([score, norms]).argsort(1).argsort(1).double())[0, 1]
        found[name] = {"c": c, "t": t, "rank_correlation": float(rank), "r": best, "R": at[best]}
        print(f"  {name:<32}" + "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()), flush=True)
    return {"tau2": float(norms.square().mean() / norms.mean() ** 2), "scores": found}


def main(name: str) -> None:
    setting = SETTINGS[name]
    data, model = setting.data(), setting.model(0)
    batch_size, rate = setting.middle
    beside = scorers(setting, model)
    optimizers = [torch.optim.Adam(module.parameters(), rate) for module in (model, *learning(beside))]
    remembered = torch.full((len(data.train_y),), float("nan"))
    steps, done = uniform_steps(setting), 0
    batches = iter(passes(setting, data, size=batch_size, seed=0))
    stages = []
    for share in SHARES:
        while done < share * steps:
            x, y, index = next(batches)
            outputs = model(x)
            remembered[index] = upper_bound_score(outputs, y, loss)
            loss(outputs, y).mean().backward()
            for scorer in learning(beside):
                loss(scorer(x), y).mean().backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate * cosine(done / steps)
                optimizer.step()
                optimizer.zero_grad()
            done += 1
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(len(data.train_y), generator=generator)[:MEASURED]
        scores = remembered[some].nan_to_num(float(remembered.nanmean()))
        print(f"{name}, {share:.0%} of the budget", flush=True)
        x, y = setting.inputs(data.train_x[some], generator), data.train_y[some]
        stages.append({"share": share, **measure(setting, model, beside, x, y, scores)})
    record = {"benchmark": "importance_cheap_scores", "setting": name, "rate": rate, "stages": stages}
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or SETTINGS:
        main(name)
