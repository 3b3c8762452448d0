"""What `flopwise tune` measured and chose: records -> numbers and words."""

from collections.abc import Sequence
from dataclasses import dataclass

from flopwise.report.clustered import FASTER, setting_text
from flopwise.report.records import Record, finite, without_number

NEEDS = {
    "timing": ("length", "seconds"),
    "layer": ("layer", "clusters", "topk", "error"),
    "candidate": ("examples", "attention_time"),
    "tuned": ("tolerance",),
}
Setting = tuple[int, int]  # clusters, top-k


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    kind = record.get("kind")
    if kind not in NEEDS:
        return f"one with kind {kind!r}, not one of {', '.join(NEEDS)}"
    if kind in ("candidate", "tuned") and not isinstance(record.get("clustered"), list):
        return "one without clustered (a list)"
    if kind == "tuned" and not isinstance(record.get("machine"), dict):
        return "one without machine (an object)"
    return without_number(record, NEEDS[kind])


@dataclass(frozen=True)
class Search:
    """One search: what it timed, which errors it found, which settings it tried, and what it chose.

    Args:
        seconds: of one layer's attention, by setting (None: exact) and length.
        errors: relative to softmax, by layer and setting.
        tuned: the record of the choice; None if the search has not ended.
    """

    seconds: dict[Setting | None, dict[int, float]]
    errors: dict[int, dict[Setting, float]]
    candidates: list[Record]
    tuned: Record | None
    run: Record
    left_out: int  # records of earlier searches

    @property
    def lengths(self) -> list[int]:
        return sorted({length for column in self.seconds.values() for length in column})

    @property
    def chosen(self) -> dict[int, Record]:
        """Layer -> its entry in the configuration; layers that stay exact are left out."""
        return {entry["layer"]: entry for entry in self.tuned["clustered"]} if self.tuned else {}

    def ratio(self, setting: Setting, length: int) -> float | None:
        """Attention time relative to exact at this length."""
        exact, clustered = self.seconds.get(None, {}).get(length), self.seconds.get(setting, {}).get(length)
        return clustered / exact if exact and clustered is not None else None


def select(records: Sequence[Record]) -> Search:
    """The newest search: the records with the `run` of the last one."""
    run = records[-1].get("run")
    newest = [r for r in records if r.get("run") == run]
    seconds: dict[Setting | None, dict[int, float]] = {}
    errors: dict[int, dict[Setting, float]] = {}
    for record in newest:
        if record["kind"] == "timing":
            setting = None if record.get("clusters") is None else (record["clusters"], record["topk"])
            seconds.setdefault(setting, {})[record["length"]] = record["seconds"]
        elif record["kind"] == "layer":
            errors.setdefault(record["layer"], {})[record["clusters"], record["topk"]] = record["error"]
    return Search(
        seconds,
        errors,
        candidates=[r for r in newest if r["kind"] == "candidate"],
        tuned=next((r for r in newest if r["kind"] == "tuned"), None),
        run=run if isinstance(run, dict) else {},
        left_out=len(records) - len(newest),
    )


def title(search: Search) -> str:
    """What came out, in one line."""
    if search.tuned is None:
        return "The search for clustered attention has not ended"
    if not search.chosen:
        return "Stay exact"
    layers = len(search.errors) or len(search.chosen)
    return f"Cluster {len(search.chosen)} of {layers} layers"


def candidate_text(candidate: Record) -> str:
    """4 layers: 32 clusters, top-32; 64 clusters, top-32"""
    entries = candidate["clustered"]
    if not entries:
        return "exact"
    used = dict.fromkeys(setting_text(e["clusters"], e["topk"]) for e in sorted(entries, key=_setting))
    return f"{len(entries)} {'layer' if len(entries) == 1 else 'layers'}: {'; '.join(used)}"


def candidate_label(candidate: Record) -> str:
    """6 × 16/16 where all layers are alike, otherwise the range: 6 × 16/16–64/32"""
    entries = candidate["clustered"]
    if not entries:
        return "exact"
    low, high = _setting(min(entries, key=_setting)), _setting(max(entries, key=_setting))
    ends = f"{low[0]}/{low[1]}" if low == high else f"{low[0]}/{low[1]}–{high[0]}/{high[1]}"
    return f"{len(entries)} × {ends}"


def exact_below(entry: Record) -> str:
    least = entry.get("min_length")
    return f"{least} tokens" if finite(least) and least else "–"


def is_faster(ratio: float | None) -> bool:
    return ratio is not None and ratio <= FASTER


def _setting(entry: Record) -> Setting:
    return entry["clusters"], entry["topk"]
