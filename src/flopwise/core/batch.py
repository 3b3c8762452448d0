"""Batches are pytrees whose tensors share their first dimension, the example."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Generic, TypeVar

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
        empty = 0
        while empty < 2:  # what is left of a resumed pass may be nothing
            empty += 1
            for batch in self.loader:
                empty = 0
                yield batch
        raise ValueError("the loader yielded nothing in a whole pass: is it an iterator that was used up?")


class Examples:
    """A batch, taken apart once: its tensors, which share dimension 0, the example, and the structure around them.

    Raises:
        TypeError: the batch holds something other than tensors and None, or no tensor at all.
        ValueError: the tensors disagree about the number of examples, or there are none.
    """

    def __init__(self, data: Any) -> None:
        leaves, self.structure = pytree.tree_flatten(data)
        tensors = [leaf for leaf in leaves if leaf is not None]
        sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else 0 for leaf in tensors}
        if len(sizes) != 1 or 0 in sizes:
            raise _complaint(data)
        self.leaves: list[Tensor | None] = leaves
        self.device = tensors[0].device
        (self.size,) = sizes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Tensor | slice) -> "Examples":
        """The examples that `index` names: a slice, which copies nothing, or integers on any device."""
        part = object.__new__(Examples)
        part.structure, part.device = self.structure, self.device
        if isinstance(index, slice):
            part.leaves = [None if leaf is None else leaf[index] for leaf in self.leaves]
            part.size = len(range(self.size)[index])
        else:
            index = index.to(self.device)
            part.leaves = [
                None if leaf is None else leaf.index_select(0, index.to(leaf.device)) for leaf in self.leaves
            ]
            part.size = len(index)
        return part

    @property
    def data(self) -> Any:
        """The batch, put together again."""
        return pytree.tree_unflatten(self.leaves, self.structure)

    @cached_property
    def signature(self) -> tuple:
        """What decides the cost of a computation on the batch: structure, shapes, dtypes, devices, never values."""
        kinds = [None if leaf is None else (leaf.shape, leaf.dtype, leaf.device) for leaf in self.leaves]
        return self.structure, *kinds


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
