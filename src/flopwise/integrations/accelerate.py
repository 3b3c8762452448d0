"""Hugging Face Accelerate: importance sampling in a training loop that it prepared.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # the loader yields presamples
    sampler = ImportanceSampler(lambda batch: model(batch[0]), loss, batch_size=32, model=model)
    importance = ImportanceSampling(accelerator, sampler, loader, optimizer)
    for epoch in range(epochs):
        for batch in importance.batches():
            with accelerator.accumulate(model):
                accelerator.backward(sampler.loss(model(batch.data[0]), batch))
                optimizer.step()
                optimizer.zero_grad()

`accelerator.save_state` and `load_state` take the sampler along, on every rank. The prepared model scores as it trains:
with its mixed precision, and on all ranks where a forward needs them.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, SequentialSampler

from flopwise.importance_sampling import ImportanceSampler, WeightedBatch

try:
    from accelerate import Accelerator, skip_first_batches
    from accelerate.data_loader import SeedableRandomSampler
    from accelerate.utils import broadcast_object_list
except ImportError as error:
    raise ImportError(f"the Accelerate integration needs accelerate: pip install 'flopwise[hf]' ({error}).") from error

from flopwise.integrations.importance import Passes, load_state, save_state, scale_rate


class ImportanceSampling:
    """Ties a sampler to what an `Accelerator` prepared: its loader, its optimizer, its checkpoints.

    Args:
        accelerator: windows of gradient accumulation are taken from it.
        sampler: its `forward` calls the prepared model.
        loader: prepared, yields presamples; it shuffles by the number of the pass (`use_seedable_sampler=True`) or not
            at all, and may be stateful (`use_stateful_dataloader=True`).
        optimizer: prepared; its steps are taken at the rate times `sampler.rate_scale`. None leaves the rate alone.

    Raises:
        ValueError: the order of the loader cannot be had again after a restart, or accumulation ends with the loader.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sampler: ImportanceSampler,
        loader: Any,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        windows = accelerator.gradient_accumulation_steps
        if windows > 1 and accelerator.gradient_state.sync_with_dataloader:
            raise ValueError(
                "a presample is several batches, so windows of accumulation do not end with the loader; got "
                f"{windows} steps that do. Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin("
                f"num_steps={windows}, sync_with_dataloader=False))."
            )
        sampler.accumulate = windows
        self.sampler = sampler
        self.loader = Passes(beginner_of(loader), endless=False)
        if optimizer is not None:
            scale_rate(sampler, getattr(optimizer, "optimizer", optimizer))
        rank, ranks = accelerator.process_index, accelerator.num_processes

        def save(_models: Any, _weights: Any, folder: str) -> None:
            save_state(sampler, Path(folder), rank, ranks)

        def load(_models: Any, folder: str) -> None:
            load_state(sampler, Path(folder), rank, ranks)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def batches(self) -> Iterator[WeightedBatch]:
        """One pass over the loader, as `ImportanceSampler.batches`; after `load_state`, the rest of the saved one."""
        return self.sampler.batches(self.loader)


def beginner_of(loader: Any) -> Callable[[int, int], Iterable[Any]]:
    """(number of the pass, presamples to leave out) -> the others. Leaving out skips indices and loads nothing.

    A stateful loader's own state holds where it is but not its order, so it is told its place like any other, after it
    has forgotten what `accelerator.load_state` told it.
    """
    order = None if isinstance(loader.dataset, IterableDataset) else _order_of(loader)
    if not isinstance(order, SeedableRandomSampler | SequentialSampler):
        raise ValueError(
            "a resumed run needs the same presamples again, so the order of a pass must follow from its number; got "
            f"sampler={type(order).__name__} over {type(loader.dataset).__name__}. Use a data set with indices, and "
            "shuffle with DataLoaderConfiguration(use_seedable_sampler=True)."
        )
    if not (getattr(loader.batch_sampler, "even_batches", True) or loader.batch_sampler.drop_last):
        raise ValueError(
            "all processes get as many presamples, or they would wait for each other; got a loader with "
            "even_batches=False, whose last presamples some do not get. Use even_batches=True, or drop_last=True."
        )
    if isinstance(order, SeedableRandomSampler):
        # it has the seed of torch, which every process draws for itself unless told, and the order must be one
        order.initial_seed = broadcast_object_list([order.initial_seed])[0]

    fresh = loader.state_dict() if getattr(loader, "use_stateful_dataloader", False) else None

    def begin(number: int, done: int) -> Iterable[Any]:
        if fresh is not None:
            loader.load_state_dict(fresh)
        rest: Any = skip_first_batches(loader, done) if done else loader
        rest.set_epoch(number)
        # without a generator of its own, seeds for its workers come from the one that dropout uses
        rest.base_dataloader.generator = (rest.generator or torch.Generator()).manual_seed(number)
        return rest

    return begin


def _order_of(loader: Any) -> Any:
    """The sampler below a loader's batches; what shares them out among processes knows it only if it shuffles."""
    order = loader.get_sampler()
    if order is None:
        order = getattr(getattr(loader.batch_sampler, "batch_sampler", None), "sampler", None)
    return order
