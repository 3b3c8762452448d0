"""64 patches of 256 x 256 from pyramids of 20,000 x 20,000, against tiffslide, OpenSlide and tifffile + zarr.

    python benchmarks/image_reading.py [--size 20000] [--rounds 9]

One process, the readers and the numbers of threads alternating, files in the page cache. For one thread, milliseconds
of CPU time, medians over the rounds; for two, wall-clock time, the best of the rounds, since other programs only ever
add to it: on a busy machine a second thread finds no core, and its figures say nothing. Then the peak memory of reading
from images of two sizes, each in a fresh process, and a sparse image of 100,000 x 100,000.
Appends one record to benchmarks/results/image_reading.jsonl.

Needs: pip install tifffile imagecodecs zarr tiffslide openslide-python openslide-bin
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import openslide
import tifffile
import tiffslide  # pyright: ignore[reportMissingImports]  (for this benchmark only)
import torch
import zarr
from torch import Tensor

from flopwise.attention_sampling.images import open_image, read_patches
from flopwise.experiments.runner import provenance

sys.path.append(str(Path(__file__).parents[1] / "tests" / "attention_sampling"))
from pyramids import write_large  # pyright: ignore[reportMissingImports]

RESULTS = Path(__file__).parent / "results" / "image_reading.jsonl"
PATCHES, SIDE = 64, 256


def ours(path: Path) -> Callable[[Tensor, int], np.ndarray]:
    image = open_image(path)

    def read(positions: Tensor, threads: int) -> np.ndarray:
        return read_patches([image], 0, positions[None], (SIDE, SIDE), threads=threads)[0].permute(0, 2, 3, 1).numpy()

    return read


def by_region(region: Callable[[int, int], np.ndarray]) -> Callable[[Tensor, int], np.ndarray]:
    """The others read one region at a time; threads share the patches."""

    pool = ThreadPoolExecutor(2)

    def read(positions: Tensor, threads: int) -> np.ndarray:
        places = positions.tolist()
        if threads == 1:
            return np.stack([region(y, x) for y, x in places])
        return np.stack(list(pool.map(lambda place: region(*place), places)))

    return read


def others(path: Path) -> dict[str, Callable[[Tensor, int], np.ndarray]]:
    slide, tiff = openslide.OpenSlide(path), tiffslide.TiffSlide(path)
    array = zarr.open_array(tifffile.TiffFile(path).aszarr(level=0), mode="r")
    size = SIDE, SIDE
    return {
        "openslide": by_region(lambda y, x: np.asarray(slide.read_region((x, y), 0, size))[..., :3]),
        "tiffslide": by_region(lambda y, x: np.asarray(tiff.read_region((x, y), 0, size, as_array=True))),
        "tifffile + zarr": by_region(lambda y, x: np.asarray(array[y : y + SIDE, x : x + SIDE])),
    }


def milliseconds(readers: dict[str, Callable], size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Reader -> CPU time by one thread, wall-clock time by one and by two."""
    generator = torch.Generator().manual_seed(0)
    cpu: dict[str, list[float]] = {name: [] for name in readers}
    wall: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in readers}
    for _ in range(rounds):
        positions = torch.randint(0, size - SIDE, (PATCHES, 2), generator=generator)
        seen = {}
        for threads in (1, 2):
            for name, read in readers.items():
                start = time.perf_counter(), time.process_time()
                seen[name] = read(positions, threads)
                wall[name][threads].append(1e3 * (time.perf_counter() - start[0]))
                if threads == 1:
                    cpu[name].append(1e3 * (time.process_time() - start[1]))
        for name, pixels in seen.items():  # decoders differ in how they upsample colour
            error = np.abs(pixels.astype(int) - seen["ours"]).mean()
            if error > 2:
                raise RuntimeError(f"{name} reads other pixels than ours: mean difference {error}")
    return {
        name: {
            "cpu": round(median(cpu[name]), 1),
            "wall, 1 thread": round(min(wall[name][1]), 1),
            "wall, 2 threads": round(min(wall[name][2]), 1),
        }
        for name in readers
    }


def peak_megabytes(code: str, *arguments: str) -> tuple[int, int]:
    """Of a fresh process that runs `code`: after its imports, and at its peak."""
    head = (
        "import sys, torch\nfrom flopwise.attention_sampling.images import open_image, read_patches\n"
        "from flopwise.attention_sampling.readers import tiff\ntorch.set_num_threads(1)\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "start = peak()\n"
    )
    command = [sys.executable, "-c", head + code + "\nprint(start, peak())", *arguments]
    start, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(start), int(peak)


READ_A_THOUSAND = """
image = open_image(sys.argv[1])
generator = torch.Generator().manual_seed(0)
low = image.thumbnail(256)
for _ in range(16):
    positions = torch.randint(0, image.levels[0].height, (1, 64, 2), generator=generator)
    read_patches([image], 0, positions, (256, 256))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=9)
    size, rounds = (given := options.parse_args()).size, given.rounds
    torch.set_num_threads(1)
    record: dict = {"benchmark": "image_reading", "size": size, "patches": PATCHES, "side": SIDE, **provenance()}
    record["load"] = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        for compression in ("jpeg", "zlib"):
            path = Path(folder) / f"{compression}.tiff"
            write_large(path, size, size, compression=compression)
            readers = {"ours": ours(path), **others(path)}
            found = milliseconds(readers, size, rounds)
            mine = found["ours"]
            fastest = {what: min(t[what] for name, t in found.items() if name != "ours") for what in mine}
            record[compression] = {
                "ms": found,
                "fastest of the others over ours": {what: round(fastest[what] / mine[what], 2) for what in mine},
                "ours, one thread over two": round(mine["wall, 1 thread"] / mine["wall, 2 threads"], 2),
            }
            print(compression, record[compression])
        small = Path(folder) / "small.tiff"
        write_large(small, size // 4, size // 4)
        for name, path in ((size // 4, small), (size, Path(folder) / "jpeg.tiff")):
            record[f"MB after imports and at the peak, {name}"] = peak_megabytes(READ_A_THOUSAND, str(path))
            print("MB", name, record[f"MB after imports and at the peak, {name}"])
        huge = Path(folder) / "huge.tiff"
        write_large(huge, 100_000, 100_000, present=lambda level, row, column: (row + column) % 97 == 0 or level > 5)
        start = time.perf_counter()
        megabytes = peak_megabytes(READ_A_THOUSAND, str(huge))
        record["100,000 squared"] = {"seconds": round(time.perf_counter() - start, 2), "peak MB": megabytes}
        print(record["100,000 squared"])
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
