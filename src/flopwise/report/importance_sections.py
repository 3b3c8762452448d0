"""Importance sampling against uniform sampling: the sections of the page, in their order."""

from bisect import bisect_left
from collections.abc import Sequence
from statistics import fmean

from flopwise.report.charts import Axis, Series, line_chart, stacked_bars
from flopwise.report.importance import (
    LABELS,
    PHASES,
    VARIANTS,
    Selection,
    against,
    budget_text,
    converged,
    error_text,
    goal,
    loss_text,
    ratios_text,
    select,
    summary_rows,
    total_flops,
    verdict,
)
from flopwise.report.page import Section, bullets, cards, paragraph, side_by_side, table, under
from flopwise.report.records import Record, finite, where_measured
from flopwise.report.words import capital, distinct, flop_unit, flops_text, number, plural, times


def sections(records: Sequence[Record]) -> list[Section]:
    """Verdict, results, curves, gate, cost, tuning, limits, method; what has no data is left out or says so."""
    selection = select(records)
    below = []
    if selection.methods:
        below += [_results(records, selection), _curves(selection), *_gate(selection), *_cost(records)]
    below += [_tuning(selection), when_not(), _measured(records, selection)]
    return under(_verdict(records, selection), below)


def _verdict(records: Sequence[Record], selection: Selection) -> Section:
    title, text = verdict(records)
    body = paragraph(text, "lead")
    uniform = converged(selection.methods.get("uniform", []))
    headline = next((method for method in VARIANTS if method in selection.methods), None)
    runs = converged(selection.methods[headline]) if headline else []
    if headline and runs and uniform:
        loss, error, seconds = (against(runs, uniform, key) for key in ("train_loss", "test_error", "seconds"))
        losses = f"{number(loss.variant)} against {number(loss.uniform)}{loss.noise_text}"
        errors = f"{100 * error.variant:.2f} % against {100 * error.uniform:.2f} %{error.noise_text}"
        change = f"{100 * (error.ratio - 1):+.1f} %".replace("-", "−")
        body += cards(
            [
                ("training loss", times(loss.ratio), losses),
                ("test error, relative", change, errors),
                (
                    "wall-clock time",
                    times(seconds.ratio),
                    f"{number(seconds.variant)} s against {number(seconds.uniform)} s",
                ),
            ]
        )
        body += paragraph(f"{capital(LABELS[headline])}, relative to {LABELS['uniform']}; lower is better.", "note")
    return Section(title, body)


def _results(records: Sequence[Record], selection: Selection) -> Section:
    rows = summary_rows(records)
    divisor, unit = flop_unit(max(row["total_flops"] for row in rows))
    columns = ["method", "rate", "batch size", "training loss", "test error, %"]
    columns += [f"{word}, {unit}" for word in PHASES.values()]
    columns += [f"total, {unit}", "seconds", "steps on", "R predicted / measured"]
    cells = []
    for row in rows:
        runs, share_on = selection.methods[row["method"]], row["share_on"]
        cells.append(
            [
                row["label"],
                distinct(f"{r['rate']:g}" for r in runs),
                distinct(r["batch_size"] for r in runs),
                loss_text(row),
                error_text(row),
                *(number(row["flops"][phase] / divisor) for phase in PHASES),
                number(row["total_flops"] / divisor),
                number(row["seconds"]),
                "–" if share_on is None or row["method"] == "uniform" else f"{100 * share_on:.0f} %",
                ratios_text(row),
            ]
        )
    body = table("One row per method; costs are per run", columns, cells)
    body += paragraph(
        "Mean ± standard deviation over seeds. R is the gradient's variance at equal cost, relative to uniform: "
        "below 1, importance sampling wins.",
        "note",
    )
    body += paragraph(goal(records))
    missing = [LABELS[method] for method in LABELS if method not in selection.methods]
    if missing:
        body += paragraph(f"Not run yet: {'; '.join(missing)}.")
    return Section("Results", body)


