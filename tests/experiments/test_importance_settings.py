"""The settings on tiny budgets: equal FLOPs, data and networks that are what they say, a grid that widens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flopwise.experiments import importance_settings as settings
from flopwise.experiments.importance_settings import SETTINGS, Run, SmallTransformer, train
from flopwise.experiments.runner import Records

TINY = 6e9


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "CURVE_POINTS", 1)
    monkeypatch.setattr(settings, "CURVE_EXAMPLES", 100)
    monkeypatch.setattr(settings, "END_EXAMPLES", 200)
    monkeypatch.setitem(SETTINGS, "digit_rows", replace(SETTINGS["digit_rows"], tested=200))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_classification_that_follows_its_seed(name: str):
    setting = SETTINGS[name]
    try:
        data = setting.data()
        models = [setting.model(seed) for seed in (0, 0, 1)]
    except ValueError as missing:
        pytest.skip(str(missing))
    generator = torch.Generator().manual_seed(0)
    x, y, index = next(iter(settings.passes(setting, data, size=6, seed=0)))
    assert torch.equal(y, data.train_y[index]) and len(data.test_x) == len(data.test_y) > 500
    plain = setting.inputs(data.train_x[index], None)
    assert plain.shape == x.shape and not torch.equal(plain, x)
    assert torch.equal(plain, setting.inputs(data.train_x[index], None))
    assert not torch.equal(setting.inputs(data.train_x[index], generator), plain)
    first, same, other = (model.eval()(plain) for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.shape == (6, int(data.train_y.max()) + 1) and data.test_y.max() <= data.train_y.max()
    middle = sorted(setting.rates)[len(setting.rates) // 2]
    assert len(setting.rates) >= 3 and min(setting.rates) < middle < max(setting.rates)


@pytest.mark.parametrize("method", settings.METHODS)
def test_every_method_spends_the_same(method: str, tmp_path: Path):
    record = train(Run("digit_rows", method, 0, 16, 1e-3, TINY), tmp_path / "no.pt")
    spent = sum(record["flops"].values())
    assert TINY <= spent < 1.2 * TINY and not record["flops"]["other"]
    assert 0 < record["train_loss"] < 10 and 0 < record["test_error"] < 1
    assert record["curve"][0]["share"] < 0.2 and record["curve"][-1]["share"] == 1.0


@pytest.mark.parametrize("tested", [1, 7, 1000])
def test_errors_are_among_as_many_as_asked(tested: int):
    setting = SETTINGS["digit_rows"]
    _, error = settings.evaluate(settings.half_the_rows(0), setting, setting.data(), limit=2, tested=tested)
    assert error * tested == pytest.approx(round(error * tested), abs=1e-4) and (tested == 1 or 0.5 < error < 1)


def test_labels_are_wrong_and_classes_rare_as_asked():
    plain, wrong, tail = settings.fashion(), settings.fashion(noise=0.2), settings.fashion(tail=50.0)
    assert 0.16 < (plain.train_y != wrong.train_y).float().mean() < 0.2  # one in ten is drawn right
    assert torch.equal(plain.test_y, wrong.test_y) and torch.equal(plain.train_x, wrong.train_x)
    counts = tail.train_y.bincount().tolist()
    assert counts == sorted(counts, reverse=True) and counts[-1] == 20 and counts[0] > 900


def test_padding_changes_nothing(generator: torch.Generator):
    model = SmallTransformer(nn.Embedding(20, 64, padding_idx=0), length=9, classes=3, seed=0).eval()
    ids = torch.randint(1, 20, (2, 9), generator=generator)
    ids[0, 5:] = 0
    short = SmallTransformer(nn.Embedding(20, 64, padding_idx=0), length=9, classes=3, seed=0).eval()
    short.position.data = short.position.data[:5]
    torch.testing.assert_close(model(ids)[0], short(ids[:1, :5])[0])


def test_batch_sizes_are_tuned_over_seeds_and_inside_their_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A quarter of the loss lies between a batch size and the next; rates are best at 0.001."""

    def run_all(runs, *_, **__):
        seen.extend(runs)
        found = [abs(run.batch_size - 64) / 64 + 100 * abs(run.rate - 1e-3) + 1 + 0.01 * run.seed for run in runs]
        return [{"train_loss": loss} for loss in found]

    seen: list[Run] = []
    monkeypatch.setattr(settings, "run_all", run_all)
    monkeypatch.setattr("flopwise.experiments.runner.run_all", run_all)
    tuned = settings.tune("digit_rows", tmp_path, seeds=2)
    assert (tuned.batch_size, tuned.rate, tuned.seed, tuned.kind) == (64, 1e-3, 0, "tune")
    assert {run.batch_size for run in seen} == {8, 16, 32, 64, 128}
    assert {(run.rate, run.seed) for run in seen if run.batch_size == 64} == {
        (0.0005, 0), (0.001, 0), (0.002, 0), (0.001, 1)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ([[1.0, 1.04], [1.03, 1.05], [1.3, 1.4]], 1),
        ([[1.0, 1.04], [1.1, 1.2], [1.3, 1.4]], 0),
        ([[1.3, 1.4], [1.0, 1.1], [1.0, 1.0]], 2),
    ],
)
def test_of_batch_sizes_that_are_alike_the_largest_is_taken(losses: list[list[float]], chosen: int):
    assert settings.largest_alike(losses) == chosen


