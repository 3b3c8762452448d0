"""Online batch selection: examples of large remembered loss more often, by rank."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flopwise.core.batch import Examples
from flopwise.experiments.baselines.base import Remembering


class OnlineBatchSelection(Remembering):
    """Draws `batch_size` of each presample with p falling exponentially from the largest remembered loss to the
    smallest, `pressure` times in all: p_i = pressure^(-i / B), i the rank. No weights: **biased** to large losses.

    Departs from the paper in ranking within the presample, where it ranks all data, and in never evaluating all of them
    anew. An example never trained on ranks first. Pressure falls from its value to 1 over training, exponentially.

    Args:
        pressure: at the start; the paper's is 100.
        progress: () -> share of training done, from 0 to 1.
        other arguments: `Remembering`'s.

    Source: Loshchilov & Hutter, "Online Batch Selection for Faster Training of Neural Networks", 2015.
    """

    def __init__(self, *args: Any, pressure: float = 100.0, progress: Any = lambda: 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if pressure < 1:
            raise ValueError(f"pressure is the largest p over the smallest, at least 1; got {pressure}.")
        self.pressure, self.progress = pressure, progress

    def choose(self, presample: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        losses = self.remembered(presample).nan_to_num(nan=float("inf"))
        rank = losses.argsort(descending=True).argsort().double()
        pressure = self.pressure ** (1 - self.progress())
        draws = min(self.batch_size, len(presample))
        p = pressure ** (-rank / len(presample))
        indices = torch.multinomial(p, draws, replacement=False, generator=self.generator)
        yield indices, torch.ones(draws)
