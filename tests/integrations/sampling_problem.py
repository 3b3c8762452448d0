"""A small data set whose examples matter very differently, for the tests of importance sampling in trainers."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def data(n: int = 192, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator) * torch.rand(n, 1, generator=generator).exp() ** 3
    return TensorDataset(x, (x[:, :3] * x[:, 3:]).argmax(1))


def network(dropout: float = 0.1) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return model


def skewed_loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """Weighted so that few examples carry the gradient: the gate switches on early."""
    return batch[0].norm(dim=1) ** 5 * F.cross_entropy(outputs.float(), batch[1], reduction="none") / 1000
