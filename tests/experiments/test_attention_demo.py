"""The demo of attention sampling without training: the shipped model loads, is better than chance, and is shown."""

from pathlib import Path

import pytest

from flopwise.experiments import attention_cost, attention_demo
from flopwise.experiments.attention_demo import Trial
from flopwise.experiments.runner import Records


def test_the_shipped_model_is_better_than_chance(tmp_path: Path):
    record = attention_demo.test(Trial(20), tmp_path)
    assert record["tested"] == 20 and record["test_error"] < 0.75 and record["topk_error"] < 0.75


def test_what_it_saw_is_recorded_once(tmp_path: Path):
    for _ in range(2):
        attention_demo.show_glimpses(tmp_path, side=400, images=1, model=attention_demo.shipped())
    (record,) = Records(tmp_path).all
    assert record["kind"] == "looked" and len(record["patches"]) == 10
    attention_demo.show_glimpses(tmp_path / "empty", side=400)  # nothing was trained there
    assert Records(tmp_path / "empty").all == []


def test_a_step_over_few_patches_is_cheaper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_cost, "added_megabytes", lambda method, side: None)
    ours, theirs = (attention_cost.cost(attention_cost.Step(m, 752), tmp_path) for m in ("murthy", "cnn_1"))
    assert ours["milliseconds"] < theirs["milliseconds"] / 5 and ours["megabytes"] is None
