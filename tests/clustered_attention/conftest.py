import needs
import pytest
import torch
from torch import Tensor

from flopwise.clustered_attention.kernels import numba as numba_kernels
from flopwise.clustered_attention.kernels import torch as torch_kernels


@pytest.fixture(params=["torch", pytest.param("numba", marks=needs.numba_installed)])
def backend(request) -> str:
    return request.param


@pytest.fixture
def kernels(backend):
    return {"torch": torch_kernels, "numba": numba_kernels}[backend]


@pytest.fixture
def inputs(generator):
    """Query, key and value; queries and keys lie around a few centres, as those of a trained model do."""

    def make(shape, key_shape=None, value_width=None, dtype=torch.float32, centres=6) -> tuple[Tensor, Tensor, Tensor]:
        *_, width = shape
        key_shape = key_shape or shape
        centre = 2 * torch.randn(centres, width, generator=generator)

        def around(shape):
            which = torch.randint(centres, shape[:-1], generator=generator)
            return centre[which] + 0.5 * torch.randn(*shape, generator=generator)

        value = torch.randn(*key_shape[:-1], value_width or width, generator=generator)
        return around(shape).to(dtype), around(key_shape).to(dtype), value.to(dtype)

    return make
