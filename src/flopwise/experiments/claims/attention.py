"""Claim 2: attention sampling's fraction of compute and memory, from image-level labels alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from flopwise.experiments import attention
from flopwise.experiments.attention_cost import compare_steps
from flopwise.experiments.attention_demo import METHOD, show_glimpses
from flopwise.experiments.claims.claim import Claim, Judgement, of_kind
from flopwise.experiments.runner import Record

QUICK = replace(attention.QUICK, seconds=90.0, methods=(METHOD, "lowres_8"))
FULL = attention.FULL
ALL_PIXELS = "cnn_1"
NEAR_CHANCE = 0.8  # a baseline with a larger error has hardly learned: beating it shows nothing
SIDES = {False: (1504,), True: (752, 1504, 3000)}


def run(folder: Path, full: bool) -> None:
    plan = FULL if full else QUICK
    compare_steps(folder, (METHOD, ALL_PIXELS), SIDES[full])
    attention.compare(plan, folder)
    show_glimpses(folder, side=plan.side)


def judge(records: Sequence[Record]) -> Judgement:
    """Steps at the largest side that was timed; errors of the newest budget."""
    costs = {(r["method"], r["side"]): r for r in of_kind(records, "attention", "cost")}
    side = max(side for _, side in costs)
    ours, theirs = costs[METHOD, side], costs[ALL_PIXELS, side]
    less = [theirs[key] / ours[key] for key in ("milliseconds", "megabytes") if ours[key] and theirs[key]]
    runs = of_kind(records, "attention", "run")
    runs = [r for r in runs if all(r[key] == runs[-1][key] for key in ("budget", "data"))]
    errors = {
        method: fmean(r["test_error"] for r in runs if r["method"] == method) for method in {r["method"] for r in runs}
    }
    best = min((method for method in errors if method in attention.REDUCED), key=lambda method: errors[method])
    seconds = runs[-1]["budget"]["seconds"]
    memory = f" and {less[1]:.0f} × less memory" if len(less) > 1 else ""
    text = (
        f"a step on {side} × {side} pixels takes {less[0]:.0f} × less processor time{memory} than the same layers on "
        f"all pixels; after {seconds:g} s of training it misses {100 * errors[METHOD]:.1f} % of test images, the best "
        f"network on the whole image {100 * errors[best]:.1f} % (chance 90 %)"
    )
    cheaper, better = min(less) >= 10, errors[METHOD] < errors[best]
    lower = f"error {'' if better else 'not '}below the best on the whole image"
    why = f"cost {'' if cheaper else 'not '}below a tenth; {lower}"
    if errors[best] > NEAR_CHANCE:
        better, why = False, f"{why}, which is near chance: this budget says nothing about equal accuracy"
    return Judgement("reproduced" if cheaper and better else "in part" if cheaper else "not reproduced", text, why)


CLAIM = Claim(
    name="attention",
    number=2,
    statement="Attention sampling needs a fraction of the compute and memory, and only image-level labels.",
    paper="computation and memory lower by an order of magnitude for the same accuracy (ICML 2019)",
    baseline="cost: the same layers over all pixels; error: a convolutional network made for the reduced image, at its "
    "best rate (in full also the same layers over all pixels), with the same processor time",
    budget=("90 s of processor time a run, one seed, digits hidden in 1500 × 1500 pixels", "360 s a run, 3 seeds"),
    rule="a training step costs at most a tenth in time and in memory, and at equal time the test error is lower "
    "than that of a network on the whole image that has left chance",
    limits="What matters fills the image, or cannot be told from the rest at low resolution; images are small.",
    run=run,
    judge=judge,
)
