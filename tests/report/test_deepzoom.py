"""An image inside a page: which tiles are in it, that they show the image, and how much they take."""

import base64
import io
import json
import sys
from importlib import resources
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image

from flopwise.report.deepzoom import TILE, Level, _key, _under, deep_zoom, viewer


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


def test_without_pillow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs PIL: pip install 'flopwise\[images\]'"):
        deep_zoom(Waves(100, 100))


# --- in a browser ---

PROBE = """<!doctype html><style>.zoom canvas { width: 300px; height: 200px; touch-action: none }</style>
VIEWER<pre id="found"></pre>
<script>requestAnimationFrame = (draw) => setTimeout(draw, 0); // headless, frames come when they like</script>
<script>SCRIPT</script><script>
const canvas = document.querySelector(".zoom canvas"), found = [];
const copy = document.createElement("canvas"), pen = copy.getContext("2d", { willReadFrequently: true });
const shot = (name) => new Promise((done) => setTimeout(() => {
  [copy.width, copy.height] = [canvas.width, canvas.height];
  pen.drawImage(canvas, 0, 0);
  const at = (x, y) => Array.from(pen.getImageData(x, y, 1, 1).data).join(",");
  found.push(`${name} ${canvas.dataset.view} ${at(150, 100)} ${at(1, 1)}`);
  document.querySelector("#found").textContent = found.join("\\n");
  done();
}, 200));
const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
const pointer = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type, { pointerId: 1, clientX: x, clientY: y }));
canvas.setPointerCapture = () => {};
const wheel = () => canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -300, cancelable: true }));
(async () => {
  await shot("whole");
  wheel(); await shot("unfocused");
  for (let i = 0; i < 5; i++) press("+");
  await shot("closer");
  press("ArrowRight"); await shot("right");
  pointer("pointerdown", 100, 100); pointer("pointermove", 137, 100); pointer("pointerup", 137, 100);
  await shot("dragged");
  press("0"); await shot("again");
  canvas.focus(); wheel(); await shot("wheel");
  document.querySelector("[data-box]").click(); await shot("box");
})();
</script>"""


@pytest.mark.skipif(browser.BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_a_browser(tmp_path: Path):
    box = (2_000.0, 2_600.0, 100.0, 120.0)
    image = Waves(3_000, 4_000)
    markup = viewer(deep_zoom(image, regions=[box], budget=300_000), 'a "wave"', boxes=[box])
    markup = markup.replace("</div>", '<button data-box="0">the patch</button></div>')
    script = resources.files("flopwise.report").joinpath("deepzoom.js").read_text(encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE.replace("VIEWER", markup).replace("SCRIPT", script), encoding="utf-8")
    done = browser.run((tmp_path / "probe.html").as_uri(), tmp_path, "--dump-dom")
    assert browser.logged(done) == []
    lines = done.stdout.split('<pre id="found">')[1].split("</pre>")[0].splitlines()
    seen = {name: (list(map(float, view)), centre, corner) for name, *view, centre, corner in map(str.split, lines)}

    def shows(name: str, y: float, x: float) -> None:
        """The middle of the canvas has the colour that the image has at (y, x)."""
        truth = image.read(0, round(y), round(x), 1, 1)[:, 0, 0].astype(int)
        assert np.abs(np.array(list(map(int, seen[name][1].split(",")[:3]))) - truth).max() < 12, (
            name,
            seen[name],
            truth,
        )

    (x, y, scale), _, corner = seen["whole"]
    assert (
        scale == pytest.approx(200 / 3000, abs=1e-4)
        and y == pytest.approx(0, abs=1)
        and x == pytest.approx(-250, abs=1)
    )
    assert corner == "0,0,0,0"  # beside the image
    shows("whole", 1500, 2000)
    assert seen["unfocused"] == seen["whole"]
    assert seen["closer"][0][2] == pytest.approx(scale * 1.5**5, rel=1e-3)
    shows("closer", 1500, 2000)
    moved = 300 / 8 / seen["closer"][0][2]
    assert seen["right"][0][0] - seen["closer"][0][0] == pytest.approx(moved, rel=1e-2)
    shows("right", 1500, 2000 + moved)
    assert seen["right"][0][0] - seen["dragged"][0][0] == pytest.approx(37 / seen["closer"][0][2], rel=1e-2)
    assert seen["again"][0] == seen["whole"][0] and seen["wheel"][0][2] > 2 * scale
    assert seen["box"][0][2] == pytest.approx(200 / 100 / 2, rel=1e-3)
    shows("box", 2050, 2660)
