"""The claims of the thesis: a table of verdicts, and a section each, with what its technique's own page shows."""

from collections.abc import Callable, Sequence

from flopwise.report import attention, clustered_sections, importance_sections, linear, settings
from flopwise.report.clustered import FRONTIER
from flopwise.report.page import Section, bullets, cards, markdown, paragraph, table, under
from flopwise.report.records import Record, where_measured, without_number

TEXTS = ("claim", "statement", "paper", "ours", "baseline", "budget", "verdict", "why", "rule", "limits")
COLUMNS = ["claim", "paper", "here", "honest baseline", "budget", "verdict"]
MARKS = {"reproduced": "✓", "in part": "◐", "not reproduced": "✗", "not run": "–"}


def _importance(records: Sequence[Record]) -> list[Section]:
    """Of one training, or of several and what an audit said before them."""
    one = [r for r in records if r["experiment"] == "importance"]
    return importance_sections.sections(one) if one else settings.sections(records)


# claim -> (experiments, what the page shows of their records)
SHOWN: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Record]], list[Section]]]] = {
    "importance": (("importance", "importance_settings", "audit"), _importance),
    "attention": (("attention",), attention.sections),
    "length": (("linear",), linear.length_sections),
    "decoding": (("linear",), linear.sections),
    "tradeoff": (("clustered",), clustered_sections.frontier_sections),
    "pretrained": (
        ("clustered",),
        lambda records: clustered_sections.sections([r for r in records if r["kind"] != FRONTIER]),
    ),
}


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    for name in TEXTS:
        if not isinstance(record.get(name), str):
            return f"one without {name} (a text)"
    if record["claim"] not in SHOWN:
        return f"one with claim {record['claim']!r}, not one of {', '.join(SHOWN)}"
    if record["verdict"] not in MARKS:
        return f"one with verdict {record['verdict']!r}, not one of {', '.join(MARKS)}"
    if not isinstance(record.get("machine"), dict):
        return "one without machine (an object)"
    return without_number(record, ("number",))


def newest(records: Sequence[Record]) -> list[Record]:
    """The last verdict of every claim, in the claims' order."""
    found = {r["claim"]: r for r in records if r.get("experiment") == "claims"}
    return sorted(found.values(), key=lambda r: r["number"])


def cells(verdict: Record) -> list[str]:
    """One line under `COLUMNS`."""
    said = f"{MARKS[verdict['verdict']]} {verdict['verdict']}: {verdict['why']}"
    return [
        f"{verdict['number']}. {verdict['statement']}",
        *(verdict[key] for key in ("paper", "ours", "baseline", "budget")),
        said,
    ]


def summary(records: Sequence[Record]) -> str:
    """Verdicts, counted: "4 of 6 claims reproduced, 2 in part"."""
    verdicts = [r["verdict"] for r in newest(records)]
    counts = [(verdicts.count(verdict), verdict) for verdict in MARKS if verdict in verdicts]
    parts = [f"{count} {verdict}" for count, verdict in counts if verdict != "reproduced"]
    return ", ".join([f"{verdicts.count('reproduced')} of {len(verdicts)} claims reproduced", *parts])


def markdown_table(records: Sequence[Record]) -> str:
    """The table in GitHub's markdown."""
    return markdown(COLUMNS, [cells(verdict) for verdict in newest(records)])


def sections(records: Sequence[Record]) -> list[Section]:
    """The table of all claims, then a section for each and below it the sections of its technique."""
    verdicts = newest(records)
    found = [_table(verdicts)]
    for verdict in verdicts:
        experiments, show = SHOWN[verdict["claim"]]
        shown = [r for r in records if r["experiment"] in experiments]
        found += under(_claim(verdict), show(shown) if shown else [])
    return found


def _table(verdicts: Sequence[Record]) -> Section:
    text = (
        "Each claim of the thesis' abstract, what was published, and what came of it on this machine, under a budget "
        "that is equal for both sides. A verdict follows from the records by the rule that its section states."
    )
    where = "; ".join(f"{name}: {value}" for name, value in where_measured(verdicts).items() if value)
    body = paragraph(text, "lead")
    body += table("The claims", COLUMNS, [cells(verdict) for verdict in verdicts], prose=True)
    return Section(f"{summary(verdicts)}", body + paragraph(f"{where}.", "note"))


def _claim(verdict: Record) -> Section:
    body = cards([("verdict", f"{MARKS[verdict['verdict']]} {verdict['verdict']}", verdict["why"])])
    body += bullets(
        [
            f"Published: {verdict['paper']}.",
            f"Here: {verdict['ours']}.",
            f"The honest baseline: {verdict['baseline']}.",
            f"The budget: {verdict['budget']}.",
            f"Reproduced, if {verdict['rule']}.",
            f"When not to use this: {verdict['limits']}",
        ]
    )
    return Section(f"{verdict['number']}. {verdict['statement'].rstrip('.')}", body)
