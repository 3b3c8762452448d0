"""What importance sampling and its ledger cost, and how much of the possible gain the score keeps.

    make bench        one thread, one process, the two sides of a ratio alternating, medians of CPU time

Appends one record to benchmarks/results/importance_sampling.jsonl, from which the README's table is made.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from flopwise import ImportanceSampler, Ledger
from flopwise.core.batch import Examples
from flopwise.core.timing import cpu_seconds
from flopwise.experiments.fashion_mnist import Augmented, Images, load
from flopwise.experiments.importance import loss_per_example, small_cnn
from flopwise.experiments.runner import provenance
from flopwise.importance_sampling import gradient_norm_score, loss_score, relative_variance, upper_bound_score
from flopwise.importance_sampling.sampler import LEARNED_EACH

RESULTS = Path(__file__).parent / "results" / "importance_sampling.jsonl"
BATCH, RATIO = 64, 6  # the default batch size
ROUNDS, STEPS = 25, 48


class Fixed:
    """Presamples made beforehand: what is timed is the loop, not the augmentation."""

    def __init__(self, images: Images, size: int, count: int) -> None:
        loader = iter(Augmented(images, size=size, seed=0))
        self.presamples = [next(loader) for _ in range(count)]

    def __iter__(self):
        return iter(self.presamples)


def ratio_of(one: Callable[[], None], other: Callable[[], None]) -> float:
    """Median over rounds of the CPU time of `one` over that of `other`, alternating."""
    ratios = []
    for _ in range(ROUNDS):
        ratios.append(cpu_seconds(one) / cpu_seconds(other))
    return median(ratios)


def main() -> None:
    torch.set_num_threads(1)
    train_set, _ = load()
    model = small_cnn(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def forward(data):
        return model(data[0])

    def make_sampler(gate) -> ImportanceSampler:
        return ImportanceSampler(forward, loss_per_example, batch_size=BATCH, gate=gate)

    presamples = Fixed(train_set, BATCH * RATIO, STEPS // RATIO)
    batches = [(x[a : a + BATCH], y[a : a + BATCH]) for x, y in presamples for a in range(0, BATCH * RATIO, BATCH)]

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> None:
        for data in batches:
            step(loss_per_example(forward(data), data).mean())

    def sampled(sampler: ImportanceSampler) -> Callable[[], None]:
        def loop() -> None:
            for batch in sampler.batches(presamples):
                step(sampler.loss(forward(batch.data), batch))

        return loop

    ledger = Ledger()

    def counted() -> None:
        with ledger:
            for data in ledger.batches(batches):
                step(loss_per_example(forward(data), data).mean())

    never, off = make_sampler("never"), make_sampler("auto")
    off._gate.decide = lambda *_: None  # measures scores and costs as ever, and stays off  # type: ignore[method-assign]
    selecting = make_sampler("always")

    def score() -> None:
        for presample in presamples:
            selecting._score(Examples(presample))

    def plain_forward() -> None:
        with torch.no_grad():
            for presample in presamples:
                forward(presample)

    def select() -> None:
        for presample in presamples:
            selecting.select(presample)

    for work in (plain, sampled(never), sampled(off), counted, score, select, plain_forward):
        work()  # warm up, and count FLOPs
    while off._gate.updates < LEARNED_EACH:
        sampled(off)()
    figures = {
        "scoring over the plain forward": ratio_of(score, plain_forward),
        "scoring, drawing and the gate over the plain forward": ratio_of(select, plain_forward),
        "batches, gate never, over a plain loop": ratio_of(sampled(never), plain),
        "batches, gate auto but off, over a plain loop": ratio_of(sampled(off), plain),
        "a loop in a ledger over a plain loop": ratio_of(counted, plain),
        "a plain loop over itself (the noise)": ratio_of(plain, plain),
    }

    model, quality = small_cnn(0), {}
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    one_pass = iter(Augmented(train_set, size=BATCH, seed=0))
    for _ in range(len(train_set) // BATCH):
        data = next(one_pass)
        step(loss_per_example(forward(data), data).mean())
    x, y = next(iter(Augmented(train_set, size=3000, seed=1)))

    def loss(outputs, targets):
        return loss_per_example(outputs, (None, targets))

    norms = gradient_norm_score(model, x, y, loss, chunk=16)
    with torch.no_grad():
        outputs = model(x)
    exact = 1 - relative_variance(norms, RATIO)
    for name, score_of in (("upper bound", upper_bound_score), ("loss", loss_score)):
        scores = score_of(outputs, y, loss)
        quality[name] = {
            "variance reduction kept": (1 - relative_variance(scores, RATIO, norms=norms)) / exact,
            "reduction": 1 - relative_variance(scores, RATIO, norms=norms),
            "claimed reduction": 1 - relative_variance(scores, RATIO),
        }
    quality["exact gradient norm"] = {"reduction": exact}

    record = {"benchmark": "importance_sampling", "overhead": figures, "score quality after one epoch": quality}
    print(json.dumps(record, indent=2))
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    main()
