"""A small problem with examples that matter very differently, for the sampler's tests."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, torch.Tensor]


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return module


def network(seed: int = 0) -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), seed)  # type: ignore[return-value]


def examples(n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator) * torch.rand(n, 1, generator=generator).exp() ** 3
    return x, (x[:, :3] * x[:, 3:]).argmax(1)


def forward_of(model: nn.Module):
    def forward(data: Any) -> torch.Tensor:
        return model(data[0])

    return forward


def loss(outputs: torch.Tensor, data: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, data[1], reduction="none")


def gradient(value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


class Presamples:
    """A seeded loader: every pass shuffles, `passes` tells how often."""

    def __init__(self, data: Batch, size: int, seed: int = 0) -> None:
        self.data, self.size = data, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.randperm(len(self.data[0]), generator=self.generator).split(self.size):
            yield self.data[0][index], self.data[1][index]


class StatefulPresamples(Presamples):
    """The same, and it can say where it is and go back there, as a stateful data loader does."""

    def __init__(self, data: Batch, size: int, seed: int = 0) -> None:
        super().__init__(data, size, seed)
        self.place, self.order, self.loads = 0, None, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.order is None:
                self.order = torch.randperm(len(self.data[0]), generator=self.generator)
            pieces = self.order.split(self.size)
            if self.place == len(pieces):
                self.place, self.order = 0, None
                return
            index = pieces[self.place]
            self.place += 1
            self.loads += 1
            yield self.data[0][index], self.data[1][index]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "order": self.order, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.order = state["place"], state["order"]
        self.generator.set_state(state["generator"])
