"""How much a training run may spend."""

from dataclasses import dataclass

from flopwise.core.ledger import Ledger


@dataclass(frozen=True)
class Budget:
    """A limit on exactly one of FLOPs, seconds or examples.

    The training loop of this project is `while not budget.spent(ledger)`. Everything that changes during training
    (learning rate, progress bar) follows `budget.share(ledger)`: the number of steps a budget buys is not known
    beforehand.

    Args:
        flops: multiplies plus adds, forward and backward, as `torch.utils.flop_counter` counts them.
        seconds: wall-clock time inside `with ledger`, pauses left out.
        examples: examples that went through a forward and backward pass; an example trained on twice counts twice.

    Raises:
        ValueError: not exactly one limit was given, or it is not above zero.
    """

    flops: float | None = None
    seconds: float | None = None
    examples: float | None = None

    def __post_init__(self) -> None:
        limits = {name: value for name, value in vars(self).items() if value is not None}
        if len(limits) != 1:
            raise ValueError(
                "a Budget limits exactly one of flops, seconds and examples; "
                f"got {', '.join(f'{name}={value}' for name, value in limits.items()) or 'none'}. "
                "For several limits, keep several budgets and stop at the first that is spent."
            )
        ((name, value),) = limits.items()
        if not value > 0:
            raise ValueError(f"a Budget is above zero; got {name}={value}.")

    def share(self, ledger: Ledger) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        name, limit = next((name, value) for name, value in vars(self).items() if value is not None)
        return min(1.0, getattr(ledger, name) / limit)

    def spent(self, ledger: Ledger) -> bool:
        """Whether nothing is left. The step that crosses the limit is finished: a run overspends by less than one."""
        return self.share(ledger) >= 1.0
