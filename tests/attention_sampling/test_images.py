"""Lazy pyramids read what the file holds: every format, every level, inside and outside, by one thread or many."""

import gc
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pyramids import mean_of_squares, photograph, write_large, write_pyramid

from flopwise import attention_sampling
from flopwise.attention_sampling import images as images_module
from flopwise.attention_sampling.images import LazyImage, Level, open_image, read_patches

PIXELS = photograph(301, 237)
TIFFS = {
    "deflate": {},
    "deflate and predictor": {"predictor": True},
    "LZW": {"compression": "lzw"},
    "zstd": {"compression": "zstd"},
    "PackBits": {"compression": "packbits"},
    "none": {"compression": None},
    "JPEG 2000": {"compression": "jpeg2000"},
    "BigTIFF": {"bigtiff": True},
    "SubIFDs": {"subifds": True},
    "tiles not square": {"tile": (48, 80)},
    "big endian": {"byteorder": ">"},
}


def as_array(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


def expected(pixels: np.ndarray, y: int, x: int, height: int, width: int, fill: int = 0) -> np.ndarray:
    """The slow reference: every pixel's place in the image, or fill."""
    rows, columns = np.arange(y, y + height), np.arange(x, x + width)
    inside = ((rows >= 0) & (rows < pixels.shape[0]))[:, None] & ((columns >= 0) & (columns < pixels.shape[1]))
    taken = pixels[rows.clip(0, pixels.shape[0] - 1)][:, columns.clip(0, pixels.shape[1] - 1)]
    return np.where(inside[..., None], taken, np.uint8(fill))


def agrees_with(image: LazyImage, level: int, pixels: np.ndarray, fill: int = 0) -> None:
    height, width = pixels.shape[:2]
    for y, x, h, w in [
        (0, 0, height, width),
        (61, 62, 5, 9),
        (-3, -70, 40, 90),
        (height - 7, width - 5, 30, 20),
        (height // 2, width - 1, 1, 1),
        (-50, 3, 20, 20),
        (height + 9, width + 9, 8, 8),
        (-1, -1, height + 2, width + 2),
    ]:
        seen = image.read(level, y, x, h, w)
        assert seen.dtype == torch.uint8
        assert np.array_equal(as_array(seen), expected(pixels, y, x, h, w, fill)), (level, y, x, h, w)


class TestFormats:
    @pytest.mark.parametrize("kind", TIFFS)
    def test_tiled_tiff(self, kind: str, tmp_path: Path):
        options = dict(TIFFS[kind])
        if "byteorder" in options:
            with tifffile.TiffWriter(tmp_path / "a.tif", byteorder=">") as writer:
                writer.write(PIXELS, tile=(64, 64), photometric="rgb", compression="zlib", metadata=None)
            levels = [PIXELS]
        else:
            levels = write_pyramid(tmp_path / "a.tif", PIXELS, **options)
        image = open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
        assert image.channels == 3 and len(image.levels) >= len(levels)
        for level, pixels in enumerate(levels):
            agrees_with(image, level, pixels)

    def test_jpeg_tiles_are_those_that_tifffile_decodes(self, tmp_path: Path):
        write_pyramid(tmp_path / "a.tif", PIXELS, compression="jpeg", levels=2)
        image = open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
        for level in range(2):
            agrees_with(image, level, tifffile.imread(tmp_path / "a.tif", key=level))

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_channels(self, channels: int, tmp_path: Path):
        pixels = photograph(130, 90, channels)
        kind = "rgb" if channels > 2 else "minisblack"
        planes: dict[str, Any] = {"planarconfig": "contig"} if channels > 1 else {}
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            writer.write(pixels, tile=(64, 64), photometric=kind, compression="zlib", **planes)
        image = open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
        assert image.channels == min(channels, 3)  # the fourth is alpha
        agrees_with(image, 0, pixels[..., :3])

    def test_white_may_be_zero(self, tmp_path: Path):
        pixels = photograph(80, 80, 1)
        tifffile.imwrite(tmp_path / "a.tif", pixels[..., 0], tile=(64, 64), photometric="miniswhite")
        agrees_with(open_image(tmp_path / "a.tif", cache=tmp_path / "cache"), 0, 255 - pixels)

    @pytest.mark.parametrize("rows", [1, 7, 64, 301])
    @pytest.mark.parametrize("compression", [None, "zlib"])
    def test_tiff_in_strips(self, rows: int, compression: str | None, tmp_path: Path):
        tifffile.imwrite(tmp_path / "a.tif", PIXELS, rowsperstrip=rows, compression=compression, photometric="rgb")
        agrees_with(open_image(tmp_path / "a.tif", cache=tmp_path / "cache"), 0, PIXELS)
        assert (tmp_path / "cache").exists()

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_pillow(self, suffix: str, channels: int, tmp_path: Path):
        path = tmp_path / f"a.{suffix}"
        pixels = photograph(301, 237, channels)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
        with Image.open(path) as decoded:
            agrees_with(open_image(path, cache=tmp_path / "cache"), 0, np.asarray(decoded).reshape(pixels.shape))

    def test_palette_and_alpha(self, tmp_path: Path):
        picture = Image.fromarray(PIXELS)
        picture.quantize(16).save(tmp_path / "palette.png")
        picture.convert("RGBA").save(tmp_path / "alpha.png")
        agrees_with(open_image(tmp_path / "alpha.png", cache=tmp_path), 0, PIXELS)
        with Image.open(tmp_path / "palette.png") as decoded:
            agrees_with(open_image(tmp_path / "palette.png", cache=tmp_path), 0, np.asarray(decoded.convert("RGB")))

    def test_arrays(self, tmp_path: Path):
        np.save(tmp_path / "a.npy", PIXELS)
        mapped = np.memmap(tmp_path / "a.raw", np.uint8, "w+", 16, PIXELS.shape)
        mapped[:] = PIXELS
        mapped.flush()
        for source in (PIXELS, tmp_path / "a.npy", mapped, mapped[:], np.asfortranarray(PIXELS)):
            agrees_with(open_image(source, cache=tmp_path / "cache"), 0, PIXELS)
        grey = open_image(PIXELS[..., 0])
        assert grey.channels == 1
        agrees_with(grey, 0, PIXELS[..., :1])

    def test_zarr(self, tmp_path: Path):
        import zarr

        zarr.create_array(tmp_path / "a.zarr", data=PIXELS, chunks=(64, 80, 3))
        agrees_with(open_image(tmp_path / "a.zarr", cache=tmp_path / "cache"), 0, PIXELS)

    def test_ome_zarr(self, tmp_path: Path):
        import zarr

        half = mean_of_squares(PIXELS)
        group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
        for name, pixels in (("0", PIXELS), ("1", half)):
            data = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None, :, None])
            group.create_array(name, data=data, chunks=(1, 1, 1, 64, 80))
        axes = [{"name": n, "type": "space", "unit": "micrometer"} if n in "zyx" else {"name": n} for n in "tczyx"]
        scale = [{"type": "scale", "scale": [1, 1, 1, 0.25, 0.5]}]
        group.attrs["multiscales"] = [
            {"axes": axes, "datasets": [{"path": p, "coordinateTransformations": scale} for p in "01"]}
        ]
        image = open_image(tmp_path / "a.zarr", cache=tmp_path / "cache")
        assert image.microns_per_pixel == (0.25, 0.5) and image.channels == 3
        agrees_with(image, 0, PIXELS)
        agrees_with(image, 1, half)

    def test_openslide(self, tmp_path: Path):
        pytest.importorskip("openslide")
        levels = write_pyramid(tmp_path / "a.tif", PIXELS, compression="lzw")
        image = open_image(tmp_path / "a.tif", reader="openslide", cache=tmp_path / "cache")
        for level, pixels in enumerate(levels):
            agrees_with(image, level, pixels)


