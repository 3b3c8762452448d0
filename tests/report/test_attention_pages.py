"""The pages of attention sampling: of its demo, and of what `flopwise look` saw in one image."""

import json

import numpy as np
import pytest
from pages import Balance, check, written

from flopwise.report.look import write_look

MADE = {
    "machine": {"processor": "P", "cores": 2},
    "commit": "abc",
    "time": "2026-11-24T05:00:00Z",
    "experiment": "attention",
}
GREY = [[0, 255], [128, 3]]


def run(method: str, seed: int, error: float) -> dict:
    curve = [{"seconds": s, "test_error": e} for s, e in ((12.0, 0.9), (60.0, 0.5), (120.0, error))]
    return {
        "kind": "run",
        "method": method,
        "seed": seed,
        "rate": 0.002,
        "budget": {"seconds": 120.0},
        "data": {"name": "digits in noise", "side": 1500, "test": 2000},
        "flops": 1e12,
        "seconds": 120.2,
        "examples": 9000 if method == "murthy" else 90,
        "test_error": error,
        "test_errors": {"topk_10": error - 0.01} if method == "murthy" else {},
        "curve": curve,
    }


LOOKED = {"kind": "looked", "label": 3, "predicted": 5, "low": GREY, "attention": [[0.5, 0.25], [0.25, 0.0]]}
RECORDS = [
    run("murthy", 0, 0.14),
    run("murthy", 1, 0.16),
    run("replacement", 0, 0.3),
    run("cnn_1", 0, 0.88),
    run("cnn_4", 0, 0.4),
    {"kind": "tune", "method": "cnn_4", "rate": 0.002},
    {"kind": "cost", "side": 1500, "method": "murthy", "milliseconds": 6.7, "megabytes": 5.7},
    LOOKED | {"patches": [GREY] * 5},
]


def page_of(tmp_path, records) -> str:
    text = written(tmp_path, [MADE | record for record in records])
    check(text)
    return text


def test_the_page_compares_at_equal_seconds_and_shows_glimpses(tmp_path):
    text = page_of(tmp_path, RECORDS)
    assert "Attention sampling: a few patches beat every pixel" in text
    assert "15.0 %" in text and "40.0 %" in text and "the whole image at 1/4" in text and "100 ×" in text
    assert "15.0 ± 1.4" in text and "it said 5" in text and "When not to use attention sampling" in text


SHIPPED = {"kind": "shipped", "test_error": 0.2, "tested": 300, "side": 1500, "n_patches": 10, "patch_size": 40}


def test_a_model_that_came_trained(tmp_path):
    whole = {"kind": "cost", "side": 1500, "method": "cnn_1", "milliseconds": 670.0, "megabytes": None}
    text = page_of(tmp_path, [SHIPPED, whole, *RECORDS[-2:]])
    assert "a few patches of a large image are enough" in text and "20.0 %" in text and "100 ×" in text
    assert "0.7 % of its pixels" in text and "less added memory" not in text
    assert "a few patches beat every pixel" in page_of(
        tmp_path, [SHIPPED, *RECORDS]
    )  # trained here: that is what counts


def test_a_loss_is_called_a_loss(tmp_path):
    text = page_of(tmp_path, [run("murthy", 0, 0.5), run("cnn_4", 0, 0.4)])
    assert "every pixel was better here" in text


@pytest.mark.parametrize("count", range(len(RECORDS)))
def test_any_part_of_the_records_makes_a_page(tmp_path, count):
    page_of(tmp_path, RECORDS[:count] + RECORDS[count + 1 :])
    page_of(tmp_path, [RECORDS[count]])


class Image:
    """A pyramid of two levels, each of one grey."""

    class Level:
        def __init__(self, height: int, width: int, downsample: float) -> None:
            self.height, self.width, self.downsample = height, width, downsample

    levels = (Level(600, 1000, 1.0), Level(150, 250, 4.0))

    def read(self, level: int, y: int, x: int, height: int, width: int) -> np.ndarray:
        return np.full((1, height, width), 50 * level, np.uint8)


SEEN = {
    "image": "a <slide>.tiff",
    "model": "model",
    "label": "ill",
    "probabilities": {"healthy": 0.25, "ill": 0.75},
    "microns_per_pixel": [0.5, 0.5],
    "attention": {"rows": [[0.5, 0.25], [0.25, 0.0]], "corner": [-10.0, 4.0], "step": [300.0, 490.0]},
    "patches": [
        {"y": -3, "x": 700, "height": 40, "width": 40, "weight": 0.25},
        {"y": 300, "x": 20, "height": 40, "width": 40, "weight": 0.75},
    ],
}


def test_look_joins_tiles_attention_and_patches_in_pixels_of_the_image(tmp_path):
    write_look(tmp_path / "index.html", SEEN, Image(), list(np.zeros((2, 1, 40, 40), np.uint8)))
    text = (tmp_path / "index.html").read_text()
    balance = Balance()
    balance.feed(text)
    assert balance.open == [] and all(source.startswith("data:image/") for source in balance.sources)
    data = json.loads(text.split('<script type="application/json">')[1].split("</script>")[0])
    assert (data["width"], data["height"], len(data["levels"])) == (1000, 600, 2)
    overlay = {name: value for name, value in data["overlay"].items() if name != "uri"}
    assert overlay == {"y": -10.0, "x": 4.0, "height": 600.0, "width": 980.0}
    assert data["boxes"][0] == {"y": -3, "x": 700, "height": 40, "width": 40}
    assert text.index('data-box="1"') < text.index('data-box="0"')  # the heavier first
    assert "a &lt;slide&gt;.tiff" in text and "0.150" in text and "0.5 %" in text
