"""The attention experiment: it runs, resumes where it was, and its baseline is what it says."""

from pathlib import Path

import pytest
import torch

from flopwise.experiments import attention
from flopwise.experiments.attention import CpuLedger, Run, WholeImage, make_model, train
from flopwise.models import GlimpseClassifier


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "TEST_IMAGES", 4)
    monkeypatch.setattr(attention, "CURVE_IMAGES", 2)
    monkeypatch.setattr(attention, "WHOLE_CURVE_IMAGES", 2)
    monkeypatch.setattr(attention, "CURVE_POINTS", 2)


@pytest.mark.parametrize("method", ["murthy", "cnn_4", "lowres_8"])
def test_a_run_gives_a_whole_record(method: str, tmp_path: Path):
    record = train(Run(method, 0, seconds=0.2, side=400, batch_size=2), tmp_path / "checkpoints" / "run.pt")
    assert 0 <= record["test_error"] <= 1 and record["examples"] >= 2 and record["flops"] > 0
    assert record["seconds"] >= 0.2
    assert record["curve"][-1]["share"] == 1.0
    if method == "murthy":
        assert set(record["test_errors"]) == {"topk_5", "topk_10", "topk_20", "n_5"}
        loaded = GlimpseClassifier.load(tmp_path / "models" / method)
        assert loaded.config.estimator == method


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "CHECKPOINT_SECONDS", 0.0)
    run = Run("murthy", 0, seconds=1.5, side=400, batch_size=2)

    class Killed(Exception):
        pass

    def kill(share: float) -> None:
        if (tmp_path / "run.pt").exists():  # after the first step, however long that took
            raise Killed

    with pytest.raises(Killed):
        train(run, tmp_path / "run.pt", kill)
    steps = torch.load(tmp_path / "run.pt", weights_only=True)["record"]["steps"]
    assert steps >= 1
    record = train(run, tmp_path / "run.pt")
    assert record["steps"] > steps


def test_the_full_network_has_the_features_of_every_patch():
    """At a patch's place, the whole-image network sees what the glimpse classifier's features see of that patch."""
    whole = make_model(Run("cnn_1", 0, 1.0))
    glimpse = make_model(Run("murthy", 0, 1.0))
    assert isinstance(whole, WholeImage) and isinstance(glimpse, GlimpseClassifier)
    layers = glimpse.look.feature[:-2]  # type: ignore[index]
    whole.features.load_state_dict(layers.state_dict())
    image = torch.rand(1, 1, 120, 120, generator=torch.Generator().manual_seed(0))
    dense = whole.features(image)
    patch = image[:, :, 40:80, 48:88]  # apart from the zero padding at a patch's edge
    assert dense.shape[2:] == (11, 11) and layers(patch).shape[2:] == (1, 1)
    inner = [layer for layer in layers if not isinstance(layer, torch.nn.Conv2d) or layer.padding == (0, 0)]
    assert len(inner) < len(layers)


def test_cpu_seconds_stand_still_in_a_pause():
    ledger = CpuLedger()
    with ledger:
        with ledger.paused():
            before = ledger.seconds
            sum(i * i for i in range(300_000))
            assert ledger.seconds == before
        sum(i * i for i in range(300_000))
        assert ledger.seconds > before
    again = CpuLedger()
    again.load_state_dict(ledger.state_dict())
    assert again.seconds == ledger.seconds


def test_attention_waits_for_features():
    model = make_model(Run("murthy", 0, 1.0))
    optimizer = torch.optim.Adam([{"params": p} for p in attention.parameter_groups(model)], 1.0)
    rates = []
    for waits in (0.0, 1.0, 1.5, 2.0):
        share = waits * attention.ATTENTION_WAITS
        attention.set_rates(optimizer, 1.0, share)
        rates.append(optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"] / attention.ATTENTION_RATE)
    assert rates == pytest.approx([0.0, 0.0, 0.5, 1.0])
    names = {id(p) for p in model.parameters()}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
