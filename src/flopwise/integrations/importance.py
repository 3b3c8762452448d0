"""What the trainers' importance sampling shares: where a loader is, the rate of a drawn step, a state for each rank."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, SequentialSampler
from torch.utils.hooks import RemovableHandle

from flopwise.importance_sampling import ImportanceSampler

try:
    from accelerate import skip_first_batches
    from accelerate.data_loader import SeedableRandomSampler
except ImportError as error:
    raise ImportError(f"this integration needs accelerate: pip install 'flopwise[hf]' ({error}).") from error


class Passes:
    """A loader that Accelerate prepared, pass after pass, which can say where it is and go back there.

    Its order must follow from the number of the pass. Going back skips indices and loads nothing; a stateful loader
    does it by its own state.

    Args:
        endless: whether another pass follows when one ends; otherwise each `iter` is one pass.
        prepare: applied to every presample.
    """

    def __init__(self, loader: Any, *, endless: bool, prepare: Callable[[Any], Any] = lambda presample: presample):
        self.loader, self.endless, self.prepare = loader, endless, prepare
        self.number, self.place = 0, 0
        self._stateful = getattr(loader, "use_stateful_dataloader", False)
        self._loader_state: Any = None
        order = None if isinstance(loader.dataset, IterableDataset) else loader.get_sampler()
        if not isinstance(order, SeedableRandomSampler | SequentialSampler):
            raise ValueError(
                "a resumed run needs the same presamples again, so the order of a pass must follow from its number; got "
                f"sampler={type(order).__name__} over {type(loader.dataset).__name__}. Use a data set with indices, and "
                "shuffle with DataLoaderConfiguration(use_seedable_sampler=True)."
            )

    def __iter__(self) -> Iterator[Any]:
        while True:
            loader = self.loader
            if self._loader_state is not None:
                loader.load_state_dict(self._loader_state)
            elif self.place:
                loader = skip_first_batches(loader, self.place)
            loader.set_epoch(self.number)
            if loader.generator is None:  # else seeds for its workers come from the generator that dropout uses
                loader.base_dataloader.generator = torch.Generator()
            loader.generator.manual_seed(self.number)
            for presample in loader:
                self.place += 1
                yield self.prepare(presample)
            self.number, self.place, self._loader_state = self.number + 1, 0, None
            if not self.endless:
                return

    def state_dict(self) -> dict[str, Any]:
        midway = self._stateful and self.place > 0
        return {"pass": self.number, "place": self.place, "loader": self.loader.state_dict() if midway else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.place, self._loader_state = state["pass"], state["place"], state["loader"]


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


def save_state(sampler: ImportanceSampler, folder: Path, rank: int) -> None:
    """One file a rank: each has draws and scores of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(sampler.state_dict(), folder / _name(rank))


def load_state(sampler: ImportanceSampler, folder: Path, rank: int) -> None:
    path = folder / _name(rank)
    if not path.exists():
        raise ValueError(
            f"a resumed run needs the sampler's state, one file a rank; {path} is missing. Was the checkpoint written "
            "without importance sampling, or by another number of processes? Then start from its weights alone."
        )
    sampler.load_state_dict(torch.load(path, weights_only=True))


def _name(rank: int) -> str:
    return f"importance_{rank}.pt"
