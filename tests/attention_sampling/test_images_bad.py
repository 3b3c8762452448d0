"""Broken and hostile files: each is refused with a clear error, fast and without the memory it asks for."""

import logging
import struct
import tracemalloc
import zlib
from pathlib import Path
from random import Random

import fuzz_headers
import numpy as np
import pytest
import tifffile
from imagecodecs import jpeg2k_encode, jpeg_encode
from PIL import Image
from pyramids import photograph, write_large, write_pyramid

from flopwise.attention_sampling.images import open_image
from flopwise.attention_sampling.readers import ImageError

PIXELS = photograph(150, 130)
SHORT, LONG, LONG8 = 3, 4, 16


def write_directories(
    path: Path, *directories: dict[int, tuple[int, list[int]]], after: list[int] | None = None
) -> None:
    """A BigTIFF of just these directories: tag -> (type, values). `after`: where each says the next one is."""
    data = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16))
    width = {SHORT: "H", LONG: "I", LONG8: "Q"}
    for i, tags in enumerate(directories):
        begin = len(data)
        end = begin + 8 + 20 * len(tags) + 8
        data += struct.pack("<Q", len(tags))
        outside = bytearray()
        for tag, (kind, values) in sorted(tags.items()):
            packed = struct.pack(f"<{len(values)}{width[kind]}", *values)
            data += struct.pack("<HHQ", tag, kind, len(values))
            if len(packed) > 8:
                data += struct.pack("<Q", end + len(outside))
                outside += packed
            else:
                data += packed.ljust(8, b"\0")
        following = end + len(outside) if i + 1 < len(directories) else 0
        data += struct.pack("<Q", after[i] if after else following)
        data += outside
    path.write_bytes(bytes(data))


def tags(**changes: tuple[int, list[int]] | None) -> dict[int, tuple[int, list[int]]]:
    """One tile of 256 x 256, grey, deflate; changed as asked, None leaves a tag out."""
    numbers = {
        "width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "samples": 277, "planar": 284,
        "tile_width": 322, "tile_height": 323, "offsets": 324, "counts": 325, "subifds": 330, "format": 339,
        "depth": 32997,
    }  # fmt: skip
    given: dict[str, tuple[int, list[int]] | None] = {
        "width": (LONG, [256]),
        "height": (LONG, [256]),
        "bits": (SHORT, [8]),
        "compression": (SHORT, [8]),
        "photometric": (SHORT, [1]),
        "tile_width": (LONG, [256]),
        "tile_height": (LONG, [256]),
        "offsets": (LONG8, [0]),
        "counts": (LONG8, [0]),
    }
    return {numbers[name]: value for name, value in (given | changes).items() if value is not None}


