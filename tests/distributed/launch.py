"""Jobs of several processes under torchrun, on the loopback."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


def torchrun(script: str, ranks: int, *arguments: object) -> int:
    job = Path(__file__).parent / script
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", job]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        [str(part) for part in (*command, *arguments)], check=False, timeout=180, env=environment, capture_output=True
    )
    output = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 0 or "SIGKILL" in output or "exitcode: -9" in output, output[-4000:]
    return ended.returncode


def results(folder: Path, what: str, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{what}_{rank}.pt", weights_only=True) for rank in range(ranks)]
