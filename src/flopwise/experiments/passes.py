"""Shuffled passes over a data set that can say where they are."""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class ShuffledPasses:
    """A loader of batches, pass after pass over `count` examples, without end, that can say where it is.

    Every pass is a new permutation, cut into batches of `size` (the rest, smaller than a batch, sits this pass out).
    All follows from `seed` and the number of the batch, so that `load_state_dict` is exact.

    Args:
        make: (indices, a generator for what is random in this batch) -> the batch.
    """

    def __init__(
        self, count: int, make: Callable[[Int[Tensor, " b"], torch.Generator], Any], *, size: int, seed: int
    ) -> None:
        if size > count:
            raise ValueError(f"a batch is no larger than the data; got {size} of {count} examples.")
        self.count, self.make, self.size, self.seed = count, make, size, seed
        self.batch = 0
        self._order: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            this_pass, place = divmod(self.batch, self.count // self.size)
            if self._order is None or self._order[0] != this_pass:
                self._order = this_pass, torch.randperm(self.count, generator=hashed_generator(self.seed, 0, this_pass))
            index = self._order[1][place * self.size : (place + 1) * self.size]
            generator = hashed_generator(self.seed, 1, self.batch)
            self.batch += 1
            yield self.make(index, generator)

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch = state["batch"]


def hashed_generator(*numbers: int) -> torch.Generator:
    """One for each list of numbers (seed, batch, ...): hashed, since torch's CPU generator looks at 32 bits."""
    digest = blake2b(" ".join(map(str, numbers)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
