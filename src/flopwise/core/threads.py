"""Compiled loops over rows, shared among threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def over_rows(loop: Callable[..., None], rows: int, arguments: Sequence[Any]) -> None:
    """Call loop(start, stop, *arguments) over all rows, shared among as many threads as torch uses.

    In plain threads, since compiled loops release the interpreter's lock. numba's own pool does not follow
    torch.set_num_threads, and its default kind aborts the process when two threads of a program use it at once.
    """
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        loop(0, rows, *arguments)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: loop(bounds[i], bounds[i + 1], *arguments), range(threads)))
