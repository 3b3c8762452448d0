"""Attention operators on their own: the inputs on which they are timed, forward, and forward with backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HEADS, WIDTH = 8, 64

Attention = Callable[..., Tensor]


def noise(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and the gradient of the output, all (1, 8, length, 64): enough where values do not matter."""
    generator = torch.Generator().manual_seed(length)
    tensors = [torch.randn(1, HEADS, length, WIDTH, generator=generator).to(dtype) for _ in range(4)]
    return [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]


def structured(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: 60 planted centres in random order, plus a smooth path of rank 8, plus a little noise.

    Queries and keys share the centres, so that attention has somewhere to go: about half of it to the nearest centre.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency, time_ = torch.arange(1, 9), torch.linspace(0, 1, length)
    centre = torch.randn(HEADS, 60, WIDTH, generator=generator)

    def one() -> Tensor:
        phase = torch.rand(HEADS, 8, 1, generator=generator)
        path = (2 * torch.pi * (frequency[:, None] * time_ + phase)).sin()
        smooth = path.mT @ torch.randn(HEADS, 8, WIDTH, generator=generator) / 6
        which = torch.randint(60, (HEADS, length, 1), generator=generator).expand(-1, -1, WIDTH)
        noise = torch.randn(HEADS, length, WIDTH, generator=generator)
        return (centre.gather(1, which) + smooth + noise / 5)[None]

    return one() / 2, one(), one()


def forward(attention: Attention, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """The output, without gradients; a fourth tensor is let pass."""
    with torch.no_grad():
        return (attention(query, key, value),)


def forward_and_backward(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """The output and the gradients of query, key and value."""
    out = attention(query, key, value)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), grad)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def flops(work: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and our operators in a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
