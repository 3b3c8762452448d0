"""Importance sampling and its baselines in several trainings, uniform sampling tuned: records -> tables, sections.

Lower is better everywhere. Runs of one seed have the same start and the same data in the same order, so methods are
compared seed by seed: one is better where the mean of the differences is beyond Student's t at 95 %. A method of which
a run diverged has no means.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from flopwise.noise import beyond
from flopwise.report.charts import Axis, line_chart
from flopwise.report.importance import Against, converged
from flopwise.report.importance_sections import lines
from flopwise.report.page import Section, paragraph, side_by_side, table, under
from flopwise.report.records import Record, finite, of_no_kind, where_measured, without_number
from flopwise.report.words import capital, mean_std, number, percent, plural

SAME = {"run": "FLOPs", "timed": "CPU seconds"}
WHAT = {"train_loss": "training loss", "test_error": "test error"}
EACH = [(kind, key) for kind in SAME for key in WHAT]
UNIFORM, OURS = "uniform", "flopwise"
SHRINK, PROXY = "flopwise_shrink", "flopwise_proxy"
NAMES = {
    UNIFORM: "uniform (tuned)",
    OURS: "flopwise",
    SHRINK: "flopwise, smaller batches",
    PROXY: "flopwise, proxy",
    "random_subset": "random subset",
    "loss": "loss as the score",
    "history": "remembered scores",
    "infobatch": "InfoBatch",
    "selective_backprop": "Selective Backprop",
    "online_batch_selection": "online batch selection",
}
OUTCOMES = {"lower": "better", "same": "equal", "higher": "worse"}
AUDIT_LINE = 0.25  # how far a predicted R may be from the measured


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    if wrong := of_no_kind(record, ("tune", *SAME)):
        return wrong
    if record.get("method") not in NAMES:
        return f"one with method {record.get('method')!r}, not one of {', '.join(NAMES)}"
    if not isinstance(record.get("setting"), str) or not isinstance(record.get("curve"), list):
        return "one without setting (a text) or curve (a list)"
    return without_number(record, ("run.seed", "run.rate", "batch_size", "seconds"))


@dataclass(frozen=True)
class Results:
    """The records of one file.

    Attributes:
        runs: by setting, method and kind; one run a seed.
        audits: the newest of every setting that looked at the whole budget.
    """

    runs: dict[tuple[str, str, str], list[Record]]
    audits: dict[str, Record]

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Results":
        runs: dict[tuple[str, str, str], list[Record]] = {}
        audits = {}
        for r in records:
            if r["experiment"] == "importance_settings":
                runs.setdefault((r["setting"], r["method"], r["kind"]), []).append(r)
            elif r["experiment"] == "audit" and r.get("course") and "setting" in r.get("run", {}):
                audits[r["run"]["setting"]] = r
        return cls(runs, audits)

    @property
    def settings(self) -> list[str]:
        """Those in which there is something to compare."""
        named = dict.fromkeys(setting for setting, _, kind in self.runs if kind in SAME)
        return [setting for setting in named if self.against(setting, OURS, "run", "train_loss")]

    def methods(self, setting: str, kind: str = "run") -> dict[str, list[Record]]:
        """What ran, in the order of `NAMES`."""
        found = {method: self.runs.get((setting, method, kind), []) for method in NAMES}
        return {method: runs for method, runs in found.items() if runs}

    def against(self, setting: str, method: str, kind: str, key: str) -> Against | None:
        """A method and uniform sampling; None where there is nothing to compare."""
        ours, uniform = (self.runs.get((setting, name, kind), []) for name in (method, UNIFORM))
        common = {r["run"]["seed"] for r in ours} & {r["run"]["seed"] for r in uniform}
        if not common or len(converged(ours)) < len(ours) or len(converged(uniform)) < len(uniform):
            return None
        return paired(ours, uniform, key)

    def counts(self, method: str, kind: str, key: str) -> dict[str, int]:
        """In how many settings a method is better, equal, worse than uniform sampling."""
        found = [_outcome(f) for setting in self.settings if (f := self.against(setting, method, kind, key))]
        return {word: found.count(word) for word in OUTCOMES.values()}

    def measured_R(self, setting: str, method: str = OURS) -> float:
        return fmean(measured_R(r["curve"]) for r in self.runs[setting, method, "run"])


def paired(runs: Sequence[Record], uniform: Sequence[Record], key: str) -> Against:
    """Compares the seeds that both have."""
    ours, theirs = ({r["run"]["seed"]: r[key] for r in group} for group in (runs, uniform))
    seeds = sorted(ours.keys() & theirs.keys())
    gaps = [ours[seed] - theirs[seed] for seed in seeds]
    noise = "unknown"
    if len(gaps) > 1:
        noise = "beyond" if beyond(gaps) else "within"
    return Against(fmean(ours[seed] for seed in seeds), fmean(theirs[seed] for seed in seeds), noise)


def measured_R(curve: Sequence[dict[str, Any]]) -> float:
    """Mean over a run of variance at equal cost, with 1 while the gate is off; straight lines between a curve's points.

    Its limit: while it is on, R is the gate's estimate, from scores.
    """
    values = [point["R"] if point["on"] else 1.0 for point in curve]
    shares = [0.0, *(point["share"] for point in curve[1:])]
    return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(zip(shares, values, strict=True)))


# Tables, in words


def comparison(results: Results, method: str) -> tuple[list[str], list[list[str]]]:
    """One line a setting: uniform sampling's and a method's, at equal FLOPs and at equal seconds."""
    columns = ["setting", *(f"{WHAT[key]}, equal {SAME[kind]}" for kind, key in EACH), "seeds, FLOPs / seconds"]
    rows = []
    for setting in results.settings:
        found = [(results.against(setting, method, kind, key), key) for kind, key in EACH]
        if any(against for against, _ in found):
            seeds = [str(len(results.runs.get((setting, method, kind), []))) for kind in SAME]
            rows.append([setting, *(_against(against, key) for against, key in found), " / ".join(seeds)])
    return columns, rows


def predictions(results: Results) -> tuple[list[str], list[list[str]]]:
    """One line a setting: what the audit predicted, and what came of it."""
    columns = ["setting", "audit: cost needed", "training loss, equal FLOPs", "right", "R predicted", "R measured"]
    rows = []
    for setting in results.settings:
        audit, loss = results.audits.get(setting), results.against(setting, OURS, "run", "train_loss")
        if audit and loss:
            said = f"{percent(audit['course']['needed'])}: {'yes' if audit['helps'] else 'no'}"
            right = "yes" if audit["helps"] == (loss.outcome == "lower") else "no"
            cells = [said, _outcome(loss), right]
            rows.append([setting, *cells, f"{audit['course']['R']:.2f}", f"{results.measured_R(setting):.2f}"])
    return columns, rows


def all_methods(results: Results, kind: str) -> tuple[list[str], list[list[str]]]:
    """One line a method: its training loss and test error relative to uniform sampling's in every setting."""
    columns = ["method", *results.settings, "better / equal / worse"]
    rows = []
    for method in NAMES:
        cells = []
        for setting in results.settings:
            loss, error = (results.against(setting, method, kind, key) for key in WHAT)
            cells.append(f"{loss.ratio:.2f}, {error.ratio:.2f}" if loss and error else "–")
        if method != UNIFORM and any(cell != "–" for cell in cells):
            counts = [results.counts(method, kind, key).values() for key in WHAT]
            rows.append([NAMES[method], *cells, ", ".join(" / ".join(map(str, count)) for count in counts)])
    return columns, rows


