"""A run of Lightning for the tests that kill it.   python killed_lightning.py FOLDER KILL_AT PRECISION"""

import logging
import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sampling_problem import data, network, skewed_loss
from torch.utils.data import DataLoader

from flopwise import ImportanceSampler
from flopwise.integrations.lightning import ImportanceSampling


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.sampler = ImportanceSampler(lambda batch: self.network(batch[0]), skewed_loss, batch_size=8, model=self)

    def training_step(self, batch, batch_idx):
        loss = self.sampler.loss(self.network(batch.data[0]), batch)
        self.log("loss", loss, on_epoch=True, on_step=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kill_at: int, precision: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    module = Module()
    importance = ImportanceSampling(module.sampler)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=10,
        accumulate_grad_batches=2,
        callbacks=[importance, ModelCheckpoint(folder, every_n_train_steps=7, save_last=True), Kill(kill_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = importance.loader(DataLoader(data(), batch_size=56, shuffle=True))
    last = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    end = {"model": module.state_dict(), "steps": trainer.global_step, "metrics": module.sampler.metrics()}
    torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
