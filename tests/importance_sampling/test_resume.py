"""A run that is killed and resumed ends with the same parameters as one that is not, to the last bit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "killed_run.py"


def run(folder: Path, kill_at: int, moment: str, loader: str) -> int:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, SCRIPT, str(folder), str(kill_at), moment, loader]
    return subprocess.run(command, check=False, timeout=120).returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, -1, "step", "plain") == 0
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize(
    ("kill_at", "moment", "loader"),
    [
        (3, "step", "plain"),
        (37, "step", "stateful"),
        (121, "step", "stateful"),
        (172, "score", "plain"),
        (240, "score", "stateful"),
    ],
)
def test_killed_and_resumed_is_identical(kill_at: int, moment: str, loader: str, tmp_path: Path, uninterrupted: dict):
    assert run(tmp_path, kill_at, moment, loader) == -signal.SIGKILL
    assert run(tmp_path, -1, moment, loader) == 0
    resumed = torch.load(tmp_path / "end.pt", weights_only=True)
    assert resumed["steps"] == uninterrupted["steps"] > 250
    assert resumed["flops"] == uninterrupted["flops"]
    assert resumed["metrics"] == uninterrupted["metrics"] and resumed["metrics"]["share_on"] > 0.3
    for name, tensor in uninterrupted["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
