"""Selective Backprop: train on the examples with the largest losses, mostly."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flopwise.core.batch import Examples
from flopwise.experiments.baselines.base import Baseline


class SelectiveBackprop(Baseline):
    """Draws `batch_size` of each presample with p growing with the rank of the loss, p = (rank / B)^k, k = B / b - 1:
    kept one by one with that probability, B / (k + 1) = b would stay. No weights: **biased** to large losses.

    Departs from the paper in ranking within the presample, where it ranks among the latest 1024 losses.

    Source: Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019.
    """

    def choose(self, presample: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        draws = min(self.batch_size, len(presample))
        rank = self.score(presample).argsort().argsort().double() + 1
        p = (rank / len(presample)) ** (len(presample) / draws - 1)
        indices = torch.multinomial(p, draws, replacement=False, generator=self.generator)
        yield indices, torch.ones(draws)
