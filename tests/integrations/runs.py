"""Runs of a script that are killed, resumed and compared with one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def run(script: str, folder: Path, *arguments: object, kill_at: int = -1) -> int:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", HERE / script, folder, kill_at, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([str(c) for c in command], check=False, timeout=300, capture_output=True, env=environment)
    if ended.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(ended.stderr.decode()[-3000:])
    return ended.returncode


def killed_and_resumed_is_identical(script: str, folder: Path, *arguments: object, kill_at: list[int]) -> None:
    """Kill a run at these steps, one after the other, and resume it each time."""
    folder.mkdir(exist_ok=True)
    assert run(script, folder / "whole", *arguments) == 0
    for step in kill_at:
        assert run(script, folder / "killed", *arguments, kill_at=step) == -signal.SIGKILL
    assert run(script, folder / "killed", *arguments) == 0
    whole, resumed = (torch.load(folder / name / "end.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["steps"] == resumed["steps"] > max(kill_at)
    assert whole["metrics"] == resumed["metrics"] and whole["metrics"]["share_on"] > 0.1, whole["metrics"]
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
