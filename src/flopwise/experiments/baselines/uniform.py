"""No selection, and selection by lot."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flopwise.core.batch import Examples
from flopwise.experiments.baselines.base import Baseline


class Uniform(Baseline):
    """Every example of the presample, in plain batches. Unbiased."""

    def choose(self, presample: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.arange(len(presample)).split(self.batch_size):
            yield indices, torch.ones(len(indices))


class RandomSubset(Baseline):
    """`batch_size` examples of each presample, by lot; the others are left out. Unbiased.

    What a method gains over this one it owes to its choice, and not to seeing more different data per step.
    """

    def choose(self, presample: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        indices = torch.randperm(len(presample), generator=self.generator)[: self.batch_size]
        yield indices, torch.ones(len(indices))
