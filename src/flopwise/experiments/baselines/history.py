"""Scores remembered from the last time an example was trained on."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from flopwise.core.batch import Examples
from flopwise.experiments.baselines.base import Remembering
from flopwise.importance_sampling import WeightedBatch, upper_bound_score
from flopwise.importance_sampling.draw import draw_without_replacement, probabilities


class History(Remembering):
    """Draws `batch_size` of each presample by remembered upper-bound scores, which cost nothing.

    Unbiased: the weights are 1 / pi for the pi that drew, however old the scores; age costs variance only. An example
    never trained on takes the mean of those remembered in its presample, and smoothing 0.2 sees that all come round.
    """

    smoothing = 0.2

    def observe(self, outputs: Tensor, losses: Float[Tensor, " b"], batch: WeightedBatch) -> None:
        super().observe(outputs, upper_bound_score(outputs, batch.data, self.loss_per_example), batch)

    def choose(self, presample: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        scores = self.remembered(presample)
        known = ~scores.isnan()
        scores = torch.where(known, scores, scores[known].mean() if known.any() else torch.tensor(1.0))
        draws = min(self.batch_size, len(presample))
        yield draw_without_replacement(probabilities(scores, self.smoothing), draws, self.generator)
