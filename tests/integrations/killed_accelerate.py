"""A run under Accelerate for the tests that kill it.   python killed_accelerate.py FOLDER KILL_AT LOADER PRECISION"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, set_seed
from sampling_problem import data, network, skewed_loss
from torch.utils.data import DataLoader

from flopwise import ImportanceSampler
from flopwise.integrations.accelerate import ImportanceSampling

EPOCHS, SAVE_EVERY = 10, 3


def main(folder: Path, kill_at: int, loader_kind: str, precision: str) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, use_stateful_dataloader=loader_kind == "stateful"
        ),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False),
    )
    model = network()
    loader = DataLoader(data(), batch_size=56, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2), loader)
    sampler = ImportanceSampler(lambda batch: model(batch[0]), skewed_loss, batch_size=8, model=model)
    importance = ImportanceSampling(accelerator, sampler, loader, optimizer)
    first_epoch, steps = 0, 0
    checkpoints = sorted(folder.glob("checkpoint*"))
    if checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
        first_epoch, steps = torch.load(checkpoints[-1] / "progress.pt")

    def save(epoch: int) -> None:
        accelerator.save_state(str(folder / "part"))
        torch.save((epoch, steps), folder / "part" / "progress.pt")
        (folder / "part").rename(folder / f"checkpoint{steps:04}-{epoch}")

    for epoch in range(first_epoch, EPOCHS):
        for batch in importance.batches():
            with accelerator.accumulate(model):
                accelerator.backward(sampler.loss(model(batch.data[0]), batch))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                steps += 1
                if steps % SAVE_EVERY == 0:
                    save(epoch)
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        if accelerator.sync_gradients:  # not with half a window of gradients
            save(epoch + 1)
    end = {"model": accelerator.unwrap_model(model).state_dict(), "steps": steps, "metrics": sampler.metrics()}
    torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
