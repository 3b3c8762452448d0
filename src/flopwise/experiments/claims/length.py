"""Claim 3: the cost of linear attention is linear in the length of the sequence."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch.nn.functional import scaled_dot_product_attention

from flopwise.core.timing import take_turns
from flopwise.experiments.claims.claim import Claim, Judgement, of_kind
from flopwise.experiments.operators import forward_and_backward, noise
from flopwise.experiments.runner import Record, run_all
from flopwise.linear_attention import chosen_backend, linear_attention

SHORTEST = 512
LONGEST = {False: 4096, True: 16384}


@dataclass(frozen=True)
class Run:
    """Lengths from `SHORTEST` on, each twice the last; two runs with equal fields are the same run."""

    longest: int
    kind: str = "length"

    @property
    def name(self) -> str:
        return f"length-{self.longest}"

    @property
    def lengths(self) -> list[int]:
        return [SHORTEST * 2**i for i in range((self.longest // SHORTEST).bit_length())]


def run(folder: Path, full: bool) -> None:
    run_all([Run(LONGEST[full])], measure, folder, title="attention at several lengths")


def measure(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Milliseconds of a causal forward and backward pass, 8 heads of 64, at each length. `checkpoint` is not used."""
    del checkpoint
    ways = {
        "linear": partial(linear_attention, causal=True),
        "softmax": partial(scaled_dot_product_attention, is_causal=True),
    }
    found = []
    for count, length in enumerate(run.lengths):
        progress(count / len(run.lengths))
        given = noise(length)
        works = {name: partial(forward_and_backward, attention, *given) for name, attention in ways.items()}
        seconds = take_turns(works, rounds=max(3, 8192 // length))
        found.append({"length": length, **{name: 1e3 * seconds[name] for name in ways}})
    return {
        "experiment": "linear",
        "kind": "length",
        "backend": chosen_backend(noise(1)[0]).name,
        "lengths": found,
        "exponents": {name: exponent([(row["length"], row[name]) for row in found]) for name in ways},
    }


def exponent(costs: Sequence[tuple[float, float]]) -> float:
    """p of cost = length^p: the slope of a straight line through the logarithms, by least squares."""
    x, y = ([math.log(pair[i]) for pair in costs] for i in (0, 1))
    centre = fmean(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def judge(records: Sequence[Record]) -> Judgement:
    newest = of_kind(records, "linear", "length")[-1]
    linear, softmax = newest["exponents"]["linear"], newest["exponents"]["softmax"]
    last = newest["lengths"][-1]
    ours = (
        f"time grows as length^{linear:.2f}, softmax' as length^{softmax:.2f}; "
        f"{last['softmax'] / last['linear']:.1f} × as fast at {last['length']} positions, forward and backward"
    )
    why = f"from {newest['lengths'][0]['length']} to {last['length']} positions, kernels in {newest['backend']}"
    good = linear <= 1.15, softmax >= 1.6
    return Judgement("reproduced" if all(good) else "in part" if good[0] else "not reproduced", ours, why)


CLAIM = Claim(
    name="length",
    number=3,
    statement="Linear attention costs time that grows linearly with the length.",
    paper="O(N) where softmax attention is O(N²) (ICML 2020)",
    baseline="torch's scaled_dot_product_attention: a fused kernel, whose memory is linear, too",
    budget=("causal, forward and backward, one thread, up to 4096 positions", "the same, up to 16,384 positions"),
    rule="a fit of time = length^p gives p of at most 1.15, and for softmax of at least 1.6",
    limits="Sequences of a few hundred tokens, or a model that was trained with softmax.",
    run=run,
    judge=judge,
)
