"""The choice of the next token from its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedily unless `temperature` is above 0.

    p = softmax(logits / temperature), then only the `top_k` most probable tokens, then only the smallest set of the
    most probable whose mass reaches `top_p` (the nucleus), each time rescaled to sum to 1.

    Args:
        temperature: 0 takes the most probable token, the first among equals.
        top_k: keep this many tokens; None keeps all.
        top_p: keep this much probability mass, above 0 and at most 1.
        stop_tokens: a sequence ends with the first of these.

    Raises:
        ValueError: a number is out of its range.

    Source: top-k, Fan, Lewis & Dauphin 2018; nucleus, Holtzman et al. 2020.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                raise ValueError(f"{name} is {rule}; got {getattr(self, name)}.")

    def choose(self, logits: Float[Tensor, "b vocab"], generator: torch.Generator | None) -> Int[Tensor, " b"]:
        """One token a row.

        Raises:
            ValueError: tokens are drawn, and there is no generator to draw them with.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        if generator is None:
            raise ValueError(
                f"temperature={self.temperature} draws tokens at random, which needs generator=torch.Generator(); "
                "without one, leave temperature at 0 for the most probable token."
            )
        p = (logits.float() / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p == 1:
            return p.multinomial(1, generator=generator)[:, 0]
        p, token = p.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            p = p[:, : self.top_k]
        if self.top_p < 1:
            before = p.cumsum(-1) - p
            p = p.masked_fill(before >= self.top_p * p.sum(-1, keepdim=True), 0)
        return token.gather(1, p.multinomial(1, generator=generator))[:, 0]


GREEDY = Sampling()
