"""InfoBatch: leave out a share of the easy examples, and weigh the others of them up."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flopwise.core.batch import Examples
from flopwise.experiments.baselines.base import Remembering


class InfoBatch(Remembering):
    """An example whose remembered loss is below the mean is left out with probability `share`; if it stays, its weight
    is 1 / (1 - share). Over the last eighth of training nothing is left out.

    Unbiased for the sum of gradients over a pass: E[sum of w g over those that stay] = sum of g. The mean over a batch
    is scaled by the number that stays, as in the paper.

    Args:
        share: r of the paper.
        progress: () -> share of training done, from 0 to 1; such as `lambda: budget.share(ledger)`.
        other arguments: `Remembering`'s.

    Source: Qin et al., ICLR 2024.
    """

    until = 0.875

    def __init__(self, *args: Any, share: float = 0.5, progress: Any = lambda: 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0 <= share < 1:
            raise ValueError(f"share of the easy examples that are left out, from 0 to below 1; got {share}.")
        self.share, self.progress = share, progress

    def choose(self, presample: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        losses = self.remembered(presample)
        threshold = self.memory[~self.memory.isnan()].mean()  # of all that were seen; nan, and so none below, at first
        easy = (losses < threshold) & (self.progress() < self.until)
        stays = ~easy | (torch.rand(len(presample), generator=self.generator) >= self.share)
        weights = torch.where(easy, 1 / (1 - self.share), 1.0)
        for indices in stays.nonzero()[:, 0].split(self.batch_size):
            yield indices, weights[indices]
