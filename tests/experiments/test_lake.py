"""The lake task: crops of both kinds, no pixel that both training and test crops see, runs that give whole records."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flopwise.experiments import lake
from flopwise.experiments.lake import BANDS, CROP, MIRRORS, WIDTH, Earth, LakeCrops, Run, make_model, places, train
from flopwise.experiments.runner import Records

HEIGHT = 1600  # less than of the Earth, to be quick


@pytest.fixture
def planet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Earth]:
    """An Earth of noise, with lakes in some places."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=g, dtype=torch.uint8)
    water = torch.zeros(HEIGHT, WIDTH)
    for column in (200, 2300, 4000):
        water[1000:1020, column : column + 30] = 1.0
    made = Earth(pixels, water, torch.ones(HEIGHT, WIDTH))
    monkeypatch.setattr(lake, "earth", lambda: made)
    monkeypatch.setattr(lake, "TEST_CROPS", 8)
    for cached in (lake.level, lake.mirrored, lake.earths_places):
        cached.cache_clear()
    yield made
    for cached in (lake.level, lake.mirrored, lake.earths_places):
        cached.cache_clear()


@pytest.mark.parametrize("band", range(3))
def test_training_crops_do_not_touch_the_test_band(band: int):
    shares = torch.zeros(HEIGHT, WIDTH), torch.ones(HEIGHT, WIDTH)
    used = {}
    for split in ("train", "test"):
        without, with_lake = places(*shares, band, split)
        assert not len(with_lake) and len(without)
        used[split] = {c for x in without[:, 1].unique().tolist() for c in range(x, x + CROP)}
    assert not used["train"] & used["test"]
    assert used["test"] <= set(range(*BANDS[band]))


def test_a_lake_is_counted_where_it_is_wide_enough():
    water, land = torch.zeros(HEIGHT, WIDTH), torch.ones(HEIGHT, WIDTH)
    water[1000:1008, 4500:4508] = 1.0  # just wide enough
    water[1200:1207, 300:900] = 1.0  # too narrow, and too wide for "without"
    water[1500:1505, 2300:2600] = 1.0  # narrow enough not to count
    without, with_lake = places(water, land, 0, "train")
    y, x = with_lake.unbind(1)
    assert len(with_lake) and ((y <= 1000) & (y + CROP >= 1008) & (x <= 4500) & (x + CROP >= 4508)).all()
    assert 0 in without[:, 0] and 2304 in without[:, 1]  # the last lake is in many of these
    y, x = places(water, land, 0, "test")[0].unbind(1)
    assert not ((y <= 1190) & (y + CROP >= 1230) & (x <= 300)).any()


def test_a_batch_has_as_many_lakes_as_not_and_low_views_of_its_crops(planet: Earth):
    loader = LakeCrops(size=16, reduction=8, band=0)
    low, high, labels, at = loader.make()
    assert low.shape == (16, 3, CROP // 8, CROP // 8) and labels.tolist() == [0, 1] * 8
    expected = torch.stack(high).view(16, 3, CROP // 8, 8, CROP // 8, 8).float().mean((3, 5)) / 255
    torch.testing.assert_close(low, expected)
    seen = set()
    for crop, (y, x) in zip(high, at.tolist(), strict=True):
        there = planet.pixels[:, y : y + CROP, x : x + CROP]
        seen |= {mirror for mirror in MIRRORS if torch.equal(crop, there.flip([d + 1 for d in (0, 1) if mirror[d]]))}
    assert seen == set(MIRRORS)


@pytest.mark.parametrize("method", ["murthy", "cnn_8"])
def test_a_run_gives_a_whole_record(method: str, planet: Earth, tmp_path: Path):
    run = Run(method, 0, seconds=0.05, batch_size=2)
    record = train(run, tmp_path / "checkpoints" / "run.pt")
    assert 0 <= record["test_error"] <= 1 and record["examples"] >= 2 and record["flops"] > 0
    assert 0.2 < record["train_loss"] < 5 and record["seconds"] >= 0.05
    if method == "murthy":
        assert set(record["test_errors"]) == {"topk_16", "topk_64", "n_64"}
        lake.show(tmp_path, run, count=4)
        assert (tmp_path / "looked.jpg").stat().st_size > 10_000
        (looked,) = Records(tmp_path).all
        assert looked["labels"] == ["no lake", "lake"] * 2 and len(looked["predicted"]) == 4


def test_whole_image_networks_have_four_layers_at_every_resolution():
    assert [str(make_model(Run(f"cnn_{r}", 0, 1.0)).features) for r in (1, 2, 4)] == [
        str(make_model(Run("cnn_8", 0, 1.0)).features)
    ] * 3
