import needs
import pytest
import torch
from torch import Tensor


@pytest.fixture(params=["torch", pytest.param("numba", marks=needs.numba_installed)])
def backend(request) -> str:
    return request.param


@pytest.fixture
def inputs(generator):
    """Query, key and value: (b, h, n, e), (b, g, s, e) and (b, g, s, m)."""

    def make(batch, heads, groups, length, source_length, width, value_width, dtype=torch.float32) -> list[Tensor]:
        shapes = (heads, length, width), (groups, source_length, width), (groups, source_length, value_width)
        return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]

    return make


@pytest.fixture
def poisoned():
    """Memory that nobody wrote to holds nan."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
