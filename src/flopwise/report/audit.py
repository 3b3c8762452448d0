"""What `flopwise audit importance` measured and predicts: records -> the sections of the page."""

from collections.abc import Sequence

from flopwise.report.charts import Axis, Series, line_chart
from flopwise.report.importance_sections import when_not
from flopwise.report.page import Section, cards, paragraph, side_by_side, table
from flopwise.report.records import Record, finite, where_measured, without_number
from flopwise.report.words import number, percent, plural

NEEDS = ("R", "ratio", "score_share", "batch_size", "seconds", "scoring_cost.seconds")
STAGE_NEEDS = ("steps", "tau2", "score_tau2", "examples")


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    stages = record.get("stages")
    if not isinstance(stages, list) or not stages:
        return "one without stages (a list)"
    for stage in stages:
        if any(not isinstance(stage.get(name), dict) for name in ("variance", "exact_variance")):
            return "one with a stage that lacks variance or exact_variance (objects)"
        if wrong := without_number(stage, STAGE_NEEDS):
            return wrong
    if not isinstance(record.get("verdict"), str) or not isinstance(record.get("machine"), dict):
        return "one without verdict (text) or machine (an object)"
    return without_number(record, NEEDS)


def sections(records: Sequence[Record]) -> list[Section]:
    """For each setup that was audited, its newest audit; then limits and method."""
    newest = {_setup(record): record for record in records}
    parts = [part for setup, record in newest.items() for part in (_verdict(setup, record), _measurements(record))]
    return [*parts, when_not(), _measured(list(newest.values()))]


def _setup(record: Record) -> str:
    run = record.get("run", {})
    return str(run.get("setup") or run.get("setting") or "your setup")


def _cost(record: Record) -> float:
    """c, by the measure that the audit was asked for."""
    cost = record["scoring_cost"].get(record.get("cost", "flops"))
    return cost if finite(cost) else record["scoring_cost"]["seconds"]


def _verdict(setup: str, record: Record) -> Section:
    last = record["stages"][-1]
    figures = [
        ("R", number(record["R"]), "variance at equal cost over uniform sampling's; below 1 is a gain"),
        ("τ²", number(last["tau2"]), "how many times larger a uniform batch would have to be, by exact gradient norms"),
        ("scoring", percent(_cost(record)), "of what training on an example costs"),
        ("the score keeps", percent(record["score_share"]), "of the variance reduction of exact gradient norms"),
    ]
    course, budget = record.get("course"), record.get("budget")
    if course and budget:
        text = f"of uniform sampling's cost for its progress over {plural(budget, 'step')}; yes means 80 % at most"
        figures.insert(0, ("needed", percent(course["needed"]), text))
        figures.insert(1, ("gate on", percent(course["on"]), "of what is spent; it waits until drawing pays"))
    outcome = "likely to help" if record.get("helps") else "unlikely to help"
    return Section(f"{setup}: importance sampling is {outcome}", paragraph(record["verdict"], "lead") + cards(figures))


def _measurements(record: Record) -> Section:
    stages, cost = record["stages"], _cost(record)
    series = [
        Series(name, [(r, (1 + cost * r) * v) for r, v in _pairs(stages[-1][key])], colour=colour)
        for name, key, colour in (("drawn by the score", "variance", 1), ("by exact norms", "exact_variance", 2))
    ]
    ratios = [r for r, _ in series[0].points]
    series.append(Series("uniform", [(r, 1.0) for r in (ratios[0], ratios[-1])], colour=0))
    chart = line_chart("Variance at equal cost", series, x=Axis("presample over batch, r"), y=Axis("R", low=0.0))
    ratio = record["ratio"]
    rows = [
        ("τ², exact gradient norms", [number(stage["tau2"]) for stage in stages]),
        ("τ², as the score claims", [number(stage["score_tau2"]) for stage in stages]),
        (f"variance of a step drawn from {ratio:g} batches", [_at(stage["variance"], ratio) for stage in stages]),
        ("the same by exact gradient norms", [_at(stage["exact_variance"], ratio) for stage in stages]),
        ("batch at which noise equals signal", [_noise(stage) for stage in stages]),
        ("gradients measured", [str(stage["examples"]) for stage in stages]),
    ]
    columns = ["", *(f"after {plural(stage['steps'], 'step')}" for stage in stages)]
    return Section(
        "What it rests on",
        side_by_side([chart]) + table("Measured on a copy of the model", columns, [[name, *v] for name, v in rows]),
    )


def _pairs(variances: dict[str, float]) -> list[tuple[float, float]]:
    """JSON keys are text."""
    return sorted((float(ratio), value) for ratio, value in variances.items())


def _at(variances: dict[str, float], ratio: float) -> str:
    return f"{dict(_pairs(variances))[ratio]:.2f} × uniform's"


def _noise(stage: Record) -> str:
    return number(stage["noise_scale"]) if finite(stage.get("noise_scale")) else "none measurable"


def _measured(records: Sequence[Record]) -> Section:
    rows = {
        "audit": ", ".join(f"{record['seconds']:.0f} s" for record in records),
        "batch size": ", ".join(str(record["batch_size"]) for record in records),
        **where_measured(records),
    }
    body = table("What ran, and where", ["what", "value"], [[name, value or "–"] for name, value in rows.items()])
    body += paragraph(
        "The gradient of every measured example is computed alone and exactly; steps are then drawn from them, by the "
        "score and by the norms, as training draws, and their variance is compared with a uniform step's. R is that "
        "ratio times what a drawn step costs. 1 / R is the most that can be won, where gradient noise is what limits "
        "training; what a share of signal leaves of that is in the verdict. With a budget, the gate is taken through "
        "all of it. The audit sees no memorisation and no wrong labels: their limits are above.",
        "note",
    )
    return Section("How it was measured", body)
