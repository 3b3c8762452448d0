"""The experiment on a tiny budget: equal FLOPs, resumed runs, tuning that widens its grid, Ctrl-C, the page."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flopwise.cli import app
from flopwise.experiments import importance
from flopwise.experiments.importance import Plan, Run, small_cnn, train, tune
from flopwise.experiments.runner import Records, run_all

TINY = 2e10


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "CURVE_POINTS", 2)
    monkeypatch.setattr(importance, "VARIANCE_DRAWS", 5)


@pytest.mark.parametrize("method", importance.METHODS)
def test_every_method_spends_the_same(method: str, tmp_path: Path):
    record = train(Run(method, 0, 1e-3, 32, TINY), tmp_path / "no.pt")
    spent = sum(record["flops"].values())
    assert TINY <= spent < TINY * 1.06  # the last step may cross the line: up to 5 % of this tiny budget
    assert record["flops"]["other"] == 0
    assert 0 < record["train_loss"] < 10 and 0 < record["test_error"] < 1
    assert record["curve"][0]["share"] < 0.05 and record["curve"][-1]["share"] == 1.0


def test_a_run_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run("rate_scale", 1, 1e-3, 32, TINY)
    whole = train(run, tmp_path / "no.pt")
    monkeypatch.setattr(importance, "CHECKPOINT_SECONDS", 0.0)

    class Stop(Exception): ...

    def stop(share: float) -> None:
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        train(run, tmp_path / "half.pt", stop)
    resumed = train(run, tmp_path / "half.pt")
    for key in ("train_loss", "test_error", "flops", "steps"):
        assert resumed[key] == whole[key], key


def test_networks_follow_the_seed():
    same = [p.sum().item() for p in small_cnn(3).parameters()]
    torch.manual_seed(99)
    assert same == [p.sum().item() for p in small_cnn(3).parameters()]
    assert same != [p.sum().item() for p in small_cnn(4).parameters()]


def fake_train(run: Run, checkpoint: Path, progress) -> dict:
    """Best at rate 0.008 and batch 32; diverges above."""
    if run.rate > 0.01:
        return {"train_loss": float("nan")}
    return {"train_loss": abs(run.rate - 0.008) + abs(run.batch_size - 32)}


def in_this_process(runs, train, folder, *, title):
    records = Records(folder)
    return [records.find(run) or records.add(run, fake_train(run, folder, None)) for run in runs]


def test_the_grid_grows_while_the_best_is_on_its_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importance, "run_all", in_this_process)
    best = tune(Plan(TINY, rates=(0.001, 0.002), batch_sizes=(64, 128)), tmp_path)
    assert (best.rate, best.batch_size) == (0.008, 32)
    tried = {(r["run"]["rate"], r["run"]["batch_size"]) for r in Records(tmp_path).all}
    assert {(0.016, 32), (0.004, 32), (0.008, 16), (0.008, 64)} <= tried


def test_a_grid_on_which_everything_diverges_moves_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importance, "run_all", in_this_process)
    assert tune(Plan(TINY, rates=(0.064, 0.128), batch_sizes=(32,)), tmp_path).rate == 0.008


def quick(run: Run, checkpoint: Path, progress) -> dict:
    progress(0.5)
    return {"train_loss": run.seed / 10, "curve": []}


def test_finished_runs_are_not_run_again_and_a_torn_line_is_dropped(tmp_path: Path):
    runs = [Run("uniform", seed, 1e-3, 32, TINY) for seed in range(3)]
    first = run_all(runs[:2], quick, tmp_path, title="")
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text() + '{"run": {"me')
    again = run_all(runs, quick, tmp_path, title="")
    assert again[:2] == first and [r["train_loss"] for r in again] == [0.0, 0.1, 0.2]
    assert len(path.read_text().splitlines()) == 3
    assert {"machine", "commit", "time"} <= set(json.loads(path.read_text().splitlines()[-1]))


def test_the_command_makes_a_page_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importance, "QUICK", Plan(TINY, rates=(0.001,), batch_sizes=(32,)))
    out = tmp_path / "report"
    arguments = ["demo", "importance", "--budget", "2e10", "--seeds", "1", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    page = (out / "index.html").read_text()
    assert "Fashion-MNIST" in page and "FLOP" in page
    records = (out / "records.jsonl").read_text()
    assert [json.loads(r)["kind"] for r in records.splitlines()] == ["tune", "run", "run"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (out / "records.jsonl").read_text() == records


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_checkpoints_and_no_processes(by: signal.Signals, tmp_path: Path):
    # a suite that runs in the background hands down a SIGINT that is ignored
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command += "from flopwise.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "demo", "importance", "--budget", "1e12", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.5)
    if by == signal.SIGINT:  # Ctrl-C reaches the whole group
        os.killpg(process.pid, by)
        assert process.wait(timeout=60) == 130
        assert "<html" in (tmp_path / "index.html").read_text()
    else:
        process.kill()
        process.wait()
    assert list(tmp_path.glob("checkpoints/*.pt"))
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("the workers outlived the demo")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "-1"], "above zero"),
        (["--data", "/nowhere"], "four Fashion-MNIST files"),
        (["--seeds", "0"], "seeds"),
    ],
)
def test_bad_arguments_are_explained(arguments: list[str], says: str, tmp_path: Path):
    result = CliRunner().invoke(app, ["demo", "importance", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


def test_help_and_version():
    assert "uniform" in CliRunner().invoke(app, ["demo", "importance", "--help"]).output.lower()
    assert CliRunner().invoke(app, ["--version"]).output.startswith("flopwise 0.")
