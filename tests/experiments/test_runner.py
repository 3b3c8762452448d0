"""What experiments share: tuning on a grid that grows, and records of what was tuned."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from flopwise.experiments import runner
from flopwise.experiments.runner import Records, tune_rate


@dataclass(frozen=True)
class Run:
    rate: float
    kind: str = "run"


@pytest.mark.parametrize(("best", "tried"), [(2e-3, 3), (1e-3, 4), (8e-3, 5), (1.6e-2, 6)])
def test_the_grid_grows_until_the_best_rate_is_within_it(
    best: float, tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = set()

    def run_all(runs, *_, **__):
        seen.update(run.rate for run in runs)
        return [{"train_loss": None if run.rate > best * 1.5 else abs(run.rate - best)} for run in runs]

    monkeypatch.setattr(runner, "run_all", run_all)
    assert tune_rate((4e-3, 1e-3, 2e-3), Run, lambda *_: {}, tmp_path, title="").rate == best
    assert len(seen) == tried and min(seen) < best < max(seen)


def test_a_tuning_run_is_not_trained_again(tmp_path: Path):
    records = Records(tmp_path)
    records.add(Run(1.0, kind="tune"), {"kind": "tune", "train_loss": 0.5})
    for _ in range(2):
        Records(tmp_path).take_tuned([Run(1.0), Run(2.0)])
    (_, taken) = Records(tmp_path).all
    assert taken["kind"] == "run" and taken["train_loss"] == 0.5 and taken["run"] == {"rate": 1.0, "kind": "run"}
