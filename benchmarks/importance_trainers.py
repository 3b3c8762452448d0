"""What importance sampling costs in the trainers while its gate is off: a step with it over a plain one.

    python benchmarks/importance_trainers.py      one thread, one process, alternating, medians of CPU time

Appends one record to benchmarks/results/importance_trainers.jsonl. "never" is the integration alone; "auto, off" also
scores plain batches. Examples are made beforehand and indexed.
"""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from flopwise import ImportanceSampler
from flopwise.experiments.fashion_mnist import load, normalise
from flopwise.experiments.importance import loss_per_example, small_cnn
from flopwise.experiments.runner import provenance
from flopwise.importance_sampling.sampler import LEARNED_EACH
from flopwise.integrations import accelerate as for_accelerate
from flopwise.integrations import lightning as for_lightning
from flopwise.integrations.trainer import ImportanceSamplingMixin

RESULTS = Path(__file__).parent / "results" / "importance_trainers.jsonl"
BATCH, RATIO = 64, 6
ROUNDS, STEPS = 21, 48


def kept_off(sampler: ImportanceSampler) -> ImportanceSampler:
    """As after many presamples on which it did not pay: it measures as ever, and stays off."""
    sampler._gate.decide = lambda *_: None  # type: ignore[method-assign]
    sampler._gate.updates = LEARNED_EACH
    return sampler


class Texts(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 500, (BATCH * STEPS, 32), generator=generator)
        self.labels = torch.randint(2, (BATCH * STEPS,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


class Clock:
    """CPU seconds from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    @property
    def seconds(self) -> float:
        return self.marks[-1] - self.marks[0]


class TrainerClock(Clock, TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.process_time())


class LightningClock(Clock, Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.marks = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.marks.append(time.process_time())


def hugging_face(folder: str) -> dict[str, Callable[[], float]]:
    class Off(ImportanceSamplingMixin):
        @property
        def sampler(self) -> ImportanceSampler:
            new, sampler = self._sampler is None, super().sampler
            return kept_off(sampler) if new else sampler

    def make(kind: type, **options: Any) -> Callable[[], float]:
        config = BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=500,
            max_position_embeddings=32,
        )  # fmt: skip
        clock = TrainerClock()
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=STEPS, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-5,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        trainer = kind(model, arguments, train_dataset=Texts(), callbacks=[clock], **options)

        def run() -> float:
            trainer.train()
            return clock.seconds

        return run

    return {
        "plain": make(Trainer),
        "never": make(ImportanceSamplingMixin, importance={"gate": "never"}),
        "auto, off": make(Off),
    }


def images() -> TensorDataset:
    pixels = load()[0]
    return TensorDataset(normalise(pixels.pixels[: BATCH * STEPS]), pixels.labels[: BATCH * STEPS])


def in_lightning(folder: str) -> dict[str, Callable[[], float]]:
    class Module(LightningModule):
        def __init__(self, gate: str | None) -> None:
            super().__init__()
            self.cnn = small_cnn(0)
            self.sampler: Any = gate and ImportanceSampler(
                lambda batch: self.cnn(batch[0]), loss_per_example, batch_size=BATCH, gate=gate, model=self.cnn  # type: ignore[arg-type]
            )  # fmt: skip
            if gate == "auto":
                kept_off(self.sampler)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.sampler:
                return self.sampler.loss(self.cnn(batch.data[0]), batch)
            return loss_per_example(self.cnn(batch[0]), batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-5)

    def make(gate: str | None) -> Callable[[], float]:
        module, clock = Module(gate), LightningClock()

        def run() -> float:
            callbacks: list[Any] = [clock]
            loader: Any = DataLoader(images(), batch_size=BATCH, shuffle=True)
            if gate:
                importance = for_lightning.ImportanceSampling(module.sampler)
                callbacks.insert(0, importance)
                loader = importance.loader(DataLoader(images(), batch_size=BATCH * RATIO, shuffle=True))
            trainer = LightningTrainer(
                default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1,
                enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
            )  # fmt: skip
            trainer.fit(module, loader)
            return clock.seconds

        return run

    return {"plain": make(None), "never": make("never"), "auto, off": make("auto")}


def in_accelerate(folder: str) -> dict[str, Callable[[], float]]:
    def make(gate: Any) -> Callable[[], float]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
        cnn = small_cnn(0)
        size = BATCH * RATIO if gate else BATCH
        model, optimizer, loader = accelerator.prepare(
            cnn, torch.optim.Adam(cnn.parameters(), 1e-5), DataLoader(images(), batch_size=size, shuffle=True)
        )
        sampler = ImportanceSampler(
            lambda batch: model(batch[0]), loss_per_example, batch_size=BATCH, gate=gate or "never", model=model
        )
        importance = for_accelerate.ImportanceSampling(accelerator, sampler, loader, optimizer)
        if gate == "auto":
            kept_off(sampler)

        def step(loss: torch.Tensor) -> None:
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        def run() -> float:
            marks = []
            if gate:
                for batch in importance.batches():
                    step(sampler.loss(model(batch.data[0]), batch))
                    marks.append(time.process_time())
            else:
                for data in loader:
                    step(loss_per_example(model(data[0]), data).mean())
                    marks.append(time.process_time())
            return marks[-1] - marks[0]

        return run

    return {"plain": make(None), "never": make("never"), "auto, off": make("auto")}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    record: dict[str, Any] = {"benchmark": "importance_trainers", "overhead": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("Trainer", hugging_face), ("Lightning", in_lightning), ("Accelerate", in_accelerate)):
            runs = make(folder)
            for run in runs.values():
                run()  # warm up, and count FLOPs
            times = [{way: run() for way, run in (runs | {"again": runs["plain"]}).items()} for _ in range(ROUNDS)]
            noise = [round_["again"] / round_["plain"] for round_ in times]
            record["overhead"][name] = {
                way: median(round_[way] / round_["plain"] for round_ in times) for way in ("never", "auto, off")
            } | {"plain over itself (the noise)": median(noise), "plain step, ms": 1e3 * median(
                round_["plain"] for round_ in times) / (STEPS - 1)}  # fmt: skip
            print(name, json.dumps(record["overhead"][name]), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record | provenance()) + "\n")


if __name__ == "__main__":
    main()
