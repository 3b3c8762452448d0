"""An image inside a page: which tiles are in it, that they show the image, and how much they take."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from flopwise.experiments.deep_zoom import TILE, Level, _key, _under, deep_zoom


class Size:
    def __init__(self, height: int, width: int, downsample: int) -> None:
        self.height, self.width, self.downsample = height, width, downsample


class Waves:
    """A pyramid of smooth waves, computed where it is read; `read_places` is what was."""

    def __init__(self, height: int, width: int, channels: int = 3) -> None:
        self.channels = channels
        self.levels: list[Level] = [Size(height, width, 1)]
        while max(self.levels[-1].height, self.levels[-1].width) > 64:
            last = self.levels[-1]
            self.levels.append(Size(-(-last.height // 2), -(-last.width // 2), 2 * round(last.downsample)))
        self.read_places: list[tuple[int, int, int]] = []

    def read(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        self.read_places.append((level, y, x))
        step = self.levels[level].downsample
        rows, columns = np.meshgrid(np.arange(y, y + height) * step, np.arange(x, x + width) * step, indexing="ij")
        wave = 127 + 60 * np.sin(rows / 300) + 60 * np.cos(columns / 500)
        return np.stack([wave * (1 - 0.2 * c) for c in range(self.channels)]).astype(np.uint8)


def decoded(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        return np.asarray(picture).astype(int)


def length(page: dict) -> int:
    return sum(len(uri) for level in page["levels"] for uri in level["tiles"].values())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_image_is_there_as_a_whole(channels: int):
    image = Waves(700, 900, channels)
    page = json.loads(json.dumps(deep_zoom(image)))
    assert (page["height"], page["width"], page["tile"], page["whole"]) == (700, 900, TILE, 5)
    assert [level["downsample"] for level in page["levels"]] == [16, 8, 4, 2, 1]
    assert set(page["levels"][-1]["tiles"]) == {f"{row},{column}" for row in range(3) for column in range(4)}
    for number, level in enumerate(reversed(page["levels"])):
        for key, uri in level["tiles"].items():
            row, column = map(int, key.split(","))
            seen = decoded(uri)
            truth = image.read(number, row * TILE, column * TILE, *seen.shape[:2]).transpose(1, 2, 0)
            assert seen.shape[0] == min(TILE, level["height"] - row * TILE)
            assert seen.shape[1] == min(TILE, level["width"] - column * TILE)
            assert np.abs(seen.reshape(truth.shape) - truth).mean() < 3


def test_of_a_large_one_the_fine_tiles_are_those_that_were_looked_at():
    image = Waves(100_000, 80_000)
    regions = [(50_000.0, 40_000.0, 300.0, 200.0), (-100.0, 79_900.0, 200.0, 200.0)]
    page = deep_zoom(image, regions=regions, budget=1_000_000)
    assert 1 <= page["whole"] < len(image.levels) and 200_000 < length(page) <= 1_000_000
    assert set(page["levels"][-1]["tiles"]) == {
        *(f"{row},{column}" for row in (195, 196) for column in (156, 157)),
        *(f"0,{column}" for column in (312,)),
    }
    assert len(image.read_places) < 400


def test_the_budget_is_kept():
    regions = [(float(y), float(x), 256.0, 256.0) for y in range(0, 20_000, 1_000) for x in range(0, 20_000, 1_000)]
    for budget in (0, 1_000, 30_000, 300_000):
        page = deep_zoom(Waves(20_000, 20_000), regions=regions, budget=budget)
        assert length(page) <= budget and len(page["levels"]) == 10
    assert page["levels"][-1]["tiles"] == {}  # the coarser ones took it all


@pytest.mark.parametrize(
    "region", [(0, 0, 256, 256), (-300, -300, 300, 300), (0, 700, 10, 10), (255.5, 256, 0.5, 1), (699, 899, 99, 99)]
)
def test_tiles_under_a_region(region: tuple[float, float, float, float]):
    """Against the slow reference: every pixel of the region, looked up."""
    image = Waves(700, 900)
    page = deep_zoom(image, regions=[region], budget=10**9, quality=20)
    coarse = Waves(700, 900)
    coarse.levels = [coarse.levels[0]]
    y, x, height, width = region
    expected = {
        f"{row},{column}"
        for row in range(3)
        for column in range(4)
        if max(y, row * TILE) < min(y + height, (row + 1) * TILE, 700)
        and max(x, column * TILE) < min(x + width, (column + 1) * TILE, 900)
    }
    assert {_key(place) for place in _under(region, coarse.levels[0])} == expected
    assert expected <= set(page["levels"][-1]["tiles"])
