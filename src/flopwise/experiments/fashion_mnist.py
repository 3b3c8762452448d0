"""Fashion-MNIST: the images the package ships, or the full set from the user's IDX files, and augmented batches."""

import gzip
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from flopwise.experiments.passes import ShuffledPasses

SHIFT = 1  # pixels, each way
FULL = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package dataset-fashion-mnist has its files
CHECKED_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 28, 28), one byte a pixel, and their classes, 0 to 9."""

    pixels: UInt8[Tensor, "n 1 28 28"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)


def load(folder: Path | None = None) -> tuple[Images, Images]:
    """Training and test images: 10,000 + 2,000 that the package ships, or the IDX files (gzipped or not) in `folder`.

    Raises:
        ValueError: a file is missing, is no IDX file of 28 x 28 images or of labels, or is cut short.
    """
    train_x, train_y, test_x, test_y = (read_idx(_find(folder, name)) for name in CHECKED_NAMES)
    sets = []
    for split, x, y in (("train", train_x, train_y), ("t10k", test_x, test_y)):
        if x.shape[1:] != (28, 28) or y.ndim != 1 or len(x) != len(y):
            raise ValueError(
                f"{split}: images are (n, 28, 28) and labels (n,); got {tuple(x.shape)} and {tuple(y.shape)}."
            )
        sets.append(Images(x[:, None], y.long()))
    return sets[0], sets[1]


def read_idx(path: Any) -> UInt8[Tensor, "..."]:
    """An IDX file of bytes: two zeros, the type 8, the number of dimensions, the dimensions, then the data."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\x00\x00\x08" or len(content) < 4:
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4]!r}, not 00 00 08 and a rank.")
    rank = content[3]
    header = 4 + 4 * rank
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    wanted = torch.Size(shape).numel()
    if len(content) != header + wanted:
        raise ValueError(f"{path} is cut short: {shape} needs {wanted} bytes of data, it has {len(content) - header}.")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(shape)


def _find(folder: Path | None, name: str) -> Any:
    if folder is None:
        return files("flopwise.experiments") / "data" / f"{name}.gz"
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ValueError(
        f"{folder} needs the four Fashion-MNIST files; {name}.gz is missing. "
        f"They are in the Debian package dataset-fashion-mnist, under {FULL}."
    )


class Augmented(ShuffledPasses):
    """A loader of augmented batches: each image is mirrored with probability 1/2 and shifted by up to a pixel."""

    def __init__(self, images: Images, *, size: int, seed: int) -> None:
        def make(
            index: Int[Tensor, " b"], generator: torch.Generator
        ) -> tuple[Float[Tensor, "b 1 28 28"], Int[Tensor, " b"]]:
            return augment(normalise(images.pixels[index]), generator), images.labels[index]

        super().__init__(len(images), make, size=size, seed=seed)


def normalise(pixels: UInt8[Tensor, "b 1 28 28"]) -> Float[Tensor, "b 1 28 28"]:
    """To mean 0 and standard deviation 1 over the training set."""
    return (pixels.float() - 72.9) / 90.0


def augment(x: Float[Tensor, "b 1 28 28"], generator: torch.Generator) -> Float[Tensor, "b 1 28 28"]:
    """Mirror half of the images, and shift each by up to SHIFT pixels; what comes in from outside is background."""
    n, side = len(x), x.shape[-1]
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n, 1, 1), generator=generator)
    mirrored = torch.rand(n, 1, 1, generator=generator) < 0.5
    padded = pad(x[:, 0], (SHIFT,) * 4, value=float(x.min()))
    rows = torch.arange(side)[:, None] + down
    columns = torch.arange(side)
    columns = torch.where(mirrored, side - 1 - columns, columns) + right
    return padded[torch.arange(n)[:, None, None], rows, columns][:, None]
