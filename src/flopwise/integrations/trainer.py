"""Hugging Face `Trainer`: importance sampling by one name more in its bases.

    from flopwise.integrations.trainer import ImportanceSamplingMixin

    class SamplingTrainer(ImportanceSamplingMixin, Trainer): ...

    trainer = SamplingTrainer(model, args, train_dataset=data)
    trainer.train()

`args` mean what they mean without it: `per_device_train_batch_size` is the batch of a training step, an epoch has as
many steps as ever, `gradient_accumulation_steps`, mixed precision, checkpoints and `resume_from_checkpoint` work as
ever. While the gate is on each batch is drawn from a presample and costs its scoring, so the data are gone through more
often.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from flopwise.importance_sampling import ImportanceSampler, WeightedBatch

try:
    from transformers import Trainer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(f"the Trainer integration needs transformers 5: pip install 'flopwise[hf]' ({error}).") from error

from flopwise.integrations.accelerate import beginner_of
from flopwise.integrations.importance import Passes, load_state, save_state, scale_rate

IGNORED = -100  # transformers' label for a position that does not count
LOGGED = ("tau2", "R", "on", "rate_scale")


class ImportanceSamplingMixin(Trainer):
    """Trains on drawn batches; put it before `Trainer` (or a subclass of it) in the bases.

    The loss of an optimizer step is the mean over all items (examples, or tokens that count) of its window of
    accumulation, over all ranks: what `num_items_in_batch` is for. A drawn batch stands for its presample, so it counts
    as many items as the presample has on average: dividing by the tokens that happen to be drawn would be biased.

    Args:
        presample_ratio: the loader collates this many batches at once; the gate chooses its r up to it.
        importance: options of `ImportanceSampler`, such as `{"gate": "paper", "seed": 1}`.
        rate_scale: whether drawn steps are taken at the learning rate times `sampler.rate_scale`.
        args, kwargs: the `Trainer`'s.

    Raises:
        ValueError: the data set has no length, its order cannot be had again, or a loss is already reduced.
    """

    def __init__(
        self,
        *args: Any,
        presample_ratio: int = 6,
        importance: Mapping[str, Any] | None = None,
        rate_scale: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if presample_ratio < 1:
            raise ValueError(f"presample_ratio is presample over batch, at least 1; got {presample_ratio}.")
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func gives one loss for all examples, and importance sampling needs one for each: "
                "override loss_per_example(outputs, inputs) instead."
            )
        self.presample_ratio, self.importance = presample_ratio, dict(importance or {})
        self.loss_is_scaled_for_ga = True  # by the items of the window
        self._rate_scale, self._rate_hooks = rate_scale, []
        self._sampler: ImportanceSampler | None = None
        self._batch: WeightedBatch | None = None  # that is being trained on
        self._stream: _Stream | None = None

    @property
    def sampler(self) -> ImportanceSampler:
        """The sampler of this run of `train`; made when the model is prepared."""
        if self._sampler is None:
            options = {"seed": self.args.seed, "model": self.model, **self.importance}
            self._sampler = ImportanceSampler(
                self._score_forward,
                self.loss_per_example,
                batch_size=self._train_batch_size,
                accumulate=self.args.gradient_accumulation_steps,
                **options,
            )
            for hook in self._rate_hooks:
                hook.remove()
            optimizer: Any = self.optimizer
            inner = getattr(optimizer, "optimizer", optimizer)
            self._rate_hooks = scale_rate(self._sampler, inner) if self._rate_scale else []
        return self._sampler

    def loss_per_example(self, outputs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """(outputs, inputs) -> losses of shape (b,) or (b, T), or those and their mask; override it for other losses.

        Knows classification and regression of sequences, classification of tokens, masked and causal language models.
        """
        labels = inputs["labels"]
        smoothing = self.args.label_smoothing_factor
        outputs = outputs.float()
        if labels.is_floating_point():
            if self._config.problem_type == "multi_label_classification":
                losses = F.binary_cross_entropy_with_logits(outputs, labels.float(), reduction="none")
            else:
                losses = (outputs.reshape(labels.shape) - labels.float()).square()
            return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
        if outputs.ndim != labels.ndim + 1:
            raise ValueError(
                "the loss is known for outputs of one dimension (the classes) more than the labels; got outputs "
                f"{tuple(outputs.shape)} and labels {tuple(labels.shape)}. Override loss_per_example(outputs, inputs)."
            )
        if labels.ndim == 1:
            return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=smoothing)
        if self._causal:
            outputs, labels = outputs[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(
            outputs.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
        )
        return losses, labels != IGNORED

    def count_items(self, inputs: Mapping[str, Tensor]) -> float:
        """Examples, or positions that count, of a plain batch; must agree with the mask of `loss_per_example`."""
        labels = inputs.get("labels")
        if labels is None or labels.ndim == 1 or labels.is_floating_point():
            return float(len(next(iter(inputs.values()))))
        return float(((labels[:, 1:] if self._causal else labels) != IGNORED).sum())

    @property
    def _config(self) -> Any:
        model: Any = self.model
        return model.config

    @property
    def _causal(self) -> bool:
        return type(self.accelerator.unwrap_model(self.model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _score_forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model as it trains: wrapped, in its mixed precision."""
        model: Any = self.model_wrapped
        return model(**self._without_labels(inputs)).logits

    def _without_labels(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Or the model would compute a loss of its own; an encoder-decoder makes its decoder's inputs from them."""
        if self._config.is_encoder_decoder:
            return dict(inputs)
        return {name: value for name, value in inputs.items() if name != "labels"}

    def get_train_dataloader(self) -> Any:
        batch_size = self._train_batch_size
        self._train_batch_size = batch_size * self.presample_ratio
        try:
            loader: Any = super().get_train_dataloader()
        finally:
            self._train_batch_size = batch_size
        passes = Passes(
            beginner_of(loader), endless=True, prepare=lambda presample: dict(self._prepare_inputs(presample))
        )
        window = batch_size * self.args.gradient_accumulation_steps
        windows = ceil(len(loader.dataset) / (window * self.args.world_size))
        self._sampler = None
        self._stream = _Stream(self, loader.dataset, passes, windows * self.args.gradient_accumulation_steps)
        return self._stream

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches = list(islice(epoch_iterator, num_batches))
        items = torch.tensor(sum(self._items(batch) for batch in batches), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            everywhere: Any = self.accelerator.gather(items)
            items = everywhere.sum() / self.args.world_size  # DDP takes the mean over ranks
        return batches, items

    def _items(self, batch: WeightedBatch) -> float:
        if batch.drawn:
            return len(batch.weights) * (1.0 if batch.positions is None else batch.positions)
        return self.count_items(batch.data)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._batch = inputs
        try:
            with self.sampler.step(inputs):
                return super().training_step(model, inputs.data, num_items_in_batch)
        finally:
            self._batch = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        if self._batch is None:  # evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**self._without_labels(inputs))
        loss = self.sampler.loss(outputs.logits, self._batch) * (self._items(self._batch) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def num_examples(self, dataloader: Any) -> int:
        return len(dataloader.data) if isinstance(dataloader, _Stream) else super().num_examples(dataloader)

    def floating_point_ops(self, inputs: Any) -> int:
        return super().floating_point_ops(inputs.data if isinstance(inputs, WeightedBatch) else inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(inputs.data if isinstance(inputs, WeightedBatch) else inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sampler is not None:
            metrics = self._sampler.metrics()
            logs = logs | {f"importance_{name}": metrics[name] for name in LOGGED}
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_state(self.sampler, Path(output_dir), self.args.process_index, self.args.world_size)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._stream is not None:
            load_state(self.sampler, Path(checkpoint), self.args.process_index, self.args.world_size)
            done = self.state.global_step * self.args.gradient_accumulation_steps % len(self._stream)
            self._stream.skipped_by_trainer = 0 if self.args.ignore_data_skip else done


class _Stream(IterableDataset):
    """What the `Trainer` takes for its loader: epochs of a fixed number of batches, cut from an endless stream.

    On resuming, the `Trainer` skips the batches of the epoch that are done. The sampler knows where it was, so what is
    skipped are blanks.
    """

    batch_size, drop_last, prefetch_factor = None, False, None

    def __init__(self, trainer: ImportanceSamplingMixin, data: Any, passes: Passes, length: int) -> None:
        self.trainer, self.data, self.passes, self.length = trainer, data, passes, length
        self.dataset = self
        self.skipped_by_trainer = 0
        self._draws: Iterator[WeightedBatch] | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[WeightedBatch | None]:
        if self._draws is None:
            self._draws = self.trainer.sampler.draws(self.passes)
        skipped, self.skipped_by_trainer = self.skipped_by_trainer, 0
        yield from [None] * skipped
        yield from islice(self._draws, self.length - skipped)
