"""The interface of a baseline, and what they share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flopwise.core import Ledger
from flopwise.core.batch import Examples
from flopwise.core.ledger import active_ledger
from flopwise.importance_sampling import WeightedBatch
from flopwise.importance_sampling.modes import find_models, scoring
from flopwise.importance_sampling.scores import Losses, split_losses


class Baseline:
    """Chooses what to train on from every presample. A subclass says which examples and weights, in `choose`.

    Args:
        forward: data -> outputs, dimension 0 the example.
        loss: (outputs, data) -> losses of shape (b,) or (b, T), unreduced; or those and their mask.
        batch_size: examples per training step.
        seed: of the choices.
        model: what `forward` runs, when it cannot be seen from it.
    """

    def __init__(
        self,
        forward: Callable[[Any], Tensor],
        loss: Callable[[Tensor, Any], Losses],
        *,
        batch_size: int = 64,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        self.forward, self.loss_per_example, self.batch_size = forward, loss, batch_size
        self.models = find_models(forward) if model is None else [model]
        self.generator = torch.Generator().manual_seed(seed)
        self._ledger = Ledger()

    def choose(self, presample: Examples) -> Iterator[tuple[Int[Tensor, " b"], Float[Tensor, " b"]]]:
        """(indices, weights) of one training step after the other."""
        raise NotImplementedError

    def observe(self, outputs: Tensor, losses: Float[Tensor, " b"], batch: WeightedBatch) -> None:
        """Called with the outputs and losses of every training step, for methods that remember them."""

    def batches(self, loader: Iterable[Any]) -> Iterator[WeightedBatch]:
        """One pass over `loader`, which yields presamples."""
        ledger = active_ledger() or self._ledger
        for data in ledger.load(loader):
            presample = Examples(data)
            for indices, weights in self.choose(presample):
                chosen = presample[indices]
                batch = WeightedBatch(chosen.data, weights.float().to(chosen.device), indices, drawn=True)
                with ledger.phase("training", chosen):
                    yield batch

    def loss(self, outputs: Tensor, batch: WeightedBatch) -> Float[Tensor, ""]:
        """mean_i(weights_i * loss_i)."""
        losses = self._of_examples(outputs, batch.data)
        self.observe(outputs.detach(), losses.detach(), batch)
        return (batch.weights * losses).mean()

    def score(self, presample: Examples) -> Float[Tensor, " n"]:
        """The losses of a presample, by a forward pass that is booked as scoring."""
        ledger = active_ledger() or self._ledger
        with scoring(self.models), torch.no_grad(), ledger.phase("scoring", presample):
            return self._of_examples(self.forward(presample.data), presample.data).cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])

    def _of_examples(self, outputs: Tensor, data: Any) -> Float[Tensor, " b"]:
        """One loss an example; with a mask, its sum over the batch's mean number of unmasked positions."""
        losses, mask = split_losses(self.loss_per_example(outputs, data), len(outputs))
        if mask is not None:
            return losses.flatten(1).sum(1) / (mask.sum() / len(mask)) if losses.ndim > 1 else losses
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


class Remembering(Baseline):
    """A baseline that remembers a number for each example of the data set, from when it was last trained on.

    Args:
        ids: data -> (b,), which example of the data set each is, from 0; the loader's data hold them.
        examples: size of the data set.
        other arguments: `Baseline`'s.
    """

    def __init__(self, *args: Any, ids: Callable[[Any], Tensor], examples: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ids = ids
        self.memory = torch.full((examples,), float("nan"))  # of those never seen

    def observe(self, outputs: Tensor, losses: Float[Tensor, " b"], batch: WeightedBatch) -> None:
        self.memory[self.ids(batch.data).cpu()] = losses.float().cpu()

    def remembered(self, presample: Examples) -> Float[Tensor, " n"]:
        return self.memory[self.ids(presample.data).cpu()]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.memory = state["memory"]