def _curves(selection: Selection) -> Section:
    divisor, unit = flop_unit(max(total_flops(r) for runs in selection.methods.values() for r in runs))
    x = Axis("FLOPs spent", unit, low=0)
    losses = lines(selection.methods, LABELS, "flops", "train_loss", x_scale=1 / divisor)
    errors = lines(selection.methods, LABELS, "flops", "test_error", x_scale=1 / divisor, y_scale=100)
    figures = []
    if losses:
        values = [value for line in losses for value in line.heights()]
        wide = min(values) > 0 and max(values) > 10 * min(values)
        figures.append(line_chart("Training loss", losses, x=x, y=Axis("training loss", log=wide)))
    if errors:
        figures.append(line_chart("Test error", errors, x=x, y=Axis("test error", "%")))
    if not figures:
        return Section("Along the budget", paragraph("No run which converged has recorded a curve."))
    note = "Lines are means over seeds; bands run from the lowest seed to the highest."
    if all(line.band is None for line in losses + errors):
        note = "One seed per method: no bands."
    if any(len(converged(runs)) < len(runs) for runs in selection.methods.values()):
        note += " Diverged runs are not drawn."
    return Section("Along the budget", side_by_side(figures) + paragraph(note, "note"))


def _gate(selection: Selection) -> list[Section]:
    variants = {method: runs for method, runs in selection.methods.items() if method != "uniform"}
    x = Axis("share of the budget", "%", low=0, high=100)
    gains = lines(variants, LABELS, "share", "tau2", x_scale=100)
    on = lines(variants, LABELS, "share", "on", x_scale=100, y_scale=100)
    figures = []
    if gains:
        figures.append(line_chart("What the draw is worth", gains, x=x, y=Axis("τ²")))
    if on:
        figures.append(line_chart("When the gate was open", on, x=x, y=Axis("steps on", "%", low=0, high=100)))
    if not figures:
        return []
    text = (
        "τ² = mean(S²) / mean(S)² of the scores S says how many times larger a uniform batch the draw alone is worth. "
        "The gate opens only where the estimated R, which counts the cost of scoring too, is below 0.9."
    )
    return [Section("The gate", paragraph(text) + side_by_side(figures))]


def _cost(records: Sequence[Record]) -> list[Section]:
    rows = summary_rows(records)
    longest = max(row["total_flops"] for row in rows)
    if longest == 0:
        return []
    divisor, unit = flop_unit(longest)
    bars = [(row["label"], [row["flops"][phase] / divisor for phase in PHASES]) for row in rows]
    chart = stacked_bars("FLOPs by phase, mean of a run", list(PHASES.values()), bars, unit=unit)
    return [Section("What scoring cost", chart)]


def _tuning(selection: Selection) -> Section:
    heading = "How the baseline was tuned"
    if not selection.tuning:
        return Section(
            heading, paragraph("The records hold no tuning run: nothing can be said about the baseline's tuning.")
        )
    cells: dict[tuple[float, int], list[Record]] = {}
    for record in selection.tuning:
        cells.setdefault((record["rate"], record["batch_size"]), []).append(record)
    losses = {
        cell: fmean(r["train_loss"] for r in runs) for cell, runs in cells.items() if len(converged(runs)) == len(runs)
    }
    best = min(losses, key=lambda cell: losses[cell], default=None)
    used = {(r["rate"], r["batch_size"]) for r in selection.methods.get("uniform", [])}
    chosen = used or ({best} if best else set())
    rates, batches = sorted({rate for rate, _ in cells}), sorted({batch for _, batch in cells})

    def text(cell: tuple[float, int]) -> str:
        if cell not in cells:
            return "not run"
        return (number(losses[cell]) if cell in losses else "diverged") + (" (chosen)" if cell in chosen else "")

    body = table(
        "Final training loss of uniform sampling, learning rate by batch size",
        ["learning rate", *(f"batch {batch}" for batch in batches)],
        [[f"rate {rate:g}", *(text((rate, batch)) for batch in batches)] for rate in rates],
        marked={(rates.index(rate), 1 + batches.index(batch)) for rate, batch in chosen & set(cells)},
    )
    body += paragraph(_grid_verdict(best, rates, batches))
    if best and chosen != {best}:
        settings = " and ".join(f"rate {rate:g}, batch {batch}" for rate, batch in sorted(chosen))
        body += paragraph(f"Mind that the runs did not use the grid's best setting, but {settings}.")
    body += paragraph(
        f"The tuning cost {flops_text(sum(total_flops(r) for r in selection.tuning))} and "
        f"{number(sum(r['seconds'] for r in selection.tuning))} s: {plural(len(selection.tuning), 'run')} of "
        f"{distinct(budget_text(r) for r in selection.tuning)}. This is apart from the budgets compared above.",
        "note",
    )
    return Section(heading, body)


