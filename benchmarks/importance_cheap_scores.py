"""Cheaper scores: what each costs, and what drawing by it is really worth, against exact gradient norms.

    python benchmarks/importance_cheap_scores.py [PASSES]      about two minutes a pass on one thread

A small CNN is trained uniformly on augmented Fashion-MNIST, batches of 32, Adam. Along with it, on the same batches,
learn an exit head after its first or second convolution (a truncated model; the model is not changed) and two narrower
networks (proxies). Scores remembered from the last pass cost nothing. For each: R = (1 + c r + t) * variance(r) at its
best r, c the cost of scoring and t that of training the scorer, both relative to training the model on one example.
Appends one record to benchmarks/results/importance_cheap_scores.jsonl.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flopwise import Ledger
from flopwise.experiments.fashion_mnist import augment, load, normalise
from flopwise.experiments.importance import loss_per_example, small_cnn
from flopwise.experiments.runner import provenance
from flopwise.importance_sampling import gradient_norm_score, relative_variance, upper_bound_score
from flopwise.importance_sampling.gate import RATIOS

RESULTS = Path(__file__).parent / "results" / "importance_cheap_scores.jsonl"
BATCH, MEASURED = 32, 1200


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return loss_per_example(outputs, (None, targets))


def exit_head(channels: int, generator: torch.Generator) -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, 10))
    nn.init.normal_(head[2].weight, std=0.01, generator=generator)  # type: ignore[arg-type]
    nn.init.zeros_(head[2].bias)  # type: ignore[arg-type]
    return head


def flops(work: Callable[[], Any]) -> int:
    with Ledger() as ledger:
        work()
    return ledger.flops


def main(passes: int) -> None:
    torch.set_num_threads(1)
    images, _ = load()
    model = small_cnn(0)
    generator = torch.Generator().manual_seed(0)
    heads = {
        "exit after convolution 1": (2, exit_head(24, generator)),
        "exit after convolution 2": (4, exit_head(48, generator)),
    }
    proxies = {f"proxy of width {width}": small_cnn(1, width) for width in (4, 8)}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    beside = [*(head for _, head in heads.values()), *proxies.values()]
    beside_optimizer = torch.optim.Adam([p for module in beside for p in module.parameters()], 2e-3)
    remembered = torch.full((len(images),), float("nan"))

    def scorers(x: Tensor) -> dict[str, Callable[[], Tensor]]:
        return {"the model": lambda: model(x)} | {
            name: (lambda depth=depth, head=head: head(model[:depth](x))) for name, (depth, head) in heads.items()
        } | {name: (lambda proxy=proxy: proxy(x)) for name, proxy in proxies.items()}  # fmt: skip

    for _ in range(passes):
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            x, y = augment(normalise(images.pixels[index]), generator), images.labels[index]
            outputs = model(x)
            loss(outputs, y).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            remembered[index] = upper_bound_score(outputs, y, loss)
            total = torch.zeros(())
            for depth, head in heads.values():
                with torch.no_grad():
                    hidden = model[:depth](x)
                total = total + loss(head(hidden), y).mean()
            for proxy in proxies.values():
                total = total + loss(proxy(x), y).mean()
            total.backward()
            beside_optimizer.step()
            beside_optimizer.zero_grad()

    index = torch.randperm(len(images), generator=generator)[:MEASURED]
    x, y = augment(normalise(images.pixels[index]), generator), images.labels[index]
    norms = gradient_norm_score(model, x, y, loss, chunk=16)

    def spent(module: nn.Module, data: Tensor) -> int:
        return flops(lambda: loss(module(data), y[: len(data)]).mean().backward())

    step = spent(model, x[:BATCH])
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, outputs in scorers(x).items():
            rows[name] = {"scores": upper_bound_score(outputs(), y, loss), "c": 0.0, "t": 0.0}  # type: ignore[dict-item]
        for name, outputs in scorers(x[:BATCH]).items():
            rows[name]["c"] = flops(outputs) / step
    for name, (depth, head) in heads.items():
        hidden = model[:depth](x[:BATCH]).detach()
        rows[name]["t"] = spent(head, hidden) / step
    for name, proxy in proxies.items():
        rows[name]["t"] = spent(proxy, x[:BATCH]) / step
    rows["remembered from the last pass"] = {"scores": remembered[index], "c": 0.0, "t": 0.0}  # type: ignore[dict-item]
    rows["exact gradient norms, free"] = {"scores": norms, "c": 0.0, "t": 0.0}  # type: ignore[dict-item]

    found = {}
    for name, row in rows.items():
        scores: Any = row["scores"]
        at = {r: (1 + row["c"] * r + row["t"]) * relative_variance(scores, r, norms=norms) for r in RATIOS}
        best = min(at, key=at.__getitem__)
        rank = torch.corrcoef(torch.stack([scores, norms]).argsort(1).argsort(1).double())[0, 1]
        found[name] = {"c": row["c"], "t": row["t"], "rank correlation": float(rank), "r": best, "R": at[best]}
        found[name]["variance"] = relative_variance(scores, best, norms=norms)
        print(f"{name:<32}" + "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()), flush=True)
    tau2 = float(norms.square().mean() / norms.mean() ** 2)
    print(f"after {passes} passes; tau^2 of the exact norms {tau2:.2f}")
    record = {"benchmark": "importance_cheap_scores", "passes": passes, "tau2": tau2, "scores": found}
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
