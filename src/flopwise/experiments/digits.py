"""Digits as sequences: a token that names the digit, then 784 pixels of 16 intensities, row by row."""

from collections.abc import Iterator
from importlib.resources import files

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from flopwise.experiments.fashion_mnist import read_idx

SIDE = 28
PIXELS = SIDE * SIDE
LEVELS = 16  # tokens 0 to 15 are intensities, from black to white
VOCABULARY = LEVELS + 10  # and LEVELS + d names digit d
HELD_OUT = 100  # of each digit, the last ones


def read() -> tuple[UInt8[Tensor, "n 28 28"], UInt8[Tensor, " n"]]:
    """The 10,000 shipped MNIST images, digit by digit, and their labels."""
    folder = files("flopwise.experiments") / "data"
    return read_idx(folder / "digits-images-idx3-ubyte.gz"), read_idx(folder / "digits-labels-idx1-ubyte.gz")


def load() -> tuple[UInt8[Tensor, "train 785"], UInt8[Tensor, "test 785"]]:
    """The shipped MNIST digits as sequences of tokens, 9,000 to train on and 1,000 to test on, digit by digit."""
    images, labels = read()
    levels = (images.flatten(1).float() * ((LEVELS - 1) / 255)).round().to(torch.uint8)
    sequences = torch.cat([labels[:, None] + LEVELS, levels], 1)
    digits = [sequences[labels == digit] for digit in range(10)]
    return torch.cat([digit[:-HELD_OUT] for digit in digits]), torch.cat([digit[-HELD_OUT:] for digit in digits])


def pictures(pixels: Int[Tensor, "b 784"]) -> list[list[list[int]]]:
    """Rows of intensities from 0 to 255, as a page needs them; a token that is no intensity is black."""
    shown = torch.where(pixels < LEVELS, pixels, 0) * 255 // (LEVELS - 1)
    return shown.unflatten(1, (SIDE, SIDE)).tolist()


class Shuffled:
    """A loader of batches of different sequences (b, n), as int64, without end; the generator decides alone."""

    def __init__(self, sequences: UInt8[Tensor, "count n"], *, size: int, generator: torch.Generator) -> None:
        self.sequences, self.size, self.generator = sequences, size, generator

    def __iter__(self) -> Iterator[Int[Tensor, "b n"]]:
        while True:
            index = torch.randperm(len(self.sequences), generator=self.generator)[: self.size]
            yield self.sequences[index].long()
