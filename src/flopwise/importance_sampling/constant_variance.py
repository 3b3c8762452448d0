"""Experimental: keep the variance of a uniform batch and save FLOPs instead, by training on fewer examples."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from flopwise.importance_sampling.sampler import ImportanceSampler, WeightedBatch
from flopwise.importance_sampling.variance import moving_average


class ConstantVarianceSampler(ImportanceSampler):
    """**Experimental.** Draws batch_size * variance examples, variance the drawn batch's relative to a uniform one.

    The variance of a step stays a uniform batch's, and the steps get cheaper; the learning rate stays as it is
    (`rate_scale` is 1). Strong with Adam in our trials; at a high rate it collapsed. Two guards:

    - never fewer than `floor` of the batch;
    - while the recent training loss is above `1 + tolerance` times its long-run average, whole batches are drawn.

    Arguments besides these two: `ImportanceSampler`'s, but for `shrink`: it always shrinks.
    """

    def __init__(self, *args: Any, floor: float = 0.25, tolerance: float = 0.2, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0 < floor <= 1:
            raise ValueError(f"floor is a share of the batch, above 0 and at most 1; got {floor}.")
        if tolerance <= 0:
            raise ValueError(f"tolerance is how much the loss may rise, above 0; got {tolerance}.")
        if self.shrink != 0:
            raise ValueError(f"this sampler decides itself how few to draw: leave shrink out; got {self.shrink}.")
        self.floor, self.tolerance = floor, tolerance
        self._recent = self._long_run = 0.0

    @property
    def guarded(self) -> bool:
        """Whether the loss has risen and whole batches are drawn."""
        return self._recent > (1 + self.tolerance) * self._long_run

    def draw_size(self) -> int:
        variance = 1.0 if self.guarded else self._gate.variance
        return min(self.batch_size, round(self.batch_size * max(self.floor, variance)) or 1)

    def scale_of(self, rule: Any = "sqrt", cap: float = 2.0) -> float:
        return 1.0

    def loss(self, outputs: Tensor, batch: WeightedBatch) -> Float[Tensor, ""]:
        loss = super().loss(outputs, batch)
        value = float(loss.detach())
        first = self._long_run == 0
        self._recent = value if first else moving_average(self._recent, value, 0.9)
        self._long_run = value if first else moving_average(self._long_run, value, 0.99)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"guard": [self._recent, self._long_run]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._recent, self._long_run = state["guard"]
