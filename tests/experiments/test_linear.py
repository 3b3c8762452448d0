"""The experiment on a tiny budget: data, equal FLOPs, resumed runs, what is painted, baselines that are right."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from flopwise.experiments import digits, linear, shakespeare
from flopwise.experiments.linear import Run
from flopwise.experiments.linear_baseline import CacheDecoder, ModuleDecoder, SoftmaxCausalLM
from flopwise.experiments.linear_speed import GAUSS, mean_over, measure, positions
from flopwise.models import LinearCausalLM

TINY = 1e10
SMALL = {
    "digits": {"vocab_size": digits.VOCABULARY, "dim": 16, "depth": 1, "heads": 2, "ff": 16, "max_length": 785},
    "shakespeare": {"vocab_size": 128, "dim": 16, "depth": 1, "heads": 2, "ff": 16},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SIZES", SMALL)
    monkeypatch.setattr(linear, "CURVE_POINTS", 2)
    monkeypatch.setattr(linear, "CURVE_EXAMPLES", 5)
    full = digits.load()
    monkeypatch.setattr(digits, "load", lambda: (full[0][:200], full[1][::50]))
    monkeypatch.setattr(shakespeare, "load", lambda load=shakespeare.load: (load()[0], load()[1][:2000]))


def test_the_digits_are_ten_thousand_and_the_test_set_is_apart():
    images = digits.read_idx(linear._path("digits").parent / "digits-images-idx3-ubyte.gz")
    assert images.shape == (10_000, 28, 28)
    train, test = digits.load()
    assert test.shape == (20, 785)
    assert Counter(test[:, 0].tolist()) == {digits.LEVELS + digit: 2 for digit in range(10)}
    assert int(train[:, 1:].max()) == digits.LEVELS - 1
    shown = digits.pictures(test[:1, 1:].long())
    assert len(shown[0]) == len(shown[0][0]) == 28 and max(max(row) for row in shown[0]) == 255


def test_plays_are_ascii_and_excerpts_are_from_them(generator: torch.Generator):
    train, test = shakespeare.load()
    assert int(train.max()) < 128 and shakespeare.decode(test[:7]) == "MACBETH"
    text = shakespeare.decode(train)
    batch = next(iter(shakespeare.Excerpts(train, size=3, length=50, generator=generator)))
    assert all(shakespeare.decode(row) in text for row in batch)
    assert shakespeare.decode(shakespeare.encode("To be")[0]) == "To be"


@pytest.mark.parametrize("method", linear.METHODS)
def test_every_method_spends_the_same(method, tmp_path: Path):
    record = linear.train(Run("digits", method, 1e-3, TINY), tmp_path / "no.pt")
    spent = sum(record["flops"].values())
    assert TINY <= spent < TINY * 1.1
    assert record["flops"].get("other", 0) == 0
    assert 0 < record["bits_per_dim"] < math.log2(digits.VOCABULARY) + 0.5
    assert record["curve"][0]["share"] < 0.1


def test_a_run_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run("shakespeare", "modern", 1e-3, TINY)
    whole = linear.train(run, tmp_path / "no.pt")
    monkeypatch.setattr(linear, "CHECKPOINT_SECONDS", 0.0)

    class Stop(Exception): ...

    def stop(share: float) -> None:
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        linear.train(run, tmp_path / "half.pt", stop)
    resumed = linear.train(run, tmp_path / "half.pt")
    for key in ("bits_per_dim", "flops", "steps", "curve"):
        assert resumed[key] == whole[key], key


def test_the_best_rate_is_taken_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beyond the grid, too, and a run that diverged is no best."""
    best = {"softmax": 0.001, "linear": 0.004, "modern": 0.016}
    asked = []

    def fake(runs, train, folder, *, title):
        asked.extend(runs)
        off = [abs(math.log2(run.rate / best[run.method])) for run in runs]
        return [{"bits_per_dim": None if run.rate > 0.02 else bits} for run, bits in zip(runs, off, strict=True)]

    monkeypatch.setattr(linear, "run_all", fake)
    linear.compare(tmp_path, 1e12)
    final = {run.method: (run.rate, run.flops) for run in asked if run.kind == "run"}
    assert final == {method: (rate, 1e12) for method, rate in best.items()}
    assert all(run.flops == 1e11 for run in asked if run.kind == "tune")


