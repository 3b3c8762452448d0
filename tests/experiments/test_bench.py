"""The performance table: made from fast stand-ins, what its cells say; one real part; and the command."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flopwise.cli import app
from flopwise.experiments import bench
from flopwise.experiments.bench import Limits, Row

LIMITS = Limits(matmul=1e11, memory=2e10)
ROW = Row("linear attention", "causal", "numba", 2.0, 10.0, "SDPA", 5e10, "matmul", 3e-7)
TOKEN = Row("linear attention", "a token", "torch", 2.0, 1.0, "softmax, key-value cache", 3e10, "memory")


def test_cells():
    assert ROW.cells(LIMITS)[3:] == ["2", "10", "SDPA", "5", "50% of matmul", "3e-07"]
    assert TOKEN.cells(LIMITS)[3:] == ["2", "1", "softmax, key-value cache", "0.5", "150% of memory", ""]
    assert len(ROW.cells(LIMITS)) == len(bench.COLUMNS)


def test_records_are_appended_with_where_they_were_made(tmp_path: Path):
    for _ in range(2):
        bench.write(tmp_path / "new" / "bench.jsonl", [ROW, TOKEN], LIMITS)
    first, second = map(json.loads, (tmp_path / "new" / "bench.jsonl").read_text().splitlines())
    assert [row["share"] for row in first["rows"]] == [0.5, 1.5] and first["rows"] == second["rows"]
    assert first["rows"][0]["speedup"] == 5 and first["machine"]["torch"] and first["limits"]["matmul"] == 1e11


def test_operators_are_compared_with_sdpa(monkeypatch: pytest.MonkeyPatch):
    """The real part, at lengths that take no time: errors are those of the operators, FLOPs are counted."""
    short = (bench.noise, bench.structured)
    monkeypatch.setattr(bench, "noise", lambda length, *dtype: short[0](min(length, 70), *dtype))
    monkeypatch.setattr(bench, "structured", lambda length: short[1](min(length, 70)))
    linear, clustered = list(bench.linear_rows()), list(bench.clustered_rows())
    assert len(linear) == 5 * len(bench.backends()) and len(clustered) == 4 * len(bench.backends())
    assert all(row.error is not None and row.error < 1e-5 for row in linear)
    assert all(row.error is not None and 1e-5 < row.error < 0.9 for row in clustered)
    assert all(row.rate > 0 and row.ours > 0 and row.theirs > 0 for row in linear + clustered)


@pytest.mark.parametrize("numba", [True, False])
def test_the_command(numba: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(bench, "limits", lambda: LIMITS)
    monkeypatch.setattr(bench, "parts", lambda: {"one": lambda: iter([ROW]), "other": lambda: iter([TOKEN])})
    monkeypatch.setattr(bench, "backends", lambda: ("numba", "torch") if numba else ("torch",))
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "bench.jsonl")], env={"COLUMNS": "200"})
    said = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == 0 and "100 GFLOP/s, memory is read at 20.0 GB/s" in said and "50% of matmul" in said
    assert ("pip install 'flopwise[cpu]'" in said) == (not numba)
    assert json.loads((tmp_path / "bench.jsonl").read_text())["rows"][1]["limit"] == "memory"
