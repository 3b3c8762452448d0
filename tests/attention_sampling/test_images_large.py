"""What does not grow with the image: the memory of reading and of building levels; how a build survives its ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyramids import mean_of_squares, photograph, write_large, write_pyramid

from flopwise.attention_sampling.images import _opened, open_image
from flopwise.attention_sampling.readers import pyramid
from flopwise.models import GlimpseClassifier, GlimpseConfig

HEAD = """
import sys, time, torch
from flopwise.attention_sampling.images import open_image, read_patches
from flopwise.attention_sampling.readers import pyramid, tiff
torch.set_num_threads(1)
def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
begin, start = peak(), time.perf_counter()
"""
TAIL = "\nprint(time.perf_counter() - start, begin, peak())"
READ = """
image = open_image(sys.argv[1], cache=sys.argv[2])
image.thumbnail(200)
generator = torch.Generator().manual_seed(0)
for _ in range(4):
    positions = torch.randint(0, image.levels[0].height, (1, 64, 2), generator=generator)
    read_patches([image], 0, positions, (128, 128))
"""

CLASSIFY = """
from flopwise.models import GlimpseClassifier
(found,) = GlimpseClassifier.load(sys.argv[2]).predict([open_image(sys.argv[1])])
assert found.label in ("0", "1") and found.attention.shape == (386, 386) and found.patches.shape == (64, 3, 256, 256)
"""


def measured(code: str, *arguments: Path) -> tuple[float, float, float]:
    """Seconds, MB after the imports and MB at the peak, of a fresh process."""
    command = [sys.executable, "-c", HEAD + code + TAIL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, begin, peak = map(float, done.stdout.split())
    return seconds, begin, peak


class TestMemory:
    def test_of_reading_does_not_grow_with_the_image(self, tmp_path: Path):
        """20,000 x 20,000 against 5,000 x 5,000."""
        peaks = []
        for side in (5_000, 20_000):
            write_large(tmp_path / "a.tif", side, side)
            peaks.append(measured(READ, tmp_path / "a.tif", tmp_path)[2])
        assert peaks[1] < 1.1 * peaks[0]

    def test_of_classifying_a_sparse_image_of_100_000_squared(self, tmp_path: Path):
        """By a model loaded from its folder, attention over a view at 1/128, within 10 s and 500 MB."""
        write_large(
            tmp_path / "a.tif",
            100_000,
            100_000,
            present=lambda level, row, column: level > 5 or (row + column) % 97 == 0,
        )
        config = GlimpseConfig(classes=2, channels=3, patch_size=256, n_patches=64, reduction=128)
        GlimpseClassifier(config).save(tmp_path / "model")
        seconds, _, peak = measured(CLASSIFY, tmp_path / "a.tif", tmp_path / "model")
        assert seconds < 10 and peak < 500

    def test_of_building_levels_does_not_grow_with_the_image(self, tmp_path: Path):
        added = []
        for side in (1_500, 6_000):
            write_large(tmp_path / f"{side}.tif", side, side, pyramid=False)
            _, begin, peak = measured(
                "open_image(*sys.argv[1:2], cache=sys.argv[2])", tmp_path / f"{side}.tif", tmp_path
            )
            added.append(peak - begin)
        assert added[1] < added[0] + 25  # the whole image has 108 MB, a band of it 9


class TestBuilding:
    def test_is_done_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        write_pyramid(tmp_path / "a.tif", photograph(301, 237), levels=1)
        built, build = [], pyramid.build
        monkeypatch.setattr(pyramid, "build", lambda *arguments: built.append(1) or build(*arguments))
        for _ in range(3):
            _opened.cache_clear()
            open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
        assert len(built) == 1 and len(list((tmp_path / "cache").iterdir())) == 1

    def test_is_done_again_when_the_image_changes(self, tmp_path: Path):
        for side in (301, 400):
            write_pyramid(tmp_path / "a.tif", photograph(side, side), levels=1)
            image = open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
            half = mean_of_squares(photograph(side, side))
            seen = image.read(1, 0, 0, image.levels[1].height, image.levels[1].width)
            assert np.array_equal(seen.permute(1, 2, 0).numpy(), half)

    def test_an_error_leaves_no_levels_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        write_pyramid(tmp_path / "a.tif", photograph(301, 237), levels=1)

        def fails(*_: object) -> np.ndarray:
            raise OSError("no space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(pyramid, "halved", fails)
            with pytest.raises(OSError, match="no space left"):
                open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
        assert [(path.suffix, path.stat().st_size) for path in (tmp_path / "cache").iterdir()] == [(".part", 0)]
        assert len(open_image(tmp_path / "a.tif", cache=tmp_path / "cache").levels) == 4

    def test_a_killed_one_is_begun_again(self, tmp_path: Path):
        write_large(tmp_path / "a.tif", 3_000, 3_000, pyramid=False, compression="zlib")
        code = f"open_image({str(tmp_path / 'a.tif')!r}, cache={str(tmp_path / 'cache')!r})"
        child = subprocess.Popen([sys.executable, "-c", HEAD + code])
        cache = tmp_path / "cache"
        while not (cache.exists() and any(path.stat().st_size for path in cache.iterdir())):
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert [path.suffix for path in cache.iterdir()] == [".part"]
        image = open_image(tmp_path / "a.tif", cache=cache)
        assert [path.suffix for path in cache.iterdir()] == [".tiff"]
        whole = image.read(0, 0, 0, 3000, 3000).permute(1, 2, 0).numpy()
        assert np.array_equal(image.read(1, 0, 0, 1500, 1500).permute(1, 2, 0).numpy(), mean_of_squares(whole))

    @pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
    def test_processes_that_want_the_same_wait_for_one(self, tmp_path: Path):
        write_large(tmp_path / "a.tif", 1_000, 1_000, pyramid=False)
        context = multiprocessing.get_context("fork")
        log = tmp_path / "log"
        log.touch()
        build = pyramid.build

        def counted(*arguments) -> None:
            with log.open("a") as file:
                file.write("built\n")
            build(*arguments)

        def child() -> None:
            pyramid.build = counted
            image = open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
            os._exit(0 if len(image.levels) == 5 else 1)

        children = [context.Process(target=child) for _ in range(4)]
        for process in children:
            process.start()
        for process in children:
            process.join()
        assert [process.exitcode for process in children] == [0] * 4 and log.read_text() == "built\n"

    def test_strips_wider_than_a_block(self, tmp_path: Path):
        pixels = photograph(70, 9_000)
        write_pyramid(tmp_path / "a.tif", pixels, levels=1, tile=None, rowsperstrip=33)
        image = open_image(tmp_path / "a.tif", cache=tmp_path)
        for level in range(3):
            size = image.levels[level]
            seen = image.read(level, 0, 0, size.height, size.width).permute(1, 2, 0).numpy()
            assert np.array_equal(seen, pixels)
            pixels = mean_of_squares(pixels)

    def test_the_folder_follows_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        write_pyramid(tmp_path / "a.tif", photograph(301, 237), levels=1)
        open_image(tmp_path / "a.tif")
        assert len(list((tmp_path / "home" / "flopwise" / "pyramids").iterdir())) == 1
