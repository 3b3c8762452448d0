"""Importance sampling as a Lightning callback, on the real library."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from runs import killed_and_resumed_is_identical
from sampling_problem import data, network, skewed_loss
from torch.utils.data import DataLoader, SubsetRandomSampler

from flopwise import ImportanceSampler
from flopwise.integrations.lightning import ImportanceSampling

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library


class Module(LightningModule):
    def __init__(self, gate: Any = "always") -> None:
        super().__init__()
        self.network = network(0.0)
        self.sampler = ImportanceSampler(
            lambda batch: self.network(batch[0]), skewed_loss, batch_size=8, gate=gate, model=self
        )
        self.seen: list[Any] = []
        self.rates: list[float] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        loss = self.sampler.loss(self.network(batch.data[0]), batch)
        self.log("loss", loss, on_epoch=True, on_step=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        optimizer.register_step_post_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))
        return optimizer


def fit(module: Any, folder: Path, loader: Any = None, **options: Any) -> Trainer:
    importance = ImportanceSampling(module.sampler)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[importance], **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(
        module, importance.loader(DataLoader(data(), batch_size=48, shuffle=True)) if loader is None else loader
    )
    return trainer


def test_off_it_is_plain_lightning_to_the_last_bit(tmp_path: Path):
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(0.0)

        def training_step(self, batch, batch_idx):
            return skewed_loss(self.network(batch[0]), batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    ours, plain = Module("never"), Plain()
    fit(ours, tmp_path, accumulate_grad_batches=3)
    batches = [batch.data for batch in ours.seen]
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=3,
    )  # fmt: skip
    trainer.fit(plain, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(batches) == 2 * 24
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_epochs_are_whole_windows_of_accumulation(tmp_path: Path):
    module = Module()
    trainer = fit(module, tmp_path, accumulate_grad_batches=5)
    assert module.sampler.accumulate == 5
    assert len(module.seen) == 2 * 25 and trainer.global_step == 2 * 5  # 24 batches, in windows of 5
    assert all(batch.drawn for batch in module.seen)
    assert trainer.callback_metrics["loss_epoch"].isfinite()


def test_batch_hooks_see_whole_presamples_once(tmp_path: Path):
    sizes = []

    class Augmenting(Module):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            sizes.append(len(batch[0]))
            return [batch[0] + 1, batch[1]]

    fit(Augmenting(), tmp_path, max_epochs=1)
    assert sizes == [48] * 24


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision: str, tmp_path: Path):
    module = Module()
    dtypes = set()
    module.network[-1].register_forward_hook(lambda m, i, output: dtypes.add((m.training, output.dtype)))
    fit(module, tmp_path, precision=precision)
    assert dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(batch.weights.dtype == torch.float32 for batch in module.seen)


def test_drawn_steps_take_the_scaled_rate_and_hooks_are_undone(tmp_path: Path):
    module = Module()
    trainer = fit(module, tmp_path, max_epochs=3)
    assert module.sampler.rate_scale > 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert not {"on_after_batch_transfer", "transfer_batch_to_device"} & set(vars(module))
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_a_step_that_fails_leaves_batch_norm_as_it_was(tmp_path: Path):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 3:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, tmp_path)
    assert module.network[1].track_running_stats


def test_what_it_refuses(tmp_path: Path):
    with pytest.raises(TypeError, match=r"got a list\. Wrap the loader"):
        fit(Module(), tmp_path, DataLoader(data(), batch_size=48))
    module = Module()
    other = ImportanceSampling(module.sampler).loader(DataLoader(data(), batch_size=48))
    with pytest.raises(ValueError, match="belongs to a callback"):
        fit(module, tmp_path, other)
    module = Module()
    importance = ImportanceSampling(module.sampler)
    loader = importance.loader(DataLoader(data(), batch_size=48, sampler=SubsetRandomSampler(range(100))))
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[importance], max_epochs=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="got sampler=SubsetRandomSampler"):
        trainer.fit(module, loader)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_killed_and_resumed_is_identical(precision: str, tmp_path: Path):
    killed_and_resumed_is_identical("killed_lightning.py", tmp_path, precision, kill_at=[24, 80])
