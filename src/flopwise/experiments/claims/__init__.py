"""The six claims of the thesis' abstract, a file each: what runs, the paper's number, the rule of the verdict.

`reproduce` runs them and adds one record a claim, with everything that stands in the table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flopwise.experiments.claims import attention, decoding, importance, length, pretrained, tradeoff
from flopwise.experiments.claims.claim import Claim, Judgement
from flopwise.experiments.runner import Record, Records

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM for module in (importance, attention, length, decoding, tradeoff, pretrained)
}


@dataclass(frozen=True)
class Run:
    """What a verdict is about."""

    claim: str
    full: bool
    kind: str = "verdict"


def reproduce(
    names: Sequence[str], folder: Path, *, full: bool, announce: Callable[[Claim], None] = lambda claim: None
) -> None:
    """Run the claims and add a verdict for each to `folder`/records.jsonl; what the folder has is not run again.

    A claim that lacks packages gets the verdict "not run" and the commands that install them.
    """
    for name in names:
        claim = CLAIMS[name]
        announce(claim)
        if needs := claim.missing(full):
            judgement = Judgement("not run", "–", f"it needs: {'; '.join(needs)}")
        else:
            claim.run(folder, full)
            judgement = claim.judge(Records(folder).all)
        records, verdict = Records(folder), as_record(claim, judgement, full)
        last = next((r for r in reversed(records.all) if r.get("claim") == name), {})
        if any(last.get(key) != value for key, value in verdict.items()):
            records.add(Run(name, full), verdict)


def as_record(claim: Claim, judgement: Judgement, full: bool) -> Record:
    return {
        "experiment": "claims",
        "kind": "verdict",
        "claim": claim.name,
        "number": claim.number,
        "statement": claim.statement,
        "paper": claim.paper,
        "ours": judgement.ours,
        "baseline": claim.baseline,
        "budget": claim.budget[full],
        "verdict": judgement.verdict,
        "why": judgement.why,
        "rule": claim.rule,
        "limits": claim.limits,
    }
