"""Broken image files by the thousand, most of them TIFF: each opens, or raises ImageError, fast and in little memory.

    python tests/attention_sampling/fuzz_headers.py [count] [first seed]

Prints how many were read and refused, the slowest, and the peak memory. Ends with an error at the first file that
raises something else, takes longer than `SECONDS`, or needs more than `MEGABYTES` above the start.
"""

import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from pyramids import photograph, write_pyramid

from flopwise.attention_sampling.images import open_image
from flopwise.attention_sampling.readers import ImageError

SECONDS, MEGABYTES = 5, 300
INTERESTING = (0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def originals(folder: Path) -> list[tuple[bytes, list[int]]]:
    """Small files of all the kinds that are read, and where the directories of each begin."""
    kinds = {
        "classic.tif": {},
        "big.tif": {"bigtiff": True},
        "subifds.tif": {"subifds": True},
        "jpeg.tif": {"compression": "jpeg"},
        "lzw.tif": {"compression": "lzw", "predictor": True},
        "raw.tif": {"compression": None},
        "strips.tif": {"tile": None, "levels": 1, "rowsperstrip": 16},
        "flat.tif": {"tile": None, "levels": 1, "compression": None},
        "zstd.tif": {"compression": "zstd", "description": "Aperio|MPP = 0.5"},
        "jpeg2000.tif": {"compression": "jpeg2000"},
    }
    pixels = photograph(150, 130)
    for name, options in kinds.items():
        write_pyramid(folder / name, pixels, **options)
    others = ("image.png", "image.jpg", "image.npy")
    Image.fromarray(pixels).save(folder / others[0])
    Image.fromarray(pixels).save(folder / others[1])
    np.save(folder / others[2], pixels)
    files = []
    for name in (*kinds, *others):
        data = (folder / name).read_bytes()
        files.append((data, list(directories_of(data))))
    return files


def broken(files: list[tuple[bytes, list[int]]], random: Random) -> bytes:
    """One to eight bytes or words changed, mostly in the directories; sometimes cut short, or a piece moved."""
    original, places = random.choice(files)
    data = bytearray(original)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        start = random.choice(places) if random.random() < 0.8 else random.randrange(len(data))
        place = min(len(data) - 1, max(0, start + random.randrange(-4, 280)))
        kind = random.random()
        if kind < 0.3:
            data[place] = random.randrange(256)
        elif kind < 0.8:
            width = random.choice((2, 4, 8))
            value = random.choice((*INTERESTING, len(data), random.randrange(len(data)), random.getrandbits(8 * width)))
            data[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind < 0.9:
            other = random.randrange(len(data))
            data[place : place + 12] = data[other : other + 12]
        else:
            data[place] ^= 1 << random.randrange(8)
    if random.random() < 0.15:
        del data[random.randrange(len(data)) :]
    return bytes(data)


def directories_of(data: bytes) -> Iterator[int]:
    """Where directories seem to begin: a plausible number of tags, the first of them 254 or 256."""
    yield 0
    for place in range(8, len(data) - 12, 2):
        for width in (2, 8):
            count = int.from_bytes(data[place : place + width], "little")
            if 5 < count < 40 and data[place + width : place + width + 2] in (b"\xfe\0", b"\0\x01"):
                yield place


def try_file(path: Path, cache: Path) -> str:
    """'read' or the beginning of the refusal."""
    try:
        image = open_image(path, cache=cache)
        image.thumbnail(32)
        for level, size in enumerate(image.levels):
            image.read(level, size.height // 2 - 8, size.width - 20, 40, 40)
    except ImageError:
        return "refused"
    return "read"


def peak_megabytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024


def main(count: int = 10_000, first: int = 0) -> Counter[str]:
    logging.getLogger("tifffile").disabled = True
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    slowest, begin = 0.0, peak_megabytes()
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = originals(folder)
        path = folder / "broken.tif"
        for seed in range(first, first + count):
            path.write_bytes(broken(files, Random(seed)))
            signal.alarm(SECONDS)  # a hang ends the program
            start = time.perf_counter()
            try:
                found[try_file(path, folder / "cache")] += 1
            except Exception as cause:
                raise RuntimeError(f"the file of seed {seed} raised {cause!r}") from cause
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
            if peak_megabytes() - begin > MEGABYTES:
                raise RuntimeError(f"the file of seed {seed} took {peak_megabytes() - begin} MB")
    print(f"{dict(found)}; the slowest took {slowest:.2f} s; {peak_megabytes() - begin} MB above the start")
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
