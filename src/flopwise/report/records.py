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
