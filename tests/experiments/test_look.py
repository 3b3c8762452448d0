"""`flopwise look`: from an image file and a saved classifier to a page."""

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("PIL", reason="the extra `images` is not installed")

from flopwise.attention_sampling import open_image
from flopwise.cli import app
from flopwise.models import GlimpseClassifier, GlimpseConfig


def run(*arguments):
    return CliRunner().invoke(app, ["look", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    from PIL import Image

    pixels = torch.randint(0, 255, (300, 420), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "noise.png")
    GlimpseClassifier(GlimpseConfig(classes=("left", "right"), n_patches=6)).save(tmp_path / "model")
    return tmp_path


def test_look_writes_a_page_and_the_patches(files):
    result = run(files / "noise.png", "--model", files / "model", "--patches", 4, "--out", files / "out")
    assert result.exit_code == 0, result.output
    seen = json.loads((files / "out" / "seen.json").read_text())
    assert seen["label"] in result.output and sum(seen["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert len(seen["patches"]) == 4 and sum(p["weight"] for p in seen["patches"]) == pytest.approx(1, abs=1e-4)
    assert len(json.loads((files / "out" / "patches.geojson").read_text())["features"]) == 4
    assert '"width": 420, "height": 300' in (files / "out" / "index.html").read_text()


def test_the_attention_lies_over_what_it_saw(files):
    run(files / "noise.png", "--model", files / "model", "--out", files / "out")
    seen = json.loads((files / "out" / "seen.json").read_text())
    rows, corner, step = (seen["attention"][name] for name in ("rows", "corner", "step"))
    most = max((a, i, j) for i, row in enumerate(rows) for j, a in enumerate(row))[1:]
    centre = [c + (place + 0.5) * s for c, place, s in zip(corner, most, step, strict=True)]
    model = GlimpseClassifier.load(files / "model")
    (found,) = model.predict([open_image(files / "noise.png")], estimator="topk", n_patches=1)
    assert [float(x) + 20 for x in found.positions[0]] == pytest.approx(centre, abs=1)  # patches are of 40 x 40


def test_look_says_what_is_wrong(files):
    (files / "broken.tiff").write_bytes(b"II*\0no")
    result = run(files / "broken.tiff", "--model", files / "model", "--out", files / "out")
    assert result.exit_code == 2 and "broken.tiff" in result.output
    (files / "empty").mkdir()
    result = run(files / "noise.png", "--model", files / "empty", "--out", files / "out")
    assert result.exit_code == 2 and "config.json" in result.output and not (files / "out").exists()
