"""What the trainers' importance sampling shares: where a loader is, the rate of a drawn step, a state for each rank."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from flopwise.importance_sampling import ImportanceSampler


class Passes:
    """A loader, pass after pass, which can say where it is and go back there.

    Args:
        begin: (number of the pass, presamples to leave out) -> the others, in an order that follows from the number.
        endless: whether another pass follows when one ends; otherwise each `iter` is one pass.
        prepare: applied to every presample.
    """

    def __init__(
        self,
        begin: Callable[[int, int], Iterable[Any]],
        *,
        endless: bool,
        prepare: Callable[[Any], Any] = lambda presample: presample,
    ) -> None:
        self.begin, self.endless, self.prepare = begin, endless, prepare
        self.number, self.place = 0, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            for presample in self.begin(self.number, self.place):
                self.place += 1
                yield self.prepare(presample)
            self.number, self.place = self.number + 1, 0
            if not self.endless:
                return

    def state_dict(self) -> dict[str, int]:
        return {"pass": self.number, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number, self.place = state["pass"], state["place"]


def scale_rate(sampler: ImportanceSampler, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Every step of `optimizer` at the rate times `sampler.rate_scale`; the rates are put back right after it."""
    rates: list[Any] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        scale = sampler.rate_scale
        for group in optimizer.param_groups if scale != 1 else ():
            group["lr"] = group["lr"] * scale

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def save_state(sampler: ImportanceSampler, folder: Path, rank: int, ranks: int) -> None:
    """One file a rank: each has draws and scores of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(sampler.state_dict(), folder / _name(rank, ranks))


def load_state(sampler: ImportanceSampler, folder: Path, rank: int, ranks: int) -> None:
    path = folder / _name(rank, ranks)
    if not path.exists():
        raise ValueError(
            f"a resumed run needs the sampler's state, one file a rank; {path} is missing. Was the checkpoint written "
            "without importance sampling, or by another number of processes? Then start from its weights alone."
        )
    sampler.load_state_dict(torch.load(path, weights_only=True))


def _name(rank: int, ranks: int) -> str:
    """With the number of ranks, since no other number of them can go on from it."""
    return f"importance_{rank}_of_{ranks}.pt"