class TestLevels:
    def test_of_a_slide(self, tmp_path: Path):
        """As scanners write it: a thumbnail in strips second, label and overview at the end, steps of 4."""
        base = photograph(1040, 1283)
        quarter = mean_of_squares(base, 4)
        with tifffile.TiffWriter(tmp_path / "a.svs", bigtiff=True) as writer:
            tiled = {"tile": (240, 240), "compression": "zlib", "photometric": "rgb", "metadata": None}
            text = "Aperio Image Library v12\r\n1283x1040 |AppMag = 40|MPP = 0.2499|Left = 25.6"
            writer.write(base, description=text, **tiled)
            writer.write(mean_of_squares(base, 16), photometric="rgb", metadata=None, rowsperstrip=16)
            writer.write(quarter, **tiled)
            writer.write(photograph(90, 100), photometric="rgb", metadata=None, subfiletype=1)
            writer.write(photograph(300, 900), subfiletype=9, **tiled)
        image = open_image(tmp_path / "a.svs", cache=tmp_path / "cache")
        assert image.microns_per_pixel == (0.2499, 0.2499)
        assert image.levels[:3] == (Level(1040, 1283, 1), Level(260, 321, 4), Level(130, 161, 8))
        agrees_with(image, 0, base)
        agrees_with(image, 1, quarter)
        agrees_with(image, 2, mean_of_squares(quarter))

    def test_missing_levels_are_means_of_squares(self, tmp_path: Path):
        levels = [PIXELS]
        while max(levels[-1].shape[:2]) > 64:
            levels.append(mean_of_squares(levels[-1]))
        tifffile.imwrite(tmp_path / "tiled.tif", PIXELS, tile=(64, 48), photometric="rgb", compression="zlib")
        tifffile.imwrite(tmp_path / "strips.tif", PIXELS, photometric="rgb", compression="zlib", rowsperstrip=50)
        Image.fromarray(PIXELS).save(tmp_path / "a.png")
        for source in (PIXELS, tmp_path / "tiled.tif", tmp_path / "strips.tif", tmp_path / "a.png"):
            image = open_image(source, cache=tmp_path / "cache")
            assert [level.downsample for level in image.levels] == [1, 2, 4, 8]
            for level, pixels in enumerate(levels):
                assert image.levels[level] == Level(pixels.shape[0], pixels.shape[1], 2**level)
                agrees_with(image, level, pixels)

    @pytest.mark.parametrize("size", [(1, 1), (1, 900), (700, 3), (257, 256), (65, 64)])
    def test_of_odd_shapes(self, size: tuple[int, int], tmp_path: Path):
        pixels = photograph(*size)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        image, other = open_image(tmp_path / "a.png", cache=tmp_path / "cache"), open_image(pixels)
        assert image.levels == other.levels and max(image.levels[-1].height, image.levels[-1].width) <= 64
        for level, shape in enumerate(image.levels):
            agrees_with(image, level, as_array(other.read(level, 0, 0, shape.height, shape.width)))

    def test_downsamples_do_not_drift(self, tmp_path: Path):
        write_large(tmp_path / "a.tif", 20_003, 9_001, present=lambda level, row, column: False)
        factors = [level.downsample for level in open_image(tmp_path / "a.tif").levels]
        assert factors == [2**i for i in range(len(factors))] and len(factors) == 8

    def test_pages_of_other_shapes_are_no_levels(self, tmp_path: Path):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            for shape in ((200, 200), (100, 100), (100, 150), (200, 200), (50, 50)):
                writer.write(photograph(*shape), tile=(64, 64), photometric="rgb", metadata=None)
        image = open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
        assert [(level.height, level.width) for level in image.levels] == [(200, 200), (100, 100), (50, 50)]

    def test_level_for(self):
        image = open_image(photograph(1001, 900))
        assert [image.level_for(d) for d in (0.5, 1, 1.9, 1.999, 3.9, 4, 16, 1000)] == [0, 0, 0, 1, 1, 2, 4, 4]

    def test_absent_tiles_are_fill(self, tmp_path: Path):
        write_large(tmp_path / "a.tif", 600, 600, compression="zlib", present=lambda level, row, column: row != column)
        image = open_image(tmp_path / "a.tif", fill=200)
        assert (image.read(0, 0, 0, 256, 256) == 200).all() and (image.read(0, 256, 250, 9, 6) != 200).any()
        assert (image.read(0, 590, 590, 20, 20) == 200).all()

    @pytest.mark.parametrize(
        ("options", "microns"),
        [
            ({}, None),
            ({"resolution": (72, 72), "resolutionunit": "inch"}, None),
            ({"resolution": (20_000, 40_000), "resolutionunit": "centimeter"}, (0.25, 0.5)),
            ({"resolution": (50_800, 50_800), "resolutionunit": "inch"}, (0.5, 0.5)),
            (
                {"description": '<OME><Pixels PhysicalSizeX="0.5" PhysicalSizeY="250" PhysicalSizeYUnit="nm"/>'},
                (0.25, 0.5),
            ),
        ],
    )
    def test_microns_per_pixel(self, options: dict, microns: tuple | None, tmp_path: Path):
        write_pyramid(tmp_path / "a.tif", PIXELS, **options)
        seen = open_image(tmp_path / "a.tif", cache=tmp_path / "cache").microns_per_pixel
        assert seen == pytest.approx(microns) if microns else seen is None

    def test_thumbnail(self, tmp_path: Path):
        flat = np.full((900, 1100, 3), 77, np.uint8)
        image = open_image(flat)
        assert tuple(image.thumbnail(100).shape) == (3, 82, 100) and (image.thumbnail(100) == 77).all()
        assert tuple(open_image(flat).thumbnail().shape) == (3, 838, 1024)
        assert np.array_equal(as_array(open_image(PIXELS).thumbnail(1024)), PIXELS)
        assert np.array_equal(as_array(open_image(PIXELS).thumbnail(151)), mean_of_squares(PIXELS))


