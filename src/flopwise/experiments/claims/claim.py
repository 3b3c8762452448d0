"""What every claim is made of, and the rule for noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from flopwise.experiments.runner import Record
from flopwise.noise import apart

Verdict = Literal["reproduced", "in part", "not reproduced", "not run"]


@dataclass(frozen=True)
class Judgement:
    """What our records say of a claim.

    Args:
        verdict: by the claim's rule, from the records alone.
        ours: our number, in words that stand beside the paper's.
        why: what was short of the rule, or by how much it was met.
    """

    verdict: Verdict
    ours: str
    why: str


@dataclass(frozen=True)
class Claim:
    """One claim of the thesis' abstract, and how it is put to the test here.

    Args:
        paper: the number that was published, and its source.
        baseline: the honest one: what a careful user would run instead.
        budget: what both sides may spend, (quick, full).
        rule: when the verdict is "reproduced"; `judge` computes it.
        limits: when not to use this.
        run: (folder, full): adds records to folder/records.jsonl; those that are there are not made again.
        judge: the records of one folder -> a judgement.
        missing: commands that install what `run` needs and what is not there.
    """

    name: str
    number: int
    statement: str
    paper: str
    baseline: str
    budget: tuple[str, str]
    rule: str
    limits: str
    run: Callable[[Path, bool], None]
    judge: Callable[[Sequence[Record]], Judgement]
    missing: Callable[[bool], list[str]] = lambda full: []


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Literal["lower", "higher", "same"]:
    """Of two means: the same unless two standard errors of the difference apart; one seed is taken as it is."""
    gap = fmean(ours) - fmean(theirs)
    if min(len(ours), len(theirs)) > 1 and not apart(ours, theirs):
        return "same"
    return "same" if gap == 0 else "lower" if gap < 0 else "higher"


def of_kind(records: Sequence[Record], experiment: str, kind: str) -> list[Record]:
    return [record for record in records if (record["experiment"], record.get("kind")) == (experiment, kind)]