def test_uniforms_best_run_is_not_trained_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    small = replace(SETTINGS["digit_rows"], flops=TINY)
    monkeypatch.setitem(SETTINGS, "digit_rows", small)
    tuned = Run("digit_rows", "uniform", 0, 16, 1e-3, TINY, kind="tune")
    Records(tmp_path).add(tuned, train(tuned, tmp_path / "no.pt"))
    monkeypatch.setattr(settings, "tune", lambda name, folder: tuned)
    monkeypatch.setattr(settings, "run_all", lambda runs, *_, **__: asked.extend(runs))
    asked: list[Run] = []
    settings.compare(["digit_rows"], tmp_path, seeds={"uniform": 2, "flopwise": 1})
    records = Records(tmp_path)
    assert [(run.method, run.seed) for run in asked] == [("uniform", 0), ("flopwise", 0), ("uniform", 1)]
    found = records.find(asked[0])
    assert found is not None and found["kind"] == "run" and len(records.all) == 2


def test_an_audit_of_a_setting():
    audit = settings.audit("digit_rows", budget=64, seconds=4)
    assert [stage.steps for stage in audit.stages] == [0, 4, 8, 16, 32, 48] and audit.batch_size == 16
    assert audit.budget == 64 and not audit.helps
    assert settings.uniform_steps(SETTINGS["digit_rows"]) > 1000


def test_equal_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    uniform = Run("digit_rows", "uniform", 1, 16, 1e-3, TINY)
    Records(tmp_path).add(uniform, train(uniform, tmp_path / "no.pt"))
    seconds = Records(tmp_path).all[0]["seconds"]
    monkeypatch.setattr(settings, "run_all", lambda runs, *_, **__: asked.extend(runs))
    asked: list[settings.TimedRun] = []
    seeds = {"uniform": 2, "flopwise": 2, "infobatch": 1}
    settings.compare_seconds(["digit_rows", "fashion"], tmp_path, seeds=seeds)
    other, run = asked
    assert (run.method, run.seed, run.rate, run.kind, run.seconds) == ("flopwise", 1, 1e-3, "timed", seconds)
    assert other == replace(run, method="uniform")
    record = train(run, tmp_path / "no.pt")
    assert record["kind"] == "timed" and seconds <= record["seconds"] < 2 * seconds + 0.5


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(settings, "PACKAGES", {"no_such_package.data": "no-such==1", "torch": "torch==2"})
    monkeypatch.setattr(settings.fashion_mnist, "FULL", tmp_path)
    assert settings.missing() == ["pip install --no-deps no-such==1"]
    monkeypatch.setattr(settings.fashion_mnist, "FULL", tmp_path / "none")
    assert settings.missing() == ["pip install --no-deps no-such==1", "apt install dataset-fashion-mnist"]
    with pytest.raises(ValueError, match="pip install --no-deps no-such==1"):
        settings._folder("no_such_package.data")


def test_seeds_are_a_methods_own_and_a_proxy_is_a_settings():
    seeds = {"uniform": 2, "flopwise_proxy": 1}
    assert settings.methods("topics", seeds, 0) == ["uniform", "flopwise_proxy"]
    assert settings.methods("topics", seeds, 1) == settings.methods("earth_tiles", seeds, 0) == ["uniform"]
