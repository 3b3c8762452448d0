"""Batches are pytrees whose tensors share their first dimension, the example."""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class endless(Generic[T]):
    """`loader`, pass after pass, without end: for loops that stop when a budget is spent.

    Each pass calls `iter(loader)` anew, so a shuffling loader shuffles again. A loader that can say where it is
    (`state_dict`, `load_state_dict`) still can.
    """

    def __init__(self, loader: Iterable[T]) -> None:
        self.loader = loader
        if hasattr(loader, "state_dict"):
            self.state_dict = loader.state_dict  # type: ignore[attr-defined]
            self.load_state_dict = loader.load_state_dict  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[T]:
        while True:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ValueError("the loader yielded nothing in a whole pass: is it an iterator that was used up?")


def batch_size(data: Any) -> int:
    """The number of examples in a batch: the first dimension, which all its tensors must share.

    Raises:
        TypeError: the batch holds something other than tensors and None, or no tensor at all.
        ValueError: the tensors disagree about the number of examples, or there are none.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(data) if leaf is not None]
    if leaves and all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves):
        size = len(leaves[0])
        if size > 0 and all(len(leaf) == size for leaf in leaves):
            return size
    raise _complaint(data)


def _complaint(data: Any) -> Exception:
    """What is wrong with this batch."""
    sizes: dict[int, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(data)[0]:
        where = f"batch{pytree.keystr(path)}"
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            return TypeError(
                f"a batch is a tensor or a tuple, list or dict of tensors; {where} is a {type(leaf).__name__}. "
                "Turn it into a tensor, or leave it out of the batch (for a Hugging Face BatchEncoding: `dict(batch)`)."
            )
        if leaf.ndim == 0:
            return ValueError(
                f"dimension 0 of every tensor in a batch is the example; {where} has no dimension. "
                "Expand it to one value an example."
            )
        sizes.setdefault(len(leaf), where)
    if not sizes:
        return TypeError(f"a batch holds at least one tensor; got a {type(data).__name__} without any.")
    if len(sizes) > 1:
        found = ", ".join(f"{where}: {size}" for size, where in sizes.items())
        return ValueError(f"the tensors of a batch share dimension 0, the example; got {found}.")
    return ValueError("a batch holds at least one example; got tensors whose dimension 0 is 0.")


def select_examples(data: Any, index: Tensor | slice) -> Any:
    """The examples that `index` (integers on any device, or a slice, which copies nothing) names, as a batch."""

    def of(leaf: Tensor | None) -> Tensor | None:
        if leaf is None:
            return None
        return leaf[index] if isinstance(index, slice) else leaf.index_select(0, index.to(leaf.device))

    return pytree.tree_map(of, data)


def signature(data: Any) -> tuple:
    """What decides the cost of a computation on `data`: structure, shapes, dtypes and devices, never values."""
    leaves, structure = pytree.tree_flatten(data)
    return (
        structure,
        *((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves),
    )
