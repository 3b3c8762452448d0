"""Learning-rate schedules on the share of the budget: how many steps a budget buys depends on the gate.

With torch's own scheduler, stepped after every optimizer step:

    LambdaLR(optimizer, lambda _: cosine(budget.share(ledger)))
"""

import math


def cosine(share: float, *, warmup: float = 0.0) -> float:
    """From 1 to 0 along half a cosine, after a linear rise over the first `warmup` share of the budget."""
    if share < warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def staircase(share: float, *, at: tuple[float, ...] = (0.6, 0.85), factor: float = 0.1) -> float:
    """1, multiplied by `factor` each time a share in `at` is passed."""
    return factor ** sum(share >= step for step in at)