def summary(results: Results, method: str = OURS) -> list[str]:
    """How often a method is better, equal, worse, a sentence a kind of budget."""
    sentences = []
    for kind in SAME:
        parts = []
        for key, what in WHAT.items():
            counts = results.counts(method, kind, key)
            if sum(counts.values()):
                parts.append(
                    f"{what} better in {counts['better']}, equal in {counts['equal']}, worse in {counts['worse']}"
                )
        if parts:
            sentences.append(f"{NAMES[method]} at equal {SAME[kind]}: {'; '.join(parts)}.")
    return sentences


def audit_summary(results: Results) -> str:
    _, rows = predictions(results)
    near = sum(abs(float(row[-2]) / float(row[-1]) - 1) <= AUDIT_LINE for row in rows)
    right = sum(row[3] == "yes" for row in rows)
    return (
        f"The audit's yes or no was right in {right} of {plural(len(rows), 'setting')}, its R within "
        f"{100 * AUDIT_LINE:.0f} % of the measured in {near}."
    )


def _against(found: Against | None, key: str) -> str:
    if found is None:
        return "–"
    scale, unit = (100, " %") if key == "test_error" else (1, "")
    figures = f"{scale * found.uniform:.3g}{unit} / {scale * found.variant:.3g}{unit}"
    return f"{figures} ({found.ratio:.2f} x) {_outcome(found)}"


def _outcome(found: Against) -> str:
    return "one seed" if found.noise == "unknown" else OUTCOMES[found.outcome]


# The page


def sections(records: Sequence[Record]) -> list[Section]:
    """Outcome and predictions, then a section with curves and all methods for every setting."""
    results = Results.of(records)
    if not results.settings:
        text = "Uniform sampling is tuned first; the same command goes on."
        return [Section("Importance sampling in several trainings: not finished", paragraph(text, "lead"))]
    return under(
        _overview(results), [*(_setting(results, setting) for setting in results.settings), _measured(records)]
    )


