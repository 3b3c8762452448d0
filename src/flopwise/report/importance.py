"""Importance sampling against uniform sampling at equal cost: records -> numbers and a verdict in words.

A run whose training loss or test error is not a number diverged. It is counted and named, and left out of the means.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, TypedDict

from flopwise.noise import apart
from flopwise.report.records import Record, finite, without_number
from flopwise.report.words import capital, flops_text, mean_std, number, plural, relative, times

LABELS = {
    "uniform": "uniform (tuned)",
    "paper": "importance sampling, the paper's draw",
    "same_rate": "importance sampling, same rate",
    "rate_scale": "importance sampling, rate scaled",
}
VARIANTS = ("rate_scale", "same_rate", "paper")  # the verdict is about the first which has run
PHASES = {"training": "training", "scoring": "scoring", "loading": "augmentation"}  # key in the record -> word
GOAL_LOSS, GOAL_ERROR = 0.75, 0.95  # the project's goal, as ratios to uniform
NO_VERDICT = "Importance sampling: no verdict yet"


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    choices = {"kind": ("tune", "run"), "method": tuple(LABELS)}
    for key, allowed in choices.items():
        if record.get(key) not in allowed:
            return f"one with {key} {record.get(key)!r}, not one of {', '.join(allowed)}"
    containers = {"budget": dict, "flops": dict, "machine": dict, "curve": list}
    for key, kind in containers.items():
        if not isinstance(record.get(key), kind):
            return f"one without {key} ({'an object' if kind is dict else 'a list'})"
    numbers = ["seed", "rate", "batch_size", "seconds", *(f"flops.{phase}" for phase in PHASES)]
    return without_number(record, numbers)


@dataclass(frozen=True)
class Selection:
    """The records which are compared."""

    tuning: list[Record]
    methods: dict[str, list[Record]]  # the runs of each method, one per seed, all under one budget; uniform first
    left_out: int  # runs under another budget, or repeated later


def select(records: Sequence[Record]) -> Selection:
    """The newest run of each method and seed under the newest run's budget; the newest of each cell of the grid."""
    tuning = {(r["rate"], r["batch_size"], r["seed"]): r for r in records if r["kind"] == "tune"}
    every = [r for r in records if r["kind"] == "run"]
    runs = {(r["method"], r["seed"]): r for r in every if r["budget"] == every[-1]["budget"]}
    methods = {method: [r for r in runs.values() if r["method"] == method] for method in LABELS}
    methods = {method: kept for method, kept in methods.items() if kept}
    return Selection(list(tuning.values()), methods, left_out=len(every) - len(runs))


def converged(runs: Sequence[Record]) -> list[Record]:
    return [r for r in runs if finite(r.get("train_loss")) and finite(r.get("test_error"))]


def total_flops(record: Record) -> float:
    return sum(record["flops"][phase] for phase in PHASES)


def budget_text(record: Record) -> str:
    amounts = record["budget"].items()
    return " and ".join(flops_text(v) if name == "flops" else f"{number(v)} {name}" for name, v in amounts)


# --- one row per method --------------------------------------------------------------------------------------------


class SummaryRow(TypedDict):
    """One method: means over the seeds which did not diverge; costs are per run (of all seeds, if all diverged)."""

    method: str
    label: str  # names the diverged seeds too
    seeds: int
    diverged: int
    train_loss: float | None  # None: every seed diverged
    train_loss_std: float | None  # None: fewer than two seeds
    test_error: float | None  # a fraction
    test_error_std: float | None
    flops: dict[str, float]  # per phase
    total_flops: float
    seconds: float
    share_on: float | None  # of the steps
    predicted_ratio: float | None  # R, the gradient's variance at equal cost relative to uniform
    measured_ratio: float | None


def summary_rows(records: Sequence[Record]) -> list[SummaryRow]:
    """One row per method which has run, uniform first."""
    return [_summary(method, runs) for method, runs in select(records).methods.items()]


