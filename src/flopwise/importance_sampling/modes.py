"""How a model behaves while it scores and while it takes a weighted step."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def find_models(forward: Callable[[Any], Any]) -> list[nn.Module]:
    """The modules that `forward` runs: itself, the object it is a method of, or those its body names.

    Raises:
        ValueError: none is in sight.
    """
    forward = inspect.unwrap(forward)
    if isinstance(forward, nn.Module):
        return [forward]
    owner = getattr(forward, "__self__", None)
    if isinstance(owner, nn.Module):
        return [owner]
    if inspect.isfunction(forward):
        seen = inspect.getclosurevars(forward)
        found = [value for value in (*seen.nonlocals.values(), *seen.globals.values()) if isinstance(value, nn.Module)]
        if found:
            return found
    raise ValueError(
        "while scoring, dropout is off and batch statistics are handled apart, so the sampler must see the model; "
        f"found no nn.Module in forward={forward!r}. Pass it: ImportanceSampler(forward, loss, model=model)."
    )


@contextmanager
def scoring(models: list[nn.Module], *, statistics: bool = True) -> Iterator[None]:
    """Everything in `eval` mode but batch normalisation, which sees uniform data here and updates its statistics.

    With `statistics=False` those are left alone.
    """
    modules = [module for model in models for module in model.modules() if module.training]
    kept = [module for module in modules if isinstance(module, _BatchNorm)] if statistics else []
    for module in modules:
        module.training = False
    for module in kept:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def statistics_frozen(models: list[nn.Module]) -> Iterator[None]:
    """Batch normalisation uses the batch and leaves its running statistics alone: a drawn batch is not uniform."""
    norms = tracked_norms(models)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def tracked_norms(models: list[nn.Module]) -> list[_BatchNorm]:
    """The batch normalisation that is in training and keeps statistics."""
    return [
        module
        for model in models
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.training
    ]
