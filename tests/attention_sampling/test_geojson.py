"""Patches as GeoJSON: where they lie, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from flopwise.attention_sampling.geojson import patches_geojson, write_geojson


def test_rectangles_in_pixels_of_the_finest_level(tmp_path: Path):
    positions = torch.tensor([[10, -20], [0, 7]])
    weights = torch.tensor([0.25, 0.75])
    found = patches_geojson(positions, (5, 8), downsample=4, measurements={"weight": weights}, name="glimpse")
    write_geojson(tmp_path / "a.geojson", found)
    read = json.loads((tmp_path / "a.geojson").read_text())
    assert read == found and read["type"] == "FeatureCollection"
    first, second = read["features"]
    assert first["geometry"]["type"] == "Polygon"
    assert first["geometry"]["coordinates"] == [[[-80, 40], [-48, 40], [-48, 60], [-80, 60], [-80, 40]]]
    assert second["geometry"]["coordinates"][0][0] == [28, 0]
    assert [f["properties"]["name"] for f in read["features"]] == ["glimpse 1", "glimpse 2"]
    assert [f["properties"]["measurements"]["weight"] for f in read["features"]] == [0.25, 0.75]


def test_no_patches():
    assert patches_geojson(torch.zeros(0, 2, dtype=torch.int64), (5, 8))["features"] == []


def test_a_measurement_that_does_not_fit():
    with pytest.raises(ValueError, match="each of 1 patches; 'weight' has 2"):
        patches_geojson(torch.zeros(1, 2, dtype=torch.int64), (5, 8), measurements={"weight": [1.0, 2.0]})


def test_what_json_cannot_say(tmp_path: Path):
    found = patches_geojson(torch.zeros(1, 2, dtype=torch.int64), (5, 8), measurements={"weight": [float("nan")]})
    with pytest.raises(ValueError, match="JSON"):
        write_geojson(tmp_path / "a.geojson", found)
