"""The page of an audit: its verdict and numbers, and lines that are no audit."""

import json

import pytest
from pages import check, headings, written

from flopwise.report import read_records

VARIANCE = {"1.5": 0.9, "2.0": 0.7, "3.0": 0.5, "4.0": 0.45}
STAGE = {"steps": 0, "tau2": 1.2, "score_tau2": 1.3, "variance": VARIANCE, "exact_variance": VARIANCE, "examples": 64}
AUDIT = {
    "experiment": "audit",
    "technique": "importance",
    "batch_size": 32,
    "cost": "flops",
    "scoring_cost": {"flops": 0.25, "seconds": 0.3},
    "stages": [STAGE | {"noise_scale": None}, STAGE | {"steps": 80, "tau2": 3.5, "noise_scale": 900.0}],
    "seconds": 61.0,
    "helps": True,
    "R": 0.875,
    "ratio": 3.0,
    "score_share": 0.96,
    "verdict": "Importance sampling is likely to help: R = 0.88.",
    "run": {"setup": "train:setup"},
    "machine": {"processor": "p", "cores": 2, "torch": "2", "python": "3", "flopwise": "0"},
    "commit": "abc",
    "time": "2026-11-24T05:00:00Z",
}


def test_the_verdict_comes_first_with_its_numbers(tmp_path):
    text = written(tmp_path, [AUDIT])
    check(text)
    assert headings(text)[0] == "train:setup: importance sampling is likely to help"
    assert AUDIT["verdict"] in text and "25.0 %" in text and "96.0 %" in text
    assert "after 0 steps" in text and "after 80 steps" in text
    assert "none measurable" in text and "0.50 × uniform" in text
    assert "When not to use importance sampling" in text and "61 s" in text


def test_the_newest_audit_of_each_setup_is_shown(tmp_path):
    no = AUDIT | {"helps": False, "verdict": "Unlikely: too equal."}
    text = written(tmp_path, [AUDIT, no, AUDIT | {"run": {"setup": "other:setup"}}])
    check(text)
    found = [heading for heading in headings(text) if "importance sampling is" in heading]
    assert found == [
        "train:setup: importance sampling is unlikely to help",
        "other:setup: importance sampling is likely to help",
    ]
    assert text.count("Unlikely: too equal.") == 1


def test_a_whole_budget_is_shown(tmp_path):
    course = {"on": 0.375, "R": 0.8, "needed": 0.775}
    check(text := written(tmp_path, [AUDIT | {"budget": 900, "course": course}]))
    assert "37.5 %" in text and "77.5 %" in text and "900 steps" in text
    assert "gate on" not in written(tmp_path, [AUDIT | {"budget": None, "course": course}])


def test_flops_that_were_not_counted_give_way_to_seconds(tmp_path):
    check(text := written(tmp_path, [AUDIT | {"scoring_cost": {"flops": None, "seconds": 0.3}}]))
    assert "30.0 %" in text


@pytest.mark.parametrize(
    "wrong",
    [{"stages": []}, {"stages": [STAGE | {"variance": None}]}, {"R": None}, {"verdict": None}, {"machine": None},
     {"stages": [STAGE | {"tau2": None}]}],
)  # fmt: skip
def test_a_line_that_is_no_audit_is_named(tmp_path, wrong):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(AUDIT | wrong) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read_records(path)