def test_bits_are_those_of_the_decoder(generator: torch.Generator):
    model = linear.build("shakespeare", "modern")
    text = shakespeare.load()[1][:768]
    exact = linear.bits_per_dim(model, "shakespeare", text)
    excerpts = text.view(-1, linear.EXCERPT).long()
    assert linear.bits_decoded(model, excerpts, "float32") == pytest.approx(exact, rel=1e-5)
    assert linear.bits_decoded(model, excerpts, "int8") == pytest.approx(exact, rel=0.02)


def test_what_is_painted_and_completed(generator: torch.Generator):
    model = linear.build("digits", "linear")
    painted = linear.paint(model, 1, generator)
    assert painted["digits"] == list(range(10)) and len(painted["pictures"]) == 10
    sequences = digits.load()[1][:2]
    completed = linear.complete(model, sequences, 3, generator)
    assert [len(pictures) for pictures in completed["completions"]] == [3, 3]
    for original, pictures in zip(completed["originals"], completed["completions"], strict=True):
        for picture in pictures:
            assert picture[:14] == original[:14]
        assert pictures[0][14:] != pictures[1][14:]
    text = "".join(linear.write_play(linear.build("shakespeare", "modern"), "MACBETH", 20, generator))
    assert len(text) == 20


@pytest.mark.parametrize("kind", [CacheDecoder, ModuleDecoder])
@torch.inference_mode()
def test_the_cache_decoders_are_the_softmax_model(kind: Any, generator: torch.Generator):
    model = SoftmaxCausalLM(50, 24, 2, 3, 40, max_length=9)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(50, (2, 9), generator=generator)
    decoder, whole = kind(model, 2, 9), model(ids)
    for i in range(9):
        torch.testing.assert_close(decoder.step(ids[:, i]), whole[:, i])
    assert not torch.allclose(whole, LinearCausalLM(50, 24, 2, 3, 40, max_length=9)(ids), atol=0.1)


def test_gauss_points_average_a_generation():
    assert sum(weight for _, weight in GAUSS) == pytest.approx(1)
    at = {p: 3.0 + 0.1 * p + 1e-4 * p**2 for p in positions(784)}
    exact = sum(3.0 + 0.1 * p + 1e-4 * p**2 for p in range(784)) / 784
    assert mean_over(784, at) == pytest.approx(exact, rel=2e-3)


def test_speeds_are_complete():
    size: Any = {**SMALL["digits"], "max_length": 64}
    result = measure(LinearCausalLM(**size), SoftmaxCausalLM(**size), batch=1, lengths=(16, 64), rounds=2, burst=1)
    assert [row["length"] for row in result["lengths"]] == [16, 64]
    for row in result["lengths"]:
        assert set(row["tokens_per_second"]) == {"linear", "linear, int8", "cache", "modules", "no cache"}
        for baseline in ("cache", "modules", "no cache"):
            assert row[f"gain over {baseline}"]["linear"] == pytest.approx(
                row["tokens_per_second"]["linear"] / row["tokens_per_second"][baseline]
            )
    assert {len(curve) for curve in result["by_position"].values()} == {8}


def test_the_shipped_digit_model_is_what_its_file_says():
    path = linear._path("digits")
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()["about"]
    assert about.startswith("python -m flopwise.experiments.linear digits: modern") and "0.495 bits" in about
    assert path.stat().st_size < 1.2e6
    model = linear.shipped("digits")
    assert linear.bits_per_dim(model, "digits", digits.load()[1]) == pytest.approx(0.447, abs=0.005)  # 20 of the 1,000
    swapped = digits.load()[1].clone()
    swapped[:, 0] = digits.LEVELS + (swapped[:, 0] - digits.LEVELS + 1) % 10  # it listens to the class
    assert linear.bits_per_dim(model, "digits", swapped) > linear.bits_per_dim(model, "digits", digits.load()[1]) + 0.01


def test_the_shipped_play_model_writes_ascii(generator: torch.Generator):
    path = linear._path("shakespeare")
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["about"].startswith("python -m flopwise.experiments.linear shakespeare: modern")
    assert path.stat().st_size < 2.5e6
    model = linear.shipped("shakespeare")
    assert linear.bits_per_dim(model, "shakespeare", shakespeare.load()[1]) < 3.3  # uniform: 7
    assert len("".join(linear.write_play(model, "MACBETH.\n", 50, generator))) == 50
