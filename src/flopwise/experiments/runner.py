"""Runs an experiment's runs side by side, one core each, and keeps their records; an interrupted one can go on."""

import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flopwise import __version__

Record = dict[str, Any]


T = TypeVar("T")
Run = Any  # a frozen dataclass with a `name`; equal fields, equal run
Train = Callable[[Any, Path, Callable[[float], None]], Record]


class Records:
    """The records of one folder, `records.jsonl`, one JSON object a line, appended as runs end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        whole, _, torn = text.rpartition("\n")
        if torn or not self.path.exists():  # a run was killed while it wrote: that line is lost, the others are not
            self.path.write_text(whole + "\n" if whole else "")
        self.all: list[Record] = [json.loads(line) for line in whole.splitlines() if line]

    def find(self, run: Run) -> Record | None:
        """The record of this run, if it has ended before."""
        wanted = asdict(run)
        return next((record for record in self.all if record["run"] == wanted), None)

    def take_tuned(self, runs: Iterable[Run]) -> None:
        """A tuning run is the run that it was for: it is not trained again."""
        for run in runs:
            tuned = self.find(replace(run, kind="tune"))
            if tuned is not None and self.find(run) is None:
                self.add(run, {**tuned, "kind": run.kind})

    def add(self, run: Run, record: Record) -> Record:
        record = {**record, "run": asdict(run), **provenance()}
        line = json.dumps(_without_nan(record))
        with self.path.open("a") as file:
            file.write(line + "\n")
        self.all.append(json.loads(line))
        return self.all[-1]


def run_all(runs: Iterable[Run], train: Train, folder: Path, *, title: str) -> list[Record]:
    """The records of `runs`, in order: those that `folder` has already, and the others trained, one process a core.

    Ctrl-C ends the processes and is raised again; finished runs are on record, unfinished ones have a checkpoint.
    """
    runs, records = list(runs), Records(folder)
    waiting = [run for run in runs if records.find(run) is None]
    if waiting:
        workers = min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(waiting)
        )
        context = multiprocessing.get_context("spawn")
        shares: Any = context.Array("d", len(waiting))
        pool = context.Pool(workers, _start_worker, (shares, train, folder))
        try:
            with _progress() as progress:
                task = progress.add_task(title, total=1.0, runs=f"0 of {len(waiting)} runs")
                ended = pool.imap_unordered(_work, enumerate(waiting))
                for count in range(1, len(waiting) + 1):
                    index, record = _next(ended, lambda: progress.update(task, completed=sum(shares) / len(waiting)))
                    records.add(waiting[index], record)
                    (folder / "checkpoints" / f"{waiting[index].name}.pt").unlink(missing_ok=True)
                    progress.update(task, runs=f"{count} of {len(waiting)} runs")
            pool.close()  # workers that end by themselves tidy up; those that are terminated leave semaphores
            pool.join()
        finally:
            pool.terminate()
            pool.join()
    return [record for run in runs if (record := records.find(run)) is not None]


def tune_rate(
    rates: Iterable[float], run_with: Callable[[float], Run], train: Train, folder: Path, *, title: str
) -> Run:
    """The run with the lowest training loss. The grid of rates grows until the best is not on its edge."""

    def losses(rates: list[float]) -> list[float]:
        return [training_loss(r) for r in run_all([run_with(rate) for rate in rates], train, folder, title=title)]

    return run_with(best_inside(rates, losses, lambda losses: losses.index(min(losses))))


def best_inside(values: Iterable[float], results: Callable[[list[float]], T], best: Callable[[T], int]) -> float:
    """The value whose result is the best. The grid grows, by halves and doubles, until it is not on its edge."""
    grid = sorted(values)
    while True:
        chosen = best(results(grid))
        if 0 < chosen < len(grid) - 1:
            return grid[chosen]
        grid = [grid[0] / 2, *grid] if chosen == 0 else [*grid, 2 * grid[-1]]


def training_loss(record: Record) -> float:
    """Of a run; one that diverged has null for it."""
    return math.inf if record["train_loss"] is None else record["train_loss"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def provenance() -> Record:
    """Where and with what a record was made."""
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "flopwise": __version__,
        },
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} % of the budget, {task.fields[runs]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def _next(ended: Any, meanwhile: Callable[[], None]) -> Any:
    while True:
        meanwhile()
        try:
            return ended.next(timeout=0.25)
        except multiprocessing.TimeoutError:
            continue


_worker: tuple[Any, Train, Path]


def _start_worker(shares: Any, train: Train, folder: Path) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = shares, train, folder


def _end_with_the_parent() -> None:
    """A parent that was killed cannot end its workers; they have checkpoints, and nobody would read their records."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(numbered: tuple[int, Run]) -> tuple[int, Record]:
    index, run = numbered
    shares, train, folder = _worker

    def progress(share: float) -> None:
        shares[index] = share

    record = train(run, folder / "checkpoints" / f"{run.name}.pt", progress)
    progress(1.0)
    return index, record


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; a loss that diverged is null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not (float("-inf") < value < float("inf")) else value


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree this runs from, if it is one."""
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None if asked.returncode == 0 else None
