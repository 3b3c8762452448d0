"""A run of the Trainer for the tests that kill it.   python killed_trainer.py FOLDER KILL_AT PRECISION"""

import os
import signal
import sys
from pathlib import Path

import torch
from small_trainers import Skewed, Texts, bert, trainer_of
from transformers import TrainerCallback


class Kill(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kill_at: int, precision: str) -> None:
    torch.set_num_threads(1)
    trainer = trainer_of(
        bert(dropout=0.1),
        Texts(),
        folder,
        kind=Skewed,
        num_train_epochs=8,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=7,
        bf16=precision == "bf16",
        callbacks=[Kill(kill_at)],
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    end = {
        "model": trainer.model.state_dict(),
        "steps": trainer.state.global_step,
        "metrics": trainer.sampler.metrics(),
    }
    torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
