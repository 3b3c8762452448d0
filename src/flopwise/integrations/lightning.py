"""Lightning: importance sampling as a callback.

    sampler = ImportanceSampler(lambda batch: module(batch[0]), loss, batch_size=32, model=module)
    importance = ImportanceSampling(sampler)
    trainer = Trainer(callbacks=[importance])
    trainer.fit(module, importance.loader(DataLoader(data, batch_size=6 * 32, shuffle=True)))

    def training_step(self, batch, batch_idx):  # in the module
        return sampler.loss(self(batch.data[0]), batch)

The loader's presamples go through the module's batch hooks once, whole; what `training_step` gets is a `WeightedBatch`
on the device. An epoch has as many steps as the data have batches of `batch_size`. Accumulation, precision and
checkpoints are the `Trainer`'s; the callback's state is in them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import wraps
from itertools import islice
from math import ceil
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from flopwise.importance_sampling import ImportanceSampler, WeightedBatch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        f"the Lightning integration needs lightning: pip install 'flopwise[lightning]' ({error})."
    ) from error

from flopwise.integrations.importance import Passes, scale_rate

BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
LOGGED = ("tau2", "R", "on", "rate_scale")


class ImportanceSampling(Callback):
    """Feeds the batches of `sampler` to a Lightning `Trainer` and keeps its state, and torch's random state, in
    the checkpoints: a resumed run equals the uninterrupted one, dropout included.

    Args:
        sampler: its `forward` calls the module, its windows of accumulation are set to the `Trainer`'s.
        rate_scale: whether drawn steps are taken at the learning rate times `sampler.rate_scale`.
        seed: of the order of the loader's passes.
    """

    def __init__(self, sampler: ImportanceSampler, *, rate_scale: bool = True, seed: int = 0) -> None:
        self.sampler, self.rate_scale, self.seed = sampler, rate_scale, seed
        self.trainer: Trainer | None = None
        self._step = ExitStack()  # of the batch that is being trained on
        self._undo = ExitStack()  # of what `setup` and `on_train_start` did
        self._random_state: dict[str, Any] | None = None  # to go on with at the first step

    def loader(self, presamples: DataLoader) -> "Batches":
        """The batches that are drawn from the presamples of this loader: give it to `fit`, or return it from
        `train_dataloader`. In a distributed run `presamples` has a `DistributedSampler`, which is made in
        `train_dataloader`, once the processes know each other."""
        return Batches(self, presamples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.trainer, self.sampler.accumulate = trainer, trainer.accumulate_grad_batches
        owners = [owner for owner in (pl_module, getattr(trainer, "datamodule", None)) if owner is not None]
        for owner in owners:
            for name in BATCH_HOOKS:
                self._pass_batches_by(owner, name)
        self._pass_batches_by(trainer.precision_plugin, "convert_input")

    def _pass_batches_by(self, owner: Any, name: str) -> None:
        """Wrap a hook so that it leaves a `WeightedBatch` alone: its presample went through the hook already."""
        hook = getattr(owner, name)

        @wraps(hook)
        def wrapped(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return batch if isinstance(batch, WeightedBatch) else hook(batch, *args, **kwargs)

        setattr(owner, name, wrapped)
        self._undo.callback(delattr, owner, name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers if self.rate_scale else ():
            for hook in scale_rate(self.sampler, optimizer):
                self._undo.callback(hook.remove)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, WeightedBatch):
            raise TypeError(
                f"the ImportanceSampling callback feeds batches that it drew; got a {type(batch).__name__}. Wrap the "
                "loader of the training data: trainer.fit(module, importance.loader(DataLoader(...)))."
            )
        if self._random_state is not None:
            _set_random_state(self._random_state)
            self._random_state = None
        self._step.enter_context(self.sampler.step(batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step.close()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and (trainer.global_step + 1) % every == 0:
            metrics = self.sampler.metrics()
            pl_module.log_dict({f"importance_{name}": metrics[name] for name in LOGGED}, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._step.__exit__(type(exception), exception, exception.__traceback__)  # a step left half-way is not booked
        self._undo.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of every rank: Lightning writes rank 0's checkpoint only, after asking all of them."""
        mine = {"sampler": self.sampler.state_dict(), "random": _random_state()}
        if self.trainer is None or self.trainer.world_size == 1:
            return {"ranks": [mine]}
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, mine)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, states = self.trainer.global_rank if self.trainer else 0, state_dict["ranks"]
        if self.trainer and len(states) != self.trainer.world_size:
            raise ValueError(
                "a resumed run has as many processes as the one that was saved, since each has draws of its own; got "
                f"{self.trainer.world_size} for {len(states)}. Load the weights alone to go on with another number."
            )
        self.sampler.load_state_dict(states[rank]["sampler"])
        self._random_state = states[rank]["random"]


