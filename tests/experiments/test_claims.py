"""The claims: verdicts that follow from records in every direction, runs that go on, what is missing, small runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import claim_records
import pytest

from flopwise.experiments import claims
from flopwise.experiments.claims import CLAIMS, decoding, length, reproduce, tradeoff
from flopwise.experiments.claims.claim import difference
from flopwise.experiments.runner import Records


def judged(name: str, *numbers: float) -> str:
    return CLAIMS[name].judge(getattr(claim_records, name)(*numbers)).verdict


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_says_all_that_the_table_needs(name: str):
    claim = CLAIMS[name]
    record = claims.as_record(claim, claim.judge(getattr(claim_records, name)()), False)
    assert all(record.values()) and record["verdict"] == "reproduced"
    assert [c.number for c in CLAIMS.values()] == list(range(1, 7))


@pytest.mark.parametrize(
    ("name", "numbers", "verdict"),
    [
        ("importance", (0.8, 1.0), "in part"),
        ("importance", (0.8, 1.2), "not reproduced"),
        ("importance", (1.0, 1.0), "not reproduced"),
        ("importance", (0.999, 0.9), "in part"),  # within the noise
        ("importance", (float("nan"), 0.9), "not reproduced"),
        ("attention", (8.0, 0.6), "in part"),
        ("attention", (90.0, 0.3), "not reproduced"),
        ("length", (1.0, 1.2), "in part"),
        ("length", (1.4, 2.0), "not reproduced"),
        ("decoding", (900.0, 1e-5), "in part"),
        ("decoding", (1500.0, 0.1), "not reproduced"),
        ("decoding", (5.0, 1e-5), "not reproduced"),
        ("tradeoff", (0.01, 0.08), "not reproduced"),
        ("tradeoff", (0.5, 0.2), "in part"),
        ("pretrained", (0.98, 0.02), "in part"),
        ("pretrained", (0.995, 0.05), "in part"),
        ("pretrained", (0.9, 0.9), "not reproduced"),
    ],
)
def test_verdicts(name: str, numbers: tuple[float, ...], verdict: str):
    assert judged(name, *numbers) == verdict


@pytest.mark.parametrize(
    ("losses", "errors", "verdict"),
    [
        ((0.7, 0.7, 0.7), (0.9, 0.9, 1.0), "reproduced"),
        ((0.7, 0.7, 0.7), (0.9, 1.0, 1.0), "in part"),
        ((0.7, 1.0, 1.0), (1.0, 1.0, 1.0), "in part"),
        ((0.7, 0.7, 0.7), (0.9, 0.9, 1.2), "not reproduced"),  # worse in one
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), "not reproduced"),
        ((None, 0.7, 0.7), (0.9, 0.9, 1.0), "not reproduced"),  # one diverged
    ],
)
def test_importance_in_several_trainings(losses: tuple, errors: tuple, verdict: str):
    records: list[dict] = [{"experiment": "audit"}]
    for setting, loss, error in zip("abc", losses, errors, strict=True):
        for method, by in (("uniform", (1.0, 1.0)), ("flopwise", (loss, error))):
            for seed in range(3):
                made = [None if share is None else (1 + 0.01 * seed) * share for share in by]
                record = {"setting": setting, "method": method, "train_loss": made[0], "test_error": made[1]}
                records.append({"experiment": "importance_settings", "kind": "run", "run": {"seed": seed}, **record})
    found = CLAIMS["importance"].judge(records)
    assert found.verdict == verdict and "of 3 trainings" in found.ours


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ((0.9, 1.9, 2.86), "in part"),  # by 0.113, t = 8.5, though seeds differ by 1
        ((0.9, 1.9, 2.65), "not reproduced"),  # by 0.183, t = 2.2
        ((1.1, 2.1, 3.14), "not reproduced"),
    ],
)
def test_importance_is_judged_seed_by_seed(losses: tuple[float, ...], verdict: str):
    records = [
        {"experiment": "importance_settings", "kind": "run", "setting": "a", "method": method, "run": {"seed": seed}}
        | {"train_loss": loss, "test_error": 0.1}
        for method, of in (("uniform", (1.0, 2.0, 3.0)), ("flopwise", losses))
        for seed, loss in enumerate(of)
    ]
    assert CLAIMS["importance"].judge(records).verdict == verdict


def test_memory_that_cannot_be_measured_is_left_out():
    records = claim_records.attention()
    for record in records[:2]:
        record["megabytes"] = None
    found = CLAIMS["attention"].judge(records)
    assert found.verdict == "reproduced" and "memory" not in found.ours


def test_beating_a_baseline_at_chance_shows_nothing():
    records = claim_records.attention()
    next(r for r in records if r.get("method") == "lowres_8")["test_error"] = 0.89
    found = CLAIMS["attention"].judge(records)
    assert found.verdict == "in part" and "near chance" in found.why


def test_the_rule_for_noise():
    assert difference([1.0, 1.1, 1.2], [1.3, 1.4, 1.5]) == "lower"
    assert difference([1.0, 1.5, 1.2], [1.3, 1.4, 1.1]) == "same"
    assert difference([2.0, 2.1], [1.0, 1.1]) == "higher"
    assert difference([1.0], [1.1]) == "lower" and difference([1.0], [1.0]) == "same"


def test_reproduce_runs_judges_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def stub(name: str) -> Any:
        def run(folder: Path, full: bool) -> None:
            calls.append(name)
            records = Records(folder)
            if name == "decoding" and calls.count(name) == 1:
                raise KeyboardInterrupt
            for i, record in enumerate(getattr(claim_records, name)()):
                made = claims.Run(f"{name} {i}", full, kind="made up")
                if records.find(made) is None:
                    records.add(made, record)

        return run

    for name, claim in CLAIMS.items():
        needs = ["pip install this"] if name == "pretrained" else []
        monkeypatch.setitem(CLAIMS, name, replace(claim, run=stub(name), missing=lambda full, needs=needs: needs))
    with pytest.raises(KeyboardInterrupt):
        reproduce(list(CLAIMS), tmp_path, full=False)
    for _ in range(2):
        reproduce(list(CLAIMS), tmp_path, full=False)
    verdicts = [r for r in Records(tmp_path).all if r["experiment"] == "claims"]
    assert {r["claim"]: r["verdict"] for r in verdicts} == {
        **dict.fromkeys(("importance", "attention", "length", "decoding", "tradeoff"), "reproduced"),
        "pretrained": "not run",
    }
    assert len(verdicts) == 6 and "pretrained" not in calls
    assert "pip install this" in next(r["why"] for r in verdicts if r["claim"] == "pretrained")


def test_lengths_are_measured_and_fitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert length.Run(4096).lengths == [512, 1024, 2048, 4096]
    assert length.exponent([(n, 3.0 * n**1.7) for n in (1, 10, 100)]) == pytest.approx(1.7)
    monkeypatch.setattr(length, "SHORTEST", 16)
    found = length.measure(length.Run(32), tmp_path)
    assert [row["length"] for row in found["lengths"]] == [16, 32] and set(found["exponents"]) == {"linear", "softmax"}


def test_the_recurrent_form_agrees_with_the_parallel_one():
    found = decoding.agreement(2)
    assert found["positions"] == 2 * 784 and found["largest_logit"] > 1
    assert found["largest_difference"] < 1e-3 * found["largest_logit"] and found["same_choice"] > 0.99


def test_every_contender_is_compared(tmp_path: Path):
    found = tradeoff.measure(tradeoff.Run("structured", 1, length=256), tmp_path)
    names = [method["method"] for method in found["methods"]]
    assert sum(name.startswith("clustered") for name in names) >= 5 and len(names) >= 12
    assert all(0 < method["error"] < 3 for method in found["methods"])
    won, lost = tradeoff.beaten(
        [
            {"method": "clustered, a", "milliseconds": 1.0, "error": 0.5},
            {"method": "clustered, b", "milliseconds": 3.0, "error": 0.1},
            {"method": "slower and worse", "milliseconds": 4.0, "error": 0.2},
            {"method": "faster", "milliseconds": 0.5, "error": 0.9},
            {"method": "between", "milliseconds": 2.0, "error": 0.3},
        ]
    )
    assert (won, lost) == (["slower and worse"], ["faster", "between"])
