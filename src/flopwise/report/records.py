"""What the records of all experiments have in common."""

import math
from collections.abc import Sequence
from typing import Any

from flopwise.report.words import distinct

Record = dict[str, Any]


def finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def without_number(record: Record, paths: Sequence[str]) -> str | None:
    """Which of `paths` ("seconds.exact") leads to no number, in words which continue "this line is ..."."""
    for path in paths:
        value: object = record
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not finite(value):
            return f"one without {path} (a number)"
    return None


def of_no_kind(record: Record, kinds: Sequence[str]) -> str | None:
    """What is wrong with a record that is of none of `kinds` or names no machine, in words as `without_number`'s."""
    if record.get("kind") not in kinds:
        return f"one with kind {record.get('kind')!r}, not one of {', '.join(kinds)}"
    return None if isinstance(record.get("machine"), dict) else "one without machine (an object)"


def by_method_of(records: Sequence[Record], experiment: str) -> dict[str, list[Record]]:
    """The runs of every method; only those with the budget and data of the last one."""
    runs: dict[str, list[Record]] = {}
    ended = [r for r in records if r.get("experiment") == experiment and r["kind"] == "run"]
    for record in ended:
        if all(record.get(name) == ended[-1].get(name) for name in ("budget", "data")):
            runs.setdefault(record["method"], []).append(record)
    return runs


def where_measured(records: Sequence[Record]) -> dict[str, str]:
    """Processor, versions, commit and dates."""

    def machine(key: str) -> str:
        return distinct(r["machine"].get(key, "unknown") for r in records)

    days = sorted(str(r["time"]) for r in records if r.get("time"))
    return {
        "processor": f"{machine('processor')}, {machine('cores')} cores",
        "versions": f"flopwise {machine('flopwise')}, torch {machine('torch')}, Python {machine('python')}",
        "commit": distinct(r.get("commit") or "unknown" for r in records),
        "measured": " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "",
    }