class Batches:
    """What Lightning takes for the loader: epochs of a fixed number of batches, cut from an endless stream."""

    def __init__(self, importance: ImportanceSampling, presamples: DataLoader) -> None:
        self.importance, self.presamples = importance, presamples
        self._draws: Iterator[WeightedBatch] | None = None

    def __len__(self) -> int:
        """Whole windows of accumulation."""
        sampler = self.importance.sampler
        windows = ceil(len(self.presamples.sampler) / (sampler.batch_size * sampler.accumulate))  # type: ignore[arg-type]
        return windows * sampler.accumulate

    def __iter__(self) -> Iterator[WeightedBatch]:
        trainer = self.importance.trainer
        if trainer is None:
            raise ValueError(
                "this loader belongs to a callback: Trainer(callbacks=[importance]), with the same object."
            )
        if self._draws is None:
            begin = _beginner_of(self.presamples, self.importance.seed, trainer.world_size)
            passes = Passes(begin, endless=True, prepare=lambda presample: _to_device(trainer, presample))
            self._draws = self.importance.sampler.draws(passes)
        for _ in range(len(self)):
            with trainer.precision_plugin.train_step_context():  # scoring as in training
                batch = next(self._draws)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the callback's state says where the data are. Lightning takes loaders that have it for resumable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _beginner_of(loader: DataLoader, seed: int, world_size: int) -> Callable[[int, int], Iterable[Any]]:
    """(number of the pass, presamples to leave out) -> the others; they are loaded, and dropped."""
    order = loader.sampler
    if world_size > 1 and not hasattr(order, "set_epoch"):
        raise ValueError(
            f"each of {world_size} processes trains on data of its own; got sampler={type(order).__name__}, which "
            "gives all of them to each. In the module's train_dataloader: return importance.loader(DataLoader(data, "
            "batch_size=..., sampler=DistributedSampler(data)))."
        )
    if not (hasattr(order, "set_epoch") or isinstance(order, RandomSampler | SequentialSampler)):
        raise ValueError(
            "a resumed run needs the same presamples again, so the order of a pass must follow from its number; got "
            f"sampler={type(order).__name__}. Use shuffle=True, or a sampler with set_epoch(number of the pass)."
        )

    def begin(number: int, done: int) -> Iterable[Any]:
        if hasattr(order, "set_epoch"):
            order.set_epoch(number)  # type: ignore[attr-defined]
        elif isinstance(order, RandomSampler):
            order.generator = torch.Generator().manual_seed(seed + number)
        loader.generator = torch.Generator().manual_seed(number)  # not the one that dropout uses
        return islice(loader, done, None)

    return begin


def _to_device(trainer: Trainer, presample: Any) -> Any:
    """What Lightning does with a batch before a step."""
    presample = trainer.precision_plugin.convert_input(presample)
    presample = trainer.lightning_module._on_before_batch_transfer(presample, dataloader_idx=0)
    return trainer.strategy.batch_to_device(presample, dataloader_idx=0)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.random.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.random.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