class TestPatches:
    def positions(self, batch: int, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(-60, 320, (batch, n, 2), generator=generator)

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_are_those_that_read_gives(self, threads: int, tmp_path: Path, generator: torch.Generator):
        write_pyramid(tmp_path / "a.tif", PIXELS)
        batch = [open_image(tmp_path / "a.tif", cache=tmp_path / "cache"), open_image(photograph(400, 250), fill=9)]
        positions = self.positions(2, 7, generator)
        for level in (0, 2):
            patches = read_patches(batch, level, positions, (50, 33), threads=threads)
            assert tuple(patches.shape) == (2, 7, 3, 50, 33)
            for image, rows, places in zip(batch, patches, positions.tolist(), strict=True):
                for patch, (y, x) in zip(rows, places, strict=True):
                    assert torch.equal(patch, image.read(level, y, x, 50, 33))

    def test_every_tile_is_decoded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        write_pyramid(tmp_path / "a.tif", PIXELS)
        image = open_image(tmp_path / "a.tif", cache=tmp_path / "cache")
        grid, decoded = image._reader().grids[0], []
        tile = grid.tile
        monkeypatch.setattr(grid, "tile", lambda row, column: decoded.append((row, column)) or tile(row, column))
        positions = torch.tensor([[[0, 0], [3, 9], [10, 20], [60, 60]]])
        read_patches([image, image], 0, positions.expand(2, -1, -1), (16, 16))
        assert sorted(decoded) == [(0, 0), (0, 1), (1, 0), (1, 1)]

    def test_images_of_other_makers(self, generator: torch.Generator):
        class Other:
            def read(self, level: int, y: int, x: int, height: int, width: int) -> torch.Tensor:
                return torch.full((3, height, width), (y + 2 * x) % 251, dtype=torch.uint8)

        positions = self.positions(2, 3, generator)
        patches = read_patches([Other(), open_image(PIXELS)], 0, positions, (4, 5), threads=2)
        for n in range(3):
            y, x = positions[0, n].tolist()
            assert torch.equal(patches[0, n], Other().read(0, y, x, 4, 5))
            y, x = positions[1, n].tolist()
            assert torch.equal(patches[1, n], open_image(PIXELS).read(0, y, x, 4, 5))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"level": 7}, r"levels 0 to 3; got 7"),
            ({"level": -1}, r"levels 0 to 3; got -1"),
            ({"size": (0, 4)}, "at least one pixel; got 0 x 4"),
            ({"positions": torch.zeros(2, 3, 2, dtype=torch.int64)}, r"got \(2, 3, 2\) for 1 images"),
            ({"images": [open_image(PIXELS), open_image(PIXELS[..., 0])]}, r"same channels; got \[1, 3\]"),
        ],
    )
    def test_what_is_wrong_is_said(self, change: dict, message: str):
        given = {"images": [open_image(PIXELS)], "level": 0, "size": (4, 4)} | change
        positions = given.pop("positions", torch.zeros(len(given["images"]), 3, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match=message):
            read_patches(positions=positions, **given)


def first_pixel(image: LazyImage) -> int:
    return int(image.read(0, 7, 7, 1, 1)[0, 0, 0])


def files_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class TestHandles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        write_pyramid(tmp_path / "a.tif", PIXELS)
        return tmp_path / "a.tif"

    def test_a_pickle_holds_no_pixels_and_no_handle(self, path: Path):
        image = open_image(path, cache=path.parent)
        read_patches([image], 0, torch.zeros(1, 4, 2, dtype=torch.int64), (9, 9), threads=2)
        data = pickle.dumps(image)
        assert len(data) < 1500
        copy = pickle.loads(data)
        assert copy.levels == image.levels and torch.equal(copy.read(1, 0, 0, 99, 99), image.read(1, 0, 0, 99, 99))

    def test_a_memory_map_is_pickled_as_its_path(self, tmp_path: Path):
        mapped = np.memmap(tmp_path / "a.raw", np.uint8, "w+", 8, PIXELS.shape)
        mapped[:] = PIXELS
        mapped.flush()
        data = pickle.dumps(open_image(mapped, cache=tmp_path))
        assert len(data) < 1500 and first_pixel(pickle.loads(data)) == PIXELS[7, 7, 0]

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    @pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
    def test_workers(self, method: str, path: Path):
        image = open_image(path, cache=path.parent)
        read_patches([image], 0, torch.zeros(1, 9, 2, dtype=torch.int64), (90, 90), threads=2)  # threads exist already
        loader = torch.utils.data.DataLoader(
            _Patches(image), num_workers=1, batch_size=None, multiprocessing_context=multiprocessing.get_context(method)
        )
        for i, patch in enumerate(loader):
            assert torch.equal(patch, image.read(0, i, 2 * i, 70, 70))

    def test_few_files_are_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        images_module._opened.cache_clear()
        gc.collect()  # files that earlier tests left in cycles would be closed in between
        before, images = files_open(), []
        for i in range(images_module.OPEN_FILES + 20):
            write_pyramid(tmp_path / f"{i}.tif", PIXELS[: 60 + i, :60], levels=1)
            images.append(open_image(tmp_path / f"{i}.tif"))
        assert files_open() - before == images_module.OPEN_FILES
        positions = torch.zeros(len(images), 1, 2, dtype=torch.int64)
        patches = read_patches(images, 0, positions, (60, 60))
        assert (patches[:, 0] == torch.from_numpy(PIXELS[:60, :60].copy()).permute(2, 0, 1)).all()
        assert files_open() - before == images_module.OPEN_FILES
        images_module._opened.cache_clear()
        assert files_open() == before

    def test_threads_share_an_image(self, path: Path, generator: torch.Generator):
        image = open_image(path, cache=path.parent)
        positions = torch.randint(0, 200, (1, 200, 2), generator=generator)
        whole = torch.from_numpy(np.pad(PIXELS, ((0, 64), (0, 64), (0, 0)))).permute(2, 0, 1)
        patches = read_patches([image], 0, positions, (31, 31), threads=8)[0]
        for patch, (y, x) in zip(patches, positions[0].tolist(), strict=True):
            assert torch.equal(patch, whole[:, y : y + 31, x : x + 31])


class _Patches(torch.utils.data.Dataset):
    def __init__(self, image: LazyImage) -> None:
        self.image = image

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        return read_patches([self.image], 0, torch.tensor([[[i, 2 * i]]]), (70, 70), threads=2)[0, 0]


class TestExtras:
    @pytest.mark.parametrize(
        ("module", "file", "extra"),
        [
            ("numpy", "a.tif", "images"),
            ("tifffile", "a.tif", "images"),
            ("imagecodecs", "a.tif", "images"),
            ("PIL", "a.png", "images"),
            ("tifffile", "a.png", "images"),
            ("imagecodecs", "a.png", "images"),
            ("zarr", "a.zarr", "zarr"),
            ("openslide", "a.mrxs", "openslide"),
        ],
    )
    def test_a_missing_one_is_one_line(
        self, module: str, file: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        write_pyramid(tmp_path / "a.tif", PIXELS)
        Image.fromarray(PIXELS).save(tmp_path / "a.png")
        (tmp_path / "a.zarr").mkdir()
        (tmp_path / "a.mrxs").write_bytes(b"slide")
        for name in [name for name in sys.modules if name.startswith(f"{attention_sampling.__name__}.readers")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(attention_sampling, "readers")
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError) as caught:
            open_image(tmp_path / file)
        said = str(caught.value)
        assert "\n" not in said and said.endswith(f"needs {module}: pip install 'flopwise[{extra}]'")

    def test_none_is_needed_to_import(self):
        blocked = ("numpy", "tifffile", "imagecodecs", "PIL", "zarr", "openslide")
        code = f"import torch, sys\nfor name in {blocked}: sys.modules[name] = None\nimport {images_module.__name__}"
        subprocess.run([sys.executable, "-c", code], check=True)