def markdown_table(records: Sequence[Record]) -> str:
    """The result table, compact, in GitHub's markdown."""
    columns = ("method", "training loss", "test error %", "scoring, % of FLOPs", "total FLOPs", "seconds")
    lines = [(*columns, "R predicted / measured"), ("---", *["---:"] * len(columns))]
    for row in summary_rows(records):
        scoring = 100 * row["flops"]["scoring"] / row["total_flops"] if row["total_flops"] else 0.0
        costs = (f"{scoring:.1f}", flops_text(row["total_flops"]), number(row["seconds"]))
        lines.append((row["label"], loss_text(row), error_text(row), *costs, ratios_text(row)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def loss_text(row: SummaryRow) -> str:
    return "diverged" if row["train_loss"] is None else mean_std(row["train_loss"], row["train_loss_std"])


def error_text(row: SummaryRow) -> str:
    """In percent."""
    mean, std = row["test_error"], row["test_error_std"]
    return "diverged" if mean is None else mean_std(100 * mean, None if std is None else 100 * std)


def ratios_text(row: SummaryRow) -> str:
    ratios = [row["predicted_ratio"], row["measured_ratio"]]
    return "–" if ratios == [None, None] else " / ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)


def _summary(method: str, runs: Sequence[Record]) -> SummaryRow:
    good = converged(runs)
    costed = good or runs
    losses, errors = [r["train_loss"] for r in good], [r["test_error"] for r in good]
    ratios = [r.get("variance_ratio") or {} for r in good]
    diverged = len(runs) - len(good)
    return SummaryRow(
        method=method,
        label=LABELS[method] + (f" ({diverged} of {plural(len(runs), 'seed')} diverged)" if diverged else ""),
        seeds=len(runs),
        diverged=diverged,
        train_loss=_mean(losses),
        train_loss_std=stdev(losses) if len(losses) > 1 else None,
        test_error=_mean(errors),
        test_error_std=stdev(errors) if len(errors) > 1 else None,
        flops={phase: fmean(r["flops"][phase] for r in costed) for phase in PHASES},
        total_flops=fmean(total_flops(r) for r in costed),
        seconds=fmean(r["seconds"] for r in costed),
        share_on=_mean([r.get("share_on") for r in good]),
        predicted_ratio=_mean([ratio.get("predicted") for ratio in ratios]),
        measured_ratio=_mean([ratio.get("measured") for ratio in ratios]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None


# --- a variant against uniform -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Against:
    """Means of a variant and of uniform in one quantity (lower is better), and whether noise can explain the gap."""

    variant: float
    uniform: float
    noise: Literal["beyond", "within", "unknown"]

    @property
    def ratio(self) -> float:
        if self.uniform == 0:
            return math.inf if self.variant else 1.0
        return self.variant / self.uniform

    @property
    def outcome(self) -> Literal["lower", "higher", "same"]:
        if self.noise == "within" or self.variant == self.uniform:
            return "same"
        return "lower" if self.variant < self.uniform else "higher"

    @property
    def noise_text(self) -> str:
        """Continues a sentence."""
        return "" if self.noise == "unknown" else f", {self.noise} the seeds' noise"


def against(runs: Sequence[Record], uniform: Sequence[Record], key: str) -> Against:
    """Compares two groups of converged runs; two standard errors of the difference apart is beyond the noise."""
    ours, theirs = [r[key] for r in runs], [r[key] for r in uniform]
    noise = "unknown"
    if min(len(ours), len(theirs)) > 1:
        noise = "beyond" if apart(ours, theirs) else "within"
    return Against(fmean(ours), fmean(theirs), noise)


def verdict(records: Sequence[Record]) -> tuple[str, str]:
    """(one line, a few sentences): what came out, whichever way it went."""
    methods = select(records).methods
    if "uniform" not in methods:
        return NO_VERDICT, "The uniform baseline has not run: there is nothing to compare with."
    variants = [method for method in VARIANTS if method in methods]
    if not variants:
        return NO_VERDICT, "Only the uniform baseline has finished: importance sampling has not run."
    uniform = converged(methods["uniform"])
    if not uniform:
        return (
            "No verdict: the uniform baseline diverged",
            "No run of it gave a number to compare with: lower its learning rate.",
        )

    headline = variants[0]
    runs, seeds = converged(methods[headline]), plural(len(methods[headline]), "seed")
    diverged = len(methods[headline]) - len(runs)
    title = f"Importance sampling diverged in {diverged} of {seeds}" if diverged else _title(runs, uniform)
    if runs:
        sentences = _comparison(LABELS[headline], runs, uniform)
        if diverged or len(uniform) < len(methods["uniform"]):
            sentences.append("Diverged runs are left out of these means.")
    else:
        sentences = [f"{capital(LABELS[headline])}, diverged in every run: it has no result to compare."]
    return title, " ".join(sentences + _best(headline, methods, uniform))


def goal(records: Sequence[Record]) -> str:
    """The project's goal, and which variants reached it."""
    methods = select(records).methods
    text = (
        f"The project's goal is a training loss of at most {times(GOAL_LOSS)} uniform's and a test error at least "
        f"{100 * (1 - GOAL_ERROR):.0f} % lower (relative). "
    )
    uniform = converged(methods.get("uniform", []))
    variants = _steady(methods)
    if not uniform or not variants:
        return text + "Whether it is reached cannot be said yet."
    reached = []
    for method in variants:
        loss, error = (against(methods[method], uniform, key) for key in ("train_loss", "test_error"))
        if loss.ratio <= GOAL_LOSS and error.ratio <= GOAL_ERROR:
            noise = ", on one seed" if error.noise == "unknown" else error.noise_text
            reached.append(f"{LABELS[method]} ({times(loss.ratio)}, {relative(error.ratio)}{noise})")
    return text + (f"Reached by {'; '.join(reached)}." if reached else "It was not reached.")


def _title(runs: Sequence[Record], uniform: Sequence[Record]) -> str:
    loss, error = (against(runs, uniform, key) for key in ("train_loss", "test_error"))
    outcomes = {loss.outcome, error.outcome}
    if outcomes == {"same"}:
        title = "Importance sampling made no difference"
        title += "" if loss.noise == "unknown" else " beyond the seeds' noise"
    elif outcomes == {"lower", "higher"}:
        title = f"A mixed result: training loss {loss.outcome}, test error {error.outcome}"
    else:
        title = f"Importance sampling did {'better' if 'lower' in outcomes else 'worse'} at the same budget"
    return f"{title} (one seed)" if loss.noise == "unknown" else title


def _comparison(label: str, runs: Sequence[Record], uniform: Sequence[Record]) -> list[str]:
    loss, error, seconds = (against(runs, uniform, key) for key in ("train_loss", "test_error", "seconds"))
    over = f"over {plural(len(runs), 'seed')}"
    if len(runs) != len(uniform):
        over += f" (uniform: {len(uniform)})"
    sentences = [
        f"At the same budget of {budget_text(runs[0])}, {over}, {label}, ended at a training loss of "
        f"{number(loss.variant)} against uniform's {number(loss.uniform)}: {times(loss.ratio)}{loss.noise_text}.",
        f"Its test error was {100 * error.variant:.2f} % against {100 * error.uniform:.2f} %: "
        f"{relative(error.ratio)}{error.noise_text}.",
        f"It took {times(seconds.ratio)} uniform's wall-clock time.",
    ]
    if loss.noise == "unknown":
        sentences.append("One seed: no statement about noise.")
    spent = fmean(total_flops(r) for r in runs) / fmean(total_flops(r) for r in uniform)
    if abs(spent - 1) > 0.02:
        sentences.append(f"Mind that it spent {times(spent)} uniform's FLOPs: the costs are not equal.")
    return sentences


def _best(headline: str, methods: dict[str, list[Record]], uniform: Sequence[Record]) -> list[str]:
    """Names the variants with the lowest loss and the lowest error, where those are not the headline's."""
    sentences = []
    for key, name in (("train_loss", "training loss"), ("test_error", "test error")):
        found = {method: against(methods[method], uniform, key) for method in _steady(methods)}
        best = min(found, key=lambda method: found[method].variant, default=headline)
        if best != headline:
            value = f"{times(found[best].ratio)} uniform's{found[best].noise_text}"
            sentences.append(f"The variant with the lowest {name} was {LABELS[best]}: {value}.")
    return sentences


def _steady(methods: dict[str, list[Record]]) -> list[str]:
    """The variants of which no seed diverged."""
    return [m for m in VARIANTS if m in methods and len(converged(methods[m])) == len(methods[m])]
