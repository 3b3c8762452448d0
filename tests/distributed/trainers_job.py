"""One rank of a job under torchrun that trains by way of a trainer, and again from a checkpoint.

    torchrun ... trainers_job.py WHAT FOLDER

WHAT: lightning | accelerate | trainer, joined by +, in that order: Lightning's processes know each other only once it
fits, long after the sampler is made. Writes FOLDER/WHAT_RANK.pt for each, with "resumed" beside the whole run.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job import BATCH, PRESAMPLE, examples, loss, network
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from flopwise.importance_sampling import ImportanceSampler, WeightedBatch

EXAMPLES, STEPS, SAVED, WORDS = 256, 50, 35, 30  # SAVED: the step of the checkpoint, in the middle of a pass
WINDOW = 2  # batches per optimizer step


class Loaded(Dataset):
    """Examples, and which of them this rank loaded, in order."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.order = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        self.order.append(i)
        return self.rows[i]


class Record:
    """Of every optimizer step: the batches of its window, the parameters before it and the gradient it takes."""

    def __init__(self, model: nn.Module, data: Loaded) -> None:
        self.model, self.data = model, data
        self.steps: list[Any] = []
        self.window: list[Any] = []
        self.decisions: list[Any] = []

    def batch(self, batch: WeightedBatch, sampler: ImportanceSampler) -> None:
        self.window.append((batch.data, batch.weights, batch.positions))
        self.decisions.append((batch.drawn, sampler._gate.ratio, sampler.rate_scale))

    def step(self, *_: Any) -> None:
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])  # type: ignore[union-attr]
        self.steps.append((self.window, self._parameters(), gradient))
        self.window = []

    def _parameters(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def end(self, sampler: ImportanceSampler) -> dict[str, Any]:
        return {
            "parameters": self._parameters(),
            "decisions": self.decisions,
            "steps": self.steps,
            "loaded": self.data.order,
            "seed": sampler._generator.initial_seed(),
            "metrics": sampler.metrics(),
        }


def rows() -> list[Any]:
    x, y = examples(0, EXAMPLES)
    return list(zip(x, y, strict=True))


def lightning(folder: Path) -> dict[str, Any]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from flopwise.integrations.lightning import ImportanceSampling

    class Module(LightningModule):
        def __init__(self, shared_out: bool = True) -> None:
            super().__init__()
            self.network, self.data, self.shared_out = network(), Loaded(rows()), shared_out
            self.record = Record(self.network, self.data)
            self.sampler = ImportanceSampler(lambda data: self.network(data[0]), loss, batch_size=BATCH, model=self)
            self.importance = ImportanceSampling(self.sampler)

        def train_dataloader(self) -> Any:
            order = DistributedSampler(self.data) if self.shared_out else None
            return self.importance.loader(DataLoader(self.data, batch_size=PRESAMPLE, sampler=order))

        def training_step(self, batch, batch_idx):
            self.record.batch(batch, self.sampler)
            return self.sampler.loss(self.network(batch.data[0]), batch)

        def on_before_optimizer_step(self, optimizer):  # Lightning's backward runs inside optimizer.step
            self.record.step()

        def configure_optimizers(self):
            return torch.optim.Adam(self.network.parameters(), 1e-2)

    def fit(module: Module, checkpoint: Path | None = None) -> dict[str, Any]:
        trainer = Trainer(
            default_root_dir=folder, accelerator="cpu", devices=2, strategy="ddp", max_steps=STEPS, logger=False,
            callbacks=[module.importance, ModelCheckpoint(folder, "lightning", every_n_train_steps=SAVED)],
            accumulate_grad_batches=WINDOW, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, ckpt_path=checkpoint)
        return module.record.end(module.sampler)

    end = fit(Module())
    end["resumed"] = fit(Module(), folder / "lightning.ckpt")
    try:
        fit(Module(shared_out=False))
    except ValueError as error:
        end["refused"] = str(error)
    return end


def accelerate(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import GradientAccumulationPlugin

    from flopwise.integrations.accelerate import ImportanceSampling

    def fit(checkpoint: Path, resume: bool) -> dict[str, Any]:
        accelerator = Accelerator(
            cpu=True,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=WINDOW, sync_with_dataloader=False),
        )
        data, plain = Loaded(rows()), network()
        inner, loader = torch.optim.Adam(plain.parameters(), 1e-2), DataLoader(data, batch_size=PRESAMPLE, shuffle=True)
        model, optimizer, loader = accelerator.prepare(plain, inner, loader)
        sampler = ImportanceSampler(lambda batch: model(batch[0]), loss, batch_size=BATCH, model=model)
        importance = ImportanceSampling(accelerator, sampler, loader, optimizer)
        record = Record(plain, data)
        inner.register_step_pre_hook(record.step)
        steps = SAVED if resume else 0
        if resume:
            accelerator.load_state(str(checkpoint))
        while steps < STEPS:
            for batch in importance.batches():
                record.batch(batch, sampler)
                with accelerator.accumulate(model):
                    accelerator.backward(sampler.loss(model(batch.data[0]), batch))
                    optimizer.step()
                    optimizer.zero_grad()
                steps += accelerator.sync_gradients
                if steps == SAVED and accelerator.sync_gradients:
                    accelerator.save_state(str(checkpoint))
        return record.end(sampler)

    end = fit(folder / "accelerate", False)
    end["resumed"] = fit(folder / "accelerate", True)
    return end


def texts() -> list[dict[str, torch.Tensor]]:
    """Texts of 2 to 8 words. Those that begin with one of the first words have nearly all of the loss."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(EXAMPLES):
        words, length = torch.randint(WORDS, (8,), generator=generator), torch.randint(2, 9, (), generator=generator)
        keep = torch.arange(8) < length
        texts.append({
            "input_ids": words, "attention_mask": keep.long(), "labels": torch.where(keep, words, -100)
        })  # fmt: skip
    return texts


def weight(inputs: Any) -> torch.Tensor:
    return torch.where(inputs["input_ids"][:, :1] < WORDS // 10, 5.0, 0.05)


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=WORDS, max_position_embeddings=8))  # type: ignore[arg-type]


def trainer(folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from flopwise.integrations.trainer import ImportanceSamplingMixin

    class Sampling(ImportanceSamplingMixin, Trainer):
        record: Record

        def loss_per_example(self, outputs, inputs):
            losses, mask = super().loss_per_example(outputs, inputs)
            return losses * weight(inputs), mask

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.record.batch(inputs, self.sampler)
            return super().training_step(model, inputs, num_items_in_batch)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH, gradient_accumulation_steps=WINDOW,
        max_steps=STEPS, max_grad_norm=0, lr_scheduler_type="constant", save_strategy="steps", save_steps=SAVED,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def fit(checkpoint: str | None = None) -> dict[str, Any]:
        model, data = language_model(), Loaded(texts())
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        training = Sampling(
            model, arguments, train_dataset=data, optimizers=(optimizer, None), presample_ratio=PRESAMPLE // BATCH
        )
        training.record = Record(model, data)
        optimizer.register_step_pre_hook(training.record.step)
        training.train(resume_from_checkpoint=checkpoint)
        return training.record.end(training.sampler)

    end = fit()
    end["resumed"] = fit(str(folder / "trainer" / f"checkpoint-{SAVED}"))
    return end


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the libraries
    parts = {"lightning": lightning, "accelerate": accelerate, "trainer": trainer}
    for part in what.split("+"):
        torch.save(parts[part](folder), folder / f"{part}_{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)  # as in job.py


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
