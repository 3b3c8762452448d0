"""Claim 1: importance sampling under a fixed budget."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from flopwise.experiments import importance, importance_settings
from flopwise.experiments.claims.claim import Claim, Judgement, difference, of_kind
from flopwise.experiments.runner import Record
from flopwise.noise import beyond

QUICK = replace(importance.QUICK, flops=1e12)
OURS = "rate_scale"


def run(folder: Path, full: bool) -> None:
    """In full six trainings, audited before they run."""
    if not full:
        importance.compare(QUICK, folder)
        return
    names = list(importance_settings.SETTINGS)
    for part in importance_settings.COMMANDS.values():
        part(names, folder)


def judge(records: Sequence[Record]) -> Judgement:
    """Of the six trainings if they ran, otherwise of the one."""
    settings = of_kind(records, "importance_settings", "run")
    return judge_settings(settings) if settings else judge_one(records)


def judge_settings(runs: Sequence[Record]) -> Judgement:
    """Ours, as it comes, against uniform sampling at its own best rate, at equal FLOPs."""
    names = list(dict.fromkeys(r["setting"] for r in runs))
    loss, error = ([_outcome(runs, name, key) for name in names] for key in ("train_loss", "test_error"))
    counts = [
        f"{what} lower in {outcomes.count('lower')}, higher in {outcomes.count('higher')}"
        for what, outcomes in (("training loss", loss), ("test error", error))
    ]
    ours, why = f"of {len(names)} trainings, {'; '.join(counts)}", "the others are the same within the noise of seeds"
    if "higher" in loss + error or "lower" not in loss + error:
        return Judgement("not reproduced", ours, why)
    enough = loss.count("lower") >= 3 and error.count("lower") >= 2
    return Judgement("reproduced" if enough else "in part", ours, why)


def _outcome(runs: Sequence[Record], setting: str, key: str) -> str:
    """Seed by seed: runs of one seed have the same start and the same data. One that diverged, with null for a loss, is
    the worse one."""
    ours, theirs = (
        {r["run"]["seed"]: r[key] for r in importance_settings.runs_of(runs, setting, name)}
        for name in ("flopwise", "uniform")
    )
    if None in ours.values() or None in theirs.values():
        return "higher" if None in ours.values() else "lower"
    gaps = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if fmean(gaps) == 0 or (len(gaps) > 1 and not beyond(gaps)):
        return "same"
    return "lower" if fmean(gaps) < 0 else "higher"


def judge_one(records: Sequence[Record]) -> Judgement:
    """The newest budget's runs, ours with the scaled rate against uniform at its own best rate and batch size."""
    runs = of_kind(records, "importance", "run")
    runs = [r for r in runs if r["budget"] == runs[-1]["budget"]]
    sides = [[r for r in runs if r["method"] == method] for method in (OURS, "uniform")]
    diverged = [r for side in sides for r in side if r["train_loss"] is None or r["test_error"] is None]
    if diverged:
        return Judgement("not reproduced", "–", f"{len(diverged)} of {len(runs)} runs diverged")
    loss, error = ([[r[key] for r in side] for side in sides] for key in ("train_loss", "test_error"))
    outcomes = [difference(*loss), difference(*error)]
    ours = (
        f"training loss {fmean(loss[0]) / fmean(loss[1]):.2f} × uniform's, "
        f"test error {100 * fmean(error[0]):.2f} % against {100 * fmean(error[1]):.2f} % "
        f"({100 * (fmean(error[0]) / fmean(error[1]) - 1):+.1f} % relative)"
    )
    why = f"training loss {outcomes[0]}, test error {outcomes[1]}, beyond the noise of {len(loss[0])} seeds"
    if outcomes == ["lower", "lower"]:
        return Judgement("reproduced", ours, why)
    return Judgement("in part" if "lower" in outcomes and "higher" not in outcomes else "not reproduced", ours, why)


CLAIM = Claim(
    name="importance",
    number=1,
    statement="Importance sampling reaches a lower training loss and test error under a fixed budget.",
    paper="training loss lower by up to an order of magnitude, test error by 5 to 17 % (relative), at equal wall-clock "
    "time on CIFAR and fine-tuning (ICML 2018)",
    baseline="uniform sampling at its own best learning rate, with the same FLOPs",
    budget=(
        "1 TFLOP a run, 3 seeds, a small CNN on 10,000 Fashion-MNIST images",
        "six trainings of 0.5 to 4.5 TFLOP, 6 seeds, with eight other methods beside",
    ),
    rule="training loss and test error both lower than tuned uniform's, by two standard errors over seeds; in full, "
    "training loss in three trainings and test error in two, and higher in none, seed by seed at 95 %",
    limits="Memorised data, noisy labels, small budgets, or a model so cheap that scoring costs as much as training.",
    run=run,
    judge=judge,
    missing=lambda full: importance_settings.missing() if full else [],
)
