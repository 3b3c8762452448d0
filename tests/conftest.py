"""Shape checks are on in every test but those of torch.compile, which cannot trace them."""

import os

import pytest
import torch
from hypothesis import settings

if not os.environ.get("FLOPWISE_NO_SHAPE_CHECKS"):
    from jaxtyping import install_import_hook

    install_import_hook(
        [
            "flopwise.core",
            "flopwise.importance_sampling",
            "flopwise.attention_sampling",
            "flopwise.linear_attention",
            "flopwise.clustered_attention",
            "flopwise.models",
            "flopwise.integrations",
            "flopwise.experiments",
        ],
        "shape_checks.checker",
    )

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
