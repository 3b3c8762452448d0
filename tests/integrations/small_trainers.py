"""Tiny Trainers for the tests of importance sampling: most texts are easy, a few have a label nothing tells."""

from pathlib import Path
from typing import Any

import torch
from small_models import TEXT
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

from flopwise.integrations.trainer import ImportanceSamplingMixin


class Texts(Dataset):
    """Texts of 8 tokens; the label is whether the first is below 25, and for one in twenty it is random."""

    def __init__(self, n: int = 192, causal: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 50, (n, 8), generator=generator)
        self.labels = (self.ids[:, 0] < 25).long()
        noise = torch.rand(n, generator=generator) < 0.05
        self.labels[noise] = torch.randint(2, (int(noise.sum()),), generator=generator)
        self.lengths = torch.randint(3, 9, (n,), generator=generator)
        self.causal = causal

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not self.causal:
            return {"input_ids": self.ids[i], "labels": self.labels[i]}
        keep = torch.arange(8) < self.lengths[i]
        return {
            "input_ids": torch.where(keep, self.ids[i], 0),
            "attention_mask": keep.long(),
            "labels": torch.where(keep, self.ids[i], -100),
        }


def bert(dropout: float = 0.0) -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                **TEXT, max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
            )
        )


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TEXT, max_position_embeddings=16))


class Skewed(ImportanceSamplingMixin):
    """One text in eight has nearly all of the loss, so that the gate switches on."""

    def loss_per_example(self, outputs, inputs) -> torch.Tensor:
        losses: Any = super().loss_per_example(outputs, inputs)
        return losses * torch.where(inputs["input_ids"][:, 1] < 9, 5.0, 0.05)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer_of(
    model, data, folder: Path, *, kind: Any = ImportanceSamplingMixin, callbacks=None, importance=None, **options
) -> Any:
    extra = {"importance": importance, "presample_ratio": 4} if issubclass(kind, ImportanceSamplingMixin) else {}
    return kind(model, arguments(folder, **options), train_dataset=data, callbacks=callbacks, **extra)
