"""Plays as sequences of bytes."""

import lzma
from collections.abc import Iterator
from importlib.resources import files

import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

VOCABULARY = 128  # ASCII


def load() -> tuple[UInt8[Tensor, " train"], UInt8[Tensor, " test"]]:
    """18 plays to train on, and Macbeth to test on."""
    folder = files("flopwise.experiments") / "data"
    train, test = (
        lzma.decompress((folder / f"shakespeare-{split}.txt.xz").read_bytes()) for split in ("train", "test")
    )
    return torch.frombuffer(bytearray(train), dtype=torch.uint8), torch.frombuffer(bytearray(test), dtype=torch.uint8)


def encode(text: str) -> Int[Tensor, "1 n"]:
    """The bytes of an ASCII text."""
    return torch.tensor([list(text.encode("ascii"))])


def decode(ids: Integer[Tensor, " n"]) -> str:
    return bytes(ids.tolist()).decode("ascii")


class Excerpts:
    """A loader of batches of excerpts (b, length), as int64, from random places of a text, without end."""

    def __init__(self, text: UInt8[Tensor, " n"], *, size: int, length: int, generator: torch.Generator) -> None:
        self.text, self.size, self.length, self.generator = text, size, length, generator

    def __iter__(self) -> Iterator[Int[Tensor, "b length"]]:
        while True:
            start = torch.randint(len(self.text) - self.length + 1, (self.size, 1), generator=self.generator)
            yield self.text[start + torch.arange(self.length)].long()