def _grid_verdict(best: tuple[float, int] | None, rates: Sequence[float], batches: Sequence[int]) -> str:
    if best is None:
        return "Every setting of the grid diverged: the baseline is not tuned."
    edges = []
    for name, value, tried in (("learning rate", best[0], rates), ("batch size", best[1], batches)):
        if len(tried) == 1:
            edges.append(f"the {name} was not varied")
        elif value in (tried[0], tried[-1]):
            edges.append(f"its {name} is the {'smallest' if value == tried[0] else 'largest'} tried")
    at = f"The grid's best setting is rate {best[0]:g}, batch {best[1]}"
    if edges:
        return f"{at}. It lies on an edge of the grid ({' and '.join(edges)}): the baseline may be under-tuned."
    return f"{at}. It lies inside the grid."


def when_not() -> Section:
    reasons = [
        "The model memorises its training data: the draw dwells on what it cannot fit, and test error can rise.",
        "Labels are noisy: an example with a wrong label keeps a large gradient.",
        "τ² stays below about 3 while the score is a full forward pass: scoring eats what the draw gains.",
        "Batches are large already, or the learning rate stays as it is: less variance then buys little.",
        "The model is so small that scoring is not much cheaper than training.",
    ]
    return Section("When not to use importance sampling", bullets(reasons))


def _data(record: Record) -> str:
    """What was trained and tested on, as the record has it: `--data` takes other sets than the package's."""
    data = record.get("data")
    if not data:
        return "augmented images of Fashion-MNIST"
    return f"{data['train']:,} augmented images of {data['name']}, tested on {data['test']:,} others"


def _measured(records: Sequence[Record], selection: Selection) -> Section:
    methods = selection.methods
    drawn = [r for method, runs in methods.items() if method != "uniform" for r in runs]
    rows = {
        "task": f"a small convolutional network; {distinct(_data(r) for r in records)}",
        "budget of a run": distinct(budget_text(r) for runs in methods.values() for r in runs),
        "seeds": "; ".join(
            f"{LABELS[method]}: {distinct(r['seed'] for r in runs)}" for method, runs in methods.items()
        ),
        "presample": distinct(f"{r['presample_size']} images" for r in drawn if r.get("presample_size")),
        **where_measured(records),
    }
    body = table("What ran, and where", ["what", "value"], [[name, value or "–"] for name, value in rows.items()])
    body += paragraph(
        "A FLOP is one multiply or one add of a matrix product, a convolution or an attention, forward and backward; "
        "element-wise operations are not counted. GFLOP and TFLOP are amounts (10⁹ and 10¹²), not speeds. Scoring "
        "counts against importance sampling's budget. Two means differ beyond the seeds' noise where they are at least "
        "two standard errors of their difference apart.",
        "note",
    )
    if selection.left_out:
        left_out = plural(selection.left_out, "run")
        body += paragraph(f"Left out: {left_out} under another budget, or repeated later with the same seed.", "note")
    return Section("How it was measured", body)


def lines(
    methods: dict[str, list[Record]],
    names: dict[str, str],
    x: str,
    y: str,
    *,
    x_scale: float = 1.0,
    y_scale: float = 1.0,
) -> list[Series]:
    """A series per method: the mean over its seeds and, with two or more, the band from the lowest to the highest.

    Seeds are read off at the x of the first one's points, by linear interpolation. A method's place in `names` is its
    colour, of which there are four.
    """
    series, colours = [], {method: colour for colour, method in enumerate(names)}
    for method, runs in methods.items():
        curves = [
            [(p[x] * x_scale, p[y] * y_scale) for p in r["curve"] if finite(p.get(x)) and finite(p.get(y))]
            for r in converged(runs)
        ]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        heights = [(at, [_height(curve, at) for curve in curves]) for at, _ in curves[0]]
        points = [(at, fmean(values)) for at, values in heights]
        band = [(min(values), max(values)) for _, values in heights] if len(curves) > 1 else None
        series.append(Series(names[method], points, band, colours[method]))
    return series


def _height(curve: Sequence[tuple[float, float]], at: float) -> float:
    """The curve's height at `at`: linear between its points, level beyond its ends."""
    right = bisect_left(curve, at, key=lambda point: point[0])
    if right == 0:
        return curve[0][1]
    if right == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
