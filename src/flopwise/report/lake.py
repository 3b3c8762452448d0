"""Lakes on the Blue Marble: attention sampling against networks on the whole crop. Records -> table, sections."""

from collections.abc import Sequence
from html import escape
from statistics import mean, stdev

from flopwise.report.attention import NAMES
from flopwise.report.page import Section, markdown, paragraph, table
from flopwise.report.records import Record, by_method_of, finite, of_no_kind, where_measured, without_number
from flopwise.report.words import flops_text, mean_std, number, percent, plural

NEEDS = {"run": ("seed", "seconds", "examples", "test_error", "rate", "flops"), "tune": ("rate",), "looked": ()}
OURS, OUR_NAME = "murthy", "attention sampling, view at 1/8"
MORE = "n_64"  # patches at test time, four times as many as in training
COLUMNS = ["method", "test error, %", "by seed", "64 patches at test time, %", "rate", "crops seen", "FLOPs"]


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    if wrong := of_no_kind(record, list(NEEDS)):
        return wrong
    kind = record["kind"]
    if kind != "looked" and not isinstance(record.get("method"), str):
        return "one without method"
    if kind == "looked" and not isinstance(record.get("jpeg"), str):
        return "one without jpeg"
    return without_number(record, NEEDS[kind])


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of every method, attention sampling first, then from coarse to fine; those like the last run only."""
    runs = by_method_of(records, "lake")
    return {method: runs[method] for method in sorted(runs, reverse=True)}


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One line a method, under `COLUMNS`."""
    lines = []
    for method, found in by_method(records).items():
        errors = [100 * run["test_error"] for run in found]
        lines.append(
            [
                _name(method),
                mean_std(mean(errors), stdev(errors) if len(errors) > 1 else None),
                ", ".join(f"{error:.1f}" for error in errors),
                _more(found),
                f"{found[0]['rate']:g}",
                number(mean(run["examples"] for run in found)),
                flops_text(mean(run["flops"] for run in found)),
            ]
        )
    return lines


def markdown_table(records: Sequence[Record]) -> str:
    """For READMEs."""
    return markdown(COLUMNS, rows(records))


def verdict(records: Sequence[Record]) -> str:
    """Who won, in a sentence; empty while there is nothing to compare. A winner is ahead with every seed."""
    runs = by_method(records)
    whole = {method: _errors(found) for method, found in runs.items() if method != OURS}
    if OURS not in runs or not whole:
        return ""
    ours, best = _errors(runs[OURS]), min(whole, key=lambda method: mean(whole[method].values()))
    gaps = [whole[best][seed] - error for seed, error in ours.items() if seed in whole[best]]
    figures = (
        f"{percent(mean(ours.values()))} of the test crops missed, "
        f"against {percent(mean(whole[best].values()))} by {_name(best)}, the best of the others on average"
    )
    if gaps and all(gap > 0 for gap in gaps):
        return f"Attention sampling won with every seed: {figures}."
    if gaps and all(gap < 0 for gap in gaps):
        return f"Attention sampling lost with every seed: {figures}."
    return f"Attention sampling neither won nor lost with every seed: {figures}."


def sections(records: Sequence[Record]) -> list[Section]:
    """Verdict and table, what it looked at, how it was measured; what has no data is left out."""
    runs, found = by_method(records), []
    if runs:
        first = next(iter(runs.values()))[0]
        lead = verdict(records) or "The comparison is not finished; the same command goes on."
        text = (
            f"Crops of {first['data']['side']} x {first['data']['side']} pixels of NASA's Blue Marble: is there a lake "
            f"at least {first['data']['across']} pixels across? Half of the crops have one. Every run had "
            f"{number(first['budget']['seconds'])} s of processor time; the rate with the lowest training loss was "
            f"taken. {plural(max(map(len, runs.values())), 'seed')}, each trained on two thirds of the longitudes and "
            f"tested on {first['data']['test']} crops of the third."
        )
        body = paragraph(lead, "lead") + paragraph(text) + table("Test error", COLUMNS, rows(records))
        found.append(Section("Is there a lake in this crop?", body))
    found += [_looked(record) for record in records if record["kind"] == "looked"]
    measured = [[name, value or "–"] for name, value in where_measured(records).items()]
    return [*found, Section("How it was measured", table("Where it ran", ["what", "value"], measured))]


def _looked(record: Record) -> Section:
    pairs = zip(record.get("labels", []), record.get("predicted", []), strict=True)
    answers = "; ".join(f"{label}, it said {said}" for label, said in pairs)
    text = (
        f"Test crops ({answers}): the attention in orange, lakes that count in cyan, the patches that were read as "
        "white squares and beside each crop, enlarged."
    )
    picture = f'<img alt="{escape(text)}" style="max-width:100%" src="data:image/jpeg;base64,{escape(record["jpeg"])}">'
    return Section("What it looked at, in crops of the Earth", f"<figure>{picture}</figure>" + paragraph(text, "note"))


def _more(runs: Sequence[Record]) -> str:
    errors = [run["test_errors"][MORE] for run in runs if finite((run.get("test_errors") or {}).get(MORE))]
    return number(100 * mean(errors)) if errors else "–"


def _errors(runs: Sequence[Record]) -> dict[int, float]:
    return {run["seed"]: run["test_error"] for run in runs}


def _name(method: str) -> str:
    return OUR_NAME if method == OURS else NAMES.get(method, method).replace("image", "crop")
