"""What `flopwise demo linear` shows: digits painted and completed, speed against softmax, a play as it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flopwise.experiments import digits
from flopwise.experiments.linear import complete, paint, shipped, speed, write_play
from flopwise.experiments.runner import Records, run_all

PROMPT = "MACBETH.\n"
COMPLETED = (3, 2, 5, 8)  # digits whose first held-out picture is completed


@dataclass(frozen=True)
class Run:
    """One thing to show; two runs with equal fields are the same run.

    Args:
        kind: "painted", "completed", "speed" or "play".
        count: pictures of each digit, completions of each half, sequences at once, or bytes of the play.
    """

    kind: Literal["painted", "completed", "speed", "play"]
    count: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.count}-seed{self.seed}"


def show(folder: Path, *, each: int, seed: int) -> None:
    """Pictures and speeds; the records are in `folder`/records.jsonl, and what is there already is not made again."""
    run_all([Run("painted", each, seed), Run("completed", 6, seed)], make, folder, title="painting")
    for batch in (1, 32):  # one after the other: they are timed
        run_all([Run("speed", batch)], make, folder, title=f"timing {batch} at once")


def play(folder: Path, *, length: int, seed: int, write: Callable[[str], None]) -> None:
    """A play, handed to `write` character by character as it is made, and put on record; a known one all at once."""
    run, records = Run("play", length, seed), Records(folder)
    if (record := records.find(run)) is not None:
        write(record["text"])
        return
    model, text = shipped("shakespeare"), ""
    for character in write_play(model, PROMPT, length, torch.Generator().manual_seed(seed)):
        text += character
        write(character)
    parameters = sum(p.numel() for p in model.parameters())
    records.add(run, {"experiment": "linear", "kind": "play", "prompt": PROMPT, "text": text, "parameters": parameters})


def make(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """The record of one run. Runs take a minute at most, so `checkpoint` is not used."""
    del checkpoint, progress
    if run.kind == "speed":
        return speed(run.count, rounds=5 if run.count == 1 else 3)
    model, generator = shipped("digits"), torch.Generator().manual_seed(run.seed)
    if run.kind == "painted":
        return paint(model, run.count, generator)
    _, held_out = digits.load()
    first = torch.tensor(COMPLETED) * digits.HELD_OUT
    return complete(model, held_out[first], run.count, generator)