def _overview(results: Results) -> Section:
    counts = results.counts(OURS, "run", "train_loss")
    title = (
        f"Importance sampling in {plural(sum(counts.values()), 'training')}: lower training loss in "
        f"{counts['better']}, equal in {counts['equal']}, higher in {counts['worse']}"
    )
    body = paragraph(" ".join(summary(results)), "lead")
    for method in (OURS, SHRINK, PROXY):
        columns, rows = comparison(results, method)
        if rows:
            body += table(f"Uniform sampling, tuned, and {NAMES[method]}", columns, rows)
    columns, rows = predictions(results)
    if rows:
        body += table("What the audit predicted", columns, rows) + paragraph(audit_summary(results), "note")
    for kind, same in SAME.items():
        columns, rows = all_methods(results, kind)
        if rows:
            body += table(f"Relative to uniform sampling's at equal {same}: training loss, test error", columns, rows)
    note = "Better or worse: by the differences seed by seed, at 95 %. All have uniform sampling's batch size and rate."
    return Section(title, body + paragraph(note, "note"))


def _setting(results: Results, setting: str) -> Section:
    methods = results.methods(setting)
    body = side_by_side(_curves(methods))
    columns = ["method", "training loss", "test error, %", "passes over the data", "steps drawn, %", "CPU s", "seeds"]
    body += table("At equal FLOPs", columns, [_row(method, runs) for method, runs in methods.items()])
    if timed := results.methods(setting, "timed"):
        body += table("At equal CPU seconds", columns, [_row(method, runs) for method, runs in timed.items()])
    return Section(setting, body + _tuning(results, setting))


def _curves(methods: dict[str, list[Record]]) -> list[str]:
    """Uniform sampling, ours, and the best of the others: a chart has four colours."""
    others = {m: runs for m, runs in methods.items() if m not in (UNIFORM, OURS, PROXY) and len(converged(runs)) > 0}
    best = sorted(others, key=lambda m: fmean(r["train_loss"] for r in converged(others[m])))[:1]
    names = {method: NAMES[method] for method in (UNIFORM, OURS, PROXY, *best)}
    shown = {method: methods[method] for method in names if method in methods}
    x, charts = Axis("share of the budget", "%", low=0, high=100), []
    for key, scale, unit in (("train_loss", 1.0, ""), ("test_error", 100.0, "%")):
        series = lines({m: _later(runs) for m, runs in shown.items()}, names, "share", key, x_scale=100, y_scale=scale)
        if series:
            log = unit == "" and min(height for line in series for height in line.heights()) > 0
            y = Axis(WHAT[key], unit, log=log)
            charts.append(line_chart(f"{capital(WHAT[key])} along the budget", series, x=x, y=y))
    return charts


def _later(runs: Sequence[Record]) -> list[Record]:
    """Without the first point, the untrained network's."""
    return [{**run, "curve": run["curve"][1:]} for run in runs]


def _row(method: str, runs: Sequence[Record]) -> list[str]:
    good = converged(runs)
    cells = [_mean([r["train_loss"] for r in good]), _mean([100 * r["test_error"] for r in good])]
    on = [100 * r["share_on"] for r in runs if finite(r.get("share_on"))]
    passes = [r["passes"] for r in runs if finite(r.get("passes"))]
    cells += [number(fmean(values)) if values else "–" for values in (passes, on, [r["seconds"] for r in runs])]
    return [NAMES[method], *cells, str(len(runs))]


def _mean(values: Sequence[float]) -> str:
    return mean_std(fmean(values), stdev(values) if len(values) > 1 else None) if values else "diverged"


def _tuning(results: Results, setting: str) -> str:
    """Batch sizes and rates that uniform sampling was tuned on: rates on the first seed, sizes on all."""
    tuned = results.runs.get((setting, UNIFORM, "tune"), [])
    at: dict[tuple[float, float], list[Any]] = {}
    for r in sorted(tuned, key=lambda r: r["run"]["seed"]):
        at.setdefault((r["batch_size"], r["run"]["rate"]), []).append(r["train_loss"])
    sizes, rates = (sorted(set(values)) for values in zip(*at, strict=True)) if at else ([], [])
    columns = ["batches of", *(f"rate {rate:g}" for rate in rates), "best rate, all seeds"]
    rows = []
    for size in sizes:
        found = [at.get((size, rate), []) for rate in rates]
        cells = [_loss(losses[0]) if losses else "–" for losses in found]
        seeds = max(map(len, found))
        best = min((losses for losses in found if len(losses) == seeds), key=_first)
        rows.append([f"{size:g}", *cells, _mean([loss for loss in best if finite(loss)])])
    taken = results.runs[setting, UNIFORM, "run"][0]
    said = f"Taken, by all: batches of {taken['batch_size']:g}, rate {taken['run']['rate']:g}."
    return table("Uniform sampling's training loss while it was tuned", columns, rows) + paragraph(said, "note")


def _first(losses: Sequence[float | None]) -> float:
    return math.inf if losses[0] is None else losses[0]


def _loss(loss: float | None) -> str:
    return number(loss) if loss is not None and finite(loss) else "diverged"


def _measured(records: Sequence[Record]) -> Section:
    rows = [[name, value or "–"] for name, value in where_measured(records).items()]
    return Section("How it was measured", table("Where it ran", ["what", "value"], rows))