def refused(path: Path, message: str, megabytes: float = 20) -> None:
    """Opening it, or reading its first pixels, raises ImageError with this message, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=message):
            open_image(path, cache=path.parent / "cache").read(0, 0, 0, 9, 9)
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


class TestStructure:
    @pytest.fixture(autouse=True)
    def quiet(self):
        logging.getLogger("tifffile").disabled = True
        yield
        logging.getLogger("tifffile").disabled = False

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "a.tif"

    def test_the_file_these_tests_break_is_read(self, path: Path):
        write_directories(path, tags())
        assert open_image(path, fill=3).read(0, 0, 0, 256, 256).eq(3).all()

    @pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.7, 0.97, 0.999])
    @pytest.mark.parametrize("bigtiff", [False, True])
    def test_truncated(self, share: float, bigtiff: bool, path: Path):
        write_pyramid(path, PIXELS, bigtiff=bigtiff)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        refused(path, "truncated|beyond the end|empty|failed")

    def test_truncated_after_the_directories(self, path: Path):
        """A download that stopped: the directories are in front, tiles are missing behind."""
        write_directories(path, tags(offsets=(LONG8, [400]), counts=(LONG8, [5000])))
        refused(path, "truncated, or wrong tile offsets: 1 of 1 tiles lie beyond the end")

    def test_it_shrinks_after_it_was_opened(self, path: Path):
        write_pyramid(path, PIXELS)
        image = open_image(path, cache=path.parent)
        with path.open("r+b") as file:
            file.truncate(500)
        with pytest.raises(ImageError, match="shrank after it was opened"):
            image.read(0, 100, 100, 9, 9)

    @pytest.mark.parametrize("compression", ["zlib", "jpeg", "lzw", "zstd", "jpeg2000"])
    def test_wrong_tile_offsets(self, compression: str, path: Path):
        write_pyramid(path, PIXELS, compression=compression, levels=1)
        with tifffile.TiffFile(path) as tiff:
            offsets = tiff.pages.first.tags[324]
            place, wrong = offsets.valueoffset, [value + 5 for value in offsets.value]
        data = bytearray(path.read_bytes())
        data[place : place + 4 * len(wrong)] = struct.pack(f"<{len(wrong)}I", *wrong)
        path.write_bytes(bytes(data) + bytes(5))
        refused(path, r"tile \(\d, \d\) of the 150 x 130 level cannot be decoded|tile .* holds")

    @pytest.mark.parametrize("offset", [2**63, 2**64 - 1, 2**32])
    @pytest.mark.parametrize("count", [1, 2**63, 2**64 - 1])
    def test_enormous_offsets(self, offset: int, count: int, path: Path):
        write_directories(path, tags(offsets=(LONG8, [offset]), counts=(LONG8, [count])))
        refused(path, "lie beyond the end")

    def test_a_tile_that_is_most_of_the_file(self, path: Path):
        write_directories(path, tags(offsets=(LONG8, [16]), counts=(LONG8, [10**6])))
        with path.open("ab") as file:
            file.truncate(2 * 10**6)
        refused(path, "a tile of 65536 bytes takes at most 2 times that in the file; one has 1000000")

    def test_a_circle_of_directories(self, path: Path):
        write_directories(path, tags(), after=[16])
        refused(path, "closes a circle")
        write_directories(path, tags(subifds=(LONG8, [16])))
        refused(path, "closes a circle")

    @pytest.mark.parametrize("offset", [10**6, 2**63, 2**64 - 9])
    def test_a_directory_beyond_the_end(self, offset: int, path: Path):
        write_directories(path, tags(), after=[offset])
        refused(path, f"8 bytes at {offset} lie beyond the end")

    def test_too_many_directories(self, path: Path):
        write_directories(path, *[{256: (LONG, [1])}] * 5000)
        refused(path, "at most 4096 directories")

    def test_too_many_tags(self, path: Path):
        path.write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + struct.pack("<Q", 2**62) + bytes(500))
        refused(path, "1 to 4096 tags")

    def test_no_directory(self, path: Path):
        path.write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        refused(path, "at least one directory")


class TestSizes:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "a.tif"

    @pytest.mark.parametrize("side", [2**20, 2**31 - 1, 2**32 - 1])
    def test_absurd_dimensions(self, side: int, path: Path):
        write_directories(path, tags(width=(LONG, [side]), height=(LONG, [side])))
        refused(path, "it lists 1 offsets and 1 lengths")

    @pytest.mark.parametrize("side", [2**15, 2**31 - 1])
    def test_one_enormous_tile(self, side: int, path: Path):
        write_directories(path, tags(**dict.fromkeys(("width", "height", "tile_width", "tile_height"), (LONG, [side]))))
        refused(path, "at most 64 MiB")

    def test_one_enormous_strip(self, path: Path):
        write_directories(
            path,
            {256: (LONG, [2**20]), 257: (LONG, [2**20]), 258: (SHORT, [8]), 259: (SHORT, [8]), 262: (SHORT, [1]),
             273: (LONG8, [16]), 278: (LONG, [2**20]), 279: (LONG8, [100])},
        )  # fmt: skip
        refused(path, "at most 64 MiB")

    def test_many_pixels_in_strips_are_not_copied(self, path: Path):
        """A small file of strips that would unpack to a full disk."""
        rows = 2**18
        write_directories(
            path,
            {256: (LONG, [2**17]), 257: (LONG, [rows]), 258: (SHORT, [8]), 259: (SHORT, [8]), 262: (SHORT, [1]),
             273: (LONG, [16] * (rows // 512)), 278: (LONG, [512]), 279: (LONG, [100] * (rows // 512))},
        )  # fmt: skip
        refused(path, "of at most 17179869184 pixels; its coarsest has 262144 x 131072")

    @pytest.mark.parametrize("name", ["width", "height", "tile_width", "tile_height"])
    def test_zero(self, name: str, path: Path):
        write_directories(path, tags(**{name: (LONG, [0])}))
        refused(path, "at least one pixel")

    @pytest.mark.parametrize("name", ["width", "height", "tile_width", "tile_height", "offsets", "counts"])
    def test_missing(self, name: str, path: Path):
        write_directories(path, tags(**{name: None}))
        refused(path, "at least one pixel|lists [01] offsets and [01] lengths")

    def test_zero_tiles(self, path: Path):
        write_directories(path, tags(offsets=(LONG8, []), counts=(LONG8, [])))
        refused(path, "lists 0 offsets and 0 lengths")

    @pytest.mark.parametrize("count", [2, 10**6])
    def test_a_number_of_tiles_that_does_not_fit(self, count: int, path: Path):
        write_directories(path, tags(offsets=(LONG8, [0] * count), counts=(LONG8, [0] * count)))
        refused(path, f"are 1 tiles .*it lists {count} offsets")

    def test_an_image_without_any_tile_is_fill(self, path: Path):
        write_large(path, 70_000, 60_000, present=lambda level, row, column: False)
        image = open_image(path, fill=7)
        assert image.read(0, 69_000, 59_000, 64, 64).eq(7).all() and image.thumbnail(100).eq(7).all()


class TestBombs:
    def test_deflate(self, tmp_path: Path):
        bomb = zlib.compress(bytes(300 * 2**20), 9)
        write_directories(tmp_path / "a.tif", tags(offsets=(LONG8, [300]), counts=(LONG8, [len(bomb[:60_000])])))
        self.append(tmp_path / "a.tif", bomb[:60_000])
        refused(tmp_path / "a.tif", "cannot be decoded")

    @pytest.mark.parametrize(("compression", "encode"), [(7, jpeg_encode), (34712, jpeg2k_encode)])
    def test_an_image_inside_a_tile(self, compression: int, encode, tmp_path: Path):
        bomb = encode(np.zeros((3000, 3000), np.uint8))[:60_000]
        changed = {"compression": (SHORT, [compression]), "offsets": (LONG8, [300]), "counts": (LONG8, [len(bomb)])}
        write_directories(tmp_path / "a.tif", tags(**changed))
        self.append(tmp_path / "a.tif", bomb)
        refused(tmp_path / "a.tif", "the image inside has 3000 x 3000 pixels")

    def append(self, path: Path, data: bytes) -> None:
        path.write_bytes(path.read_bytes().ljust(300, b"\0") + data)

    def test_png(self, tmp_path: Path):
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        for side in (20_000, 2**31 - 1):
            header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            (tmp_path / "a.png").write_bytes(
                b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6)))
            )
            refused(tmp_path / "a.png", "179 megapixels")


class TestKinds:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"compression": 3}, "compression 3"),
            ({"compression": 34887}, "compression 34887"),
            ({"compression": 0}, "compression 0"),
            ({"bits": 16}, r"samples of \[16\] bits"),
            ({"bits": 1}, r"samples of \[1\] bits"),
            ({"format": 2}, r"samples of \[8\] bits, format \[2\]"),
            ({"photometric": 3}, "photometric interpretation 3"),
            ({"photometric": 6, "samples": 3}, "photometric interpretation 6 with compression 8"),
            ({"photometric": 2, "samples": 1}, "1 samples"),
            ({"samples": 0}, "0 samples"),
            ({"samples": 60_000}, "60000 samples"),
            ({"photometric": 2, "samples": 3, "planar": 2}, "one plane for each channel"),
            ({"depth": 9}, "volumes"),
        ],
    )
    def test_not_read_here(self, change: dict, message: str, tmp_path: Path):
        write_directories(tmp_path / "a.tif", tags(**{name: (SHORT, [value]) for name, value in change.items()}))
        refused(tmp_path / "a.tif", f"this one has {message}.*reader='openslide'")

    @pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)])
    def test_arrays(self, array: np.ndarray, tmp_path: Path):
        with pytest.raises(ImageError, match=r"an image is .height, width.*uint8"):
            open_image(array)
        np.save(tmp_path / "a.npy", array)
        refused(tmp_path / "a.npy", "an image is .height, width|failed")

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npy", "a.mrxs"])
    @pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.9])
    def test_truncated(self, name: str, share: float, tmp_path: Path):
        path = tmp_path / name
        if path.suffix in (".png", ".jpg"):
            Image.fromarray(PIXELS).save(path)
        else:
            np.save(tmp_path / "a.npy", PIXELS)
            (tmp_path / "a.npy").rename(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        if path.suffix == ".mrxs":
            pytest.importorskip("openslide")
        refused(path, "failed|empty")

    def test_pickles_are_not_loaded(self, tmp_path: Path):
        np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
        refused(tmp_path / "a.npy", "failed")

    def test_not_a_zarr(self, tmp_path: Path):
        (tmp_path / "a").mkdir()
        with pytest.raises(ImageError, match="opening it with zarr failed"):
            open_image(tmp_path / "a")

    def test_arguments(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError):
            open_image(tmp_path / "nowhere.tif")
        (tmp_path / "a.png").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"reader is one of .*got 'magic'"):
            open_image(tmp_path / "a.png", reader="magic")
        with pytest.raises(ValueError, match="0 to 255; got 256"):
            open_image(PIXELS, fill=256)


class TestFuzzed:
    def test_hundreds_of_headers(self, tmp_path: Path):
        """`fuzz_headers.py` does the same for as many as one likes."""
        logging.getLogger("tifffile").disabled = True
        files = fuzz_headers.originals(tmp_path)
        found = []
        for seed in range(300):
            (tmp_path / "broken.tif").write_bytes(fuzz_headers.broken(files, Random(seed)))
            found.append(fuzz_headers.try_file(tmp_path / "broken.tif", tmp_path / "cache"))
        logging.getLogger("tifffile").disabled = False
        assert 40 < found.count("read") < 200
