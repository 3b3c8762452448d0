"""Megapixel images, made on the fly: five digits among fifty strokes. Which digit is there three times?

The task of Katharopoulos & Fleuret, ICML 2019, section 4.2. Nothing is as large as an image: a batch is a list of
glyphs and their places; `read` draws the pixels that are asked for, and the low view is made from the glyphs.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from flopwise.attention_sampling.images import Level
from flopwise.experiments.digits import read
from flopwise.experiments.passes import hashed_generator

GLYPH = 28  # pixels, the side of a digit or a stroke
CELL = 50  # glyphs lie in different cells of a grid of this many pixels, somewhere: they do not overlap
DIGITS, SAME = 5, 3  # digits in an image, and how many of them are of the class that is asked for
STROKES = 50
MULTIPLE = 8  # pixels: an image's side is padded to a multiple of it
KINDS_OF_STROKES = 4000


class DigitImage:
    """One image, drawn where it is read: what `AttentionSampling` takes as a lazy image, with one level."""

    channels = 1

    def __init__(self, glyphs: UInt8[Tensor, "n 28 28"], at: Int[Tensor, "n 2"], side: int) -> None:
        self.glyphs, self.at = glyphs, at.tolist()
        self.levels = (Level(side, side, 1.0),)

    def read(self, level: int, y: int, x: int, height: int, width: int) -> UInt8[Tensor, "1 h w"]:
        """The pixels [y, y + height) x [x, x + width)."""
        pixels = torch.zeros(1, height, width, dtype=torch.uint8)
        for glyph, (row, column) in enumerate(self.at):
            top, left = row - y, column - x
            if -GLYPH < top < height and -GLYPH < left < width:
                part = self.glyphs[glyph, max(-top, 0) : height - top, max(-left, 0) : width - left]
                top, left = max(top, 0), max(left, 0)
                pixels[0, top : top + part.shape[0], left : left + part.shape[1]] = part
        return pixels


class DigitsInNoise:
    """A loader of batches (low, images, labels), without end, that can say where it is.

    low is (b, 1, side / reduction, side / reduction), the mean over squares of pixels; images are `DigitImage`s. All of
    it follows from `seed` and the number of the batch. Training and test images have different digits and strokes.

    Args:
        side: of an image, in pixels; padded to a multiple of 8 with background.
        reduction: of the low-resolution view, along a side: 1, 2, 4 or 8.
        size: images in a batch.
        split: "train" or "test".
    """

    def __init__(
        self, *, side: int = 1500, reduction: int = 8, size: int = 32, split: str = "train", seed: int = 0
    ) -> None:
        self.cells = side // CELL
        if self.cells**2 < DIGITS + STROKES:
            raise ValueError(f"an image holds {DIGITS + STROKES} glyphs in cells of {CELL} pixels; got side={side}.")
        self.side, self.reduction, self.size, self.seed = -(-side // MULTIPLE) * MULTIPLE, reduction, size, seed
        self.digits, self.labels = load_digits(split)
        self.strokes = strokes(KINDS_OF_STROKES, seed=int(split == "test"))
        self.of_class = [(self.labels == label).nonzero()[:, 0] for label in range(10)]
        self.batch = 0

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "b 1 h w"], list[DigitImage], Int[Tensor, " b"]]]:
        while True:
            generator = hashed_generator(self.seed, self.batch)
            self.batch += 1
            yield self._make(generator)

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch = state["batch"]

    def _make(self, generator: torch.Generator) -> tuple[Tensor, list[DigitImage], Tensor]:
        b, glyphs = self.size, DIGITS + STROKES
        order = torch.rand(b, 10, generator=generator).argsort(1)  # the class, then two others, different from it
        classes = torch.cat([order[:, :1].expand(b, SAME), order[:, 1 : 1 + DIGITS - SAME]], 1)
        pick = torch.rand(b, DIGITS, generator=generator)
        digits = torch.tensor(
            [
                [int(self.of_class[c][int(u * len(self.of_class[c]))]) for c, u in zip(row, us, strict=True)]
                for row, us in zip(classes.tolist(), pick.tolist(), strict=True)
            ]
        )
        drawn = torch.randint(len(self.strokes), (b, STROKES), generator=generator)
        ink = torch.cat([self.digits[digits], self.strokes[drawn]], 1)
        cell = torch.rand(b, self.cells**2, generator=generator).topk(glyphs, dim=1).indices
        jitter = torch.randint(CELL - GLYPH + 1, (b, glyphs, 2), generator=generator)
        at = torch.stack([cell // self.cells, cell % self.cells], -1) * CELL + jitter
        images = [DigitImage(ink[i], at[i], self.side) for i in range(b)]
        return low_view(ink, at, self.side, self.reduction), images, classes[:, 0]


def low_view(
    ink: UInt8[Tensor, "b n 28 28"], at: Int[Tensor, "b n 2"], side: int, reduction: int
) -> Float[Tensor, "b 1 h w"]:
    """The mean over squares of pixels, from the glyphs alone: P_y glyph P_x^T, added where the glyph lies."""
    b, n = at.shape[:2]
    covered = -(-(GLYPH + reduction - 1) // reduction)  # low-resolution pixels that a glyph may touch, along a side
    place = torch.arange(covered * reduction).view(covered, reduction, 1)
    inside = place == torch.arange(GLYPH) + torch.arange(reduction)[:, None, None, None]
    pooling = inside.float().sum(2) / reduction  # (offset, covered, 28)
    start, offset = at.flatten(0, 1) // reduction, at.flatten(0, 1) % reduction
    pooled = pooling[offset[:, 0]] @ (ink.flatten(0, 1).float() / 255) @ pooling[offset[:, 1]].mT
    low = side // reduction
    cells = torch.arange(covered)
    index = (start[:, :1, None] + cells[:, None]) * low + start[:, 1:, None] + cells  # what reaches over an edge is 0
    index = (index + (torch.arange(b).repeat_interleave(n) * low**2)[:, None, None]).flatten()
    pixels = torch.zeros(b * low**2 + covered * low)
    return pixels.index_add(0, index, pooled.flatten())[: b * low**2].view(b, 1, low, low)


@lru_cache(2)
def load_digits(split: str) -> tuple[UInt8[Tensor, "n 28 28"], Int[Tensor, " n"]]:
    """The digits that the package ships, for `split` "train" or "test" (the last fifth of each), and their classes."""
    images, labels = read()
    chosen = []
    for digit in range(10):
        index = (labels == digit).nonzero()[:, 0]
        cut = len(index) * 4 // 5
        chosen.append(index[:cut] if split == "train" else index[cut:])
    index = torch.cat(chosen)
    return images[index], labels[index].long()


@lru_cache(2)
def strokes(count: int, *, seed: int) -> UInt8[Tensor, "n 28 28"]:
    """Curved lines as bright as the digits' and a little thinner: quadratic Bezier curves from three random points."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, 40)[:, None]
    pixels = torch.arange(GLYPH) + 0.5
    drawn = []
    for _ in range(0, count, 500):
        a, b, c = 4 + 20 * torch.rand(3, 500, 1, 2, generator=generator)
        path = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c  # (500, 40, 2)
        y, x = ((path[:, :, None, d] - pixels) ** 2 for d in (0, 1))
        nearest = torch.stack([(y[i, :, :, None] + x[i, :, None]).amin(0) for i in range(500)])
        drawn.append((255 * (1.3 * torch.exp(-nearest / (2 * 0.9**2))).clamp(max=1)).byte())
    return torch.cat(drawn)[:count]
