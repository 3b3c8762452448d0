"""How fast each technique is on this machine against what stands in torch, and how much of what the machine can do.

One thread, one process, both sides of a ratio taking turns, medians of processor time. Whole models and training runs
are compared by `flopwise reproduce`; this is about the operations.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flopwise.clustered_attention import clustered_attention
from flopwise.core.timing import take_turns
from flopwise.experiments.attention_cost import training_step
from flopwise.experiments.fashion_mnist import Augmented, load
from flopwise.experiments.importance import loss_per_example, small_cnn
from flopwise.experiments.linear_baseline import SoftmaxCausalLM
from flopwise.experiments.linear_speed import measure
from flopwise.experiments.operators import (
    Attention,
    flops,
    forward,
    forward_and_backward,
    noise,
    relative_error,
    structured,
)
from flopwise.experiments.runner import provenance
from flopwise.importance_sampling import ImportanceSampler
from flopwise.linear_attention import linear_attention
from flopwise.models import LinearCausalLM

SQUARE = 1024  # rows of the matrices whose product is the limit
READ = 2**26  # numbers that are read for the memory's rate, 256 MB: more than any cache
DECODER: dict[str, Any] = {"vocab_size": 256, "dim": 256, "depth": 8, "heads": 8, "ff": 1024}
PATCHES_SIDE = 1504
BATCH, RATIO = 64, 6  # of importance sampling

Backend = Literal["numba", "torch"]
COLUMNS = ("technique", "what", "kernels", "ms", "in torch, ms", "against", "times as fast", "of the limit", "error")


@dataclass(frozen=True)
class Limits:
    """What this machine's one thread can do.

    Args:
        matmul: FLOPs a second of a large matrix product.
        memory: bytes a second when a tensor larger than any cache is read.
    """

    matmul: float
    memory: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        work: what was done.
        backend: "numba" or "torch"; what our side ran on.
        ours, theirs: milliseconds.
        baseline: what torch ran.
        rate: FLOPs a second that our side reached, or bytes where the memory is the limit.
        limit: which one `rate` is measured by.
        error: our result's, relative; None where the two sides do different things.
    """

    technique: str
    work: str
    backend: str
    ours: float
    theirs: float
    baseline: str
    rate: float
    limit: Literal["matmul", "memory"]
    error: float | None = None

    def share(self, limits: Limits) -> float:
        """Of the limit; above 1 where weights stay in a cache, which is faster than memory."""
        return self.rate / getattr(limits, self.limit)

    def cells(self, limits: Limits) -> list[str]:
        """The line of the table, under `COLUMNS`."""
        return [
            self.technique,
            self.work,
            self.backend,
            f"{self.ours:.3g}",
            f"{self.theirs:.3g}",
            self.baseline,
            f"{self.theirs / self.ours:.3g}",
            f"{self.share(limits):.0%} of {self.limit}",
            "" if self.error is None else f"{self.error:.0e}",
        ]


def backends() -> tuple[Backend, ...]:
    """What the kernels can run on here."""
    return ("numba", "torch") if find_spec("numba") else ("torch",)


def limits() -> Limits:
    square = torch.randn(SQUARE, SQUARE, generator=torch.Generator().manual_seed(0))
    product, numbers = torch.empty_like(square), torch.ones(READ)
    seconds = take_turns({"matmul": partial(torch.mm, square, square, out=product), "memory": numbers.sum}, rounds=9)
    return Limits(2 * SQUARE**3 / seconds["matmul"], 4 * READ / seconds["memory"])


def parts() -> dict[str, Callable[[], Iterator[Row]]]:
    """The parts of the table, in their order; each yields its rows as they are measured."""
    return {
        "importance sampling": importance_rows,
        "attention sampling": attention_rows,
        "linear attention": linear_rows,
        "decoding": decoding_rows,
        "clustered attention": clustered_rows,
    }


def importance_rows() -> Iterator[Row]:
    """What scoring costs over the forward pass it consists of, and what the loop costs while the sampler is off."""
    model = small_cnn(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    presamples = list(islice(Augmented(load()[0], size=BATCH * RATIO, seed=0), 4))

    def outputs(data: Any) -> Tensor:
        return model(data[0])

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> None:
        for x, y in presamples:
            for batch in zip(x.split(BATCH), y.split(BATCH), strict=True):
                step(loss_per_example(outputs(batch), batch).mean())

    never = ImportanceSampler(outputs, loss_per_example, batch_size=BATCH, gate="never")
    always = ImportanceSampler(outputs, loss_per_example, batch_size=BATCH, gate="always")

    def off() -> None:
        for batch in never.batches(presamples):
            step(never.loss(outputs(batch.data), batch))

    def score() -> None:
        for presample in presamples:
            always.select(presample)

    @torch.no_grad()
    def look() -> None:
        for presample in presamples:
            outputs(presample)

    compared = {
        f"score {BATCH * RATIO} images and draw {BATCH}": (score, look, "their forward pass"),
        f"{RATIO} training steps, sampler off": (off, plain, "a plain loop"),
    }
    for work, (ours, theirs, baseline) in compared.items():
        seconds = take_turns({"ours": ours, "theirs": theirs}, rounds=9)
        mine, plainly = (1e3 * seconds[side] / len(presamples) for side in ("ours", "theirs"))
        rate = flops(theirs) / seconds["ours"]
        yield Row("importance sampling", work, "torch", mine, plainly, baseline, rate, "matmul")


def attention_rows() -> Iterator[Row]:
    """A training step on a large image: ten patches against every pixel, with the same layers."""
    (ours, images), (theirs, _) = (training_step(method, PATCHES_SIDE) for method in ("murthy", "cnn_1"))
    seconds = take_turns({"ours": ours, "theirs": theirs}, rounds=3)
    work = f"training step, an image of {PATCHES_SIDE} x {PATCHES_SIDE}"
    mine, rate = 1e3 * seconds["ours"] / images, flops(ours) / seconds["ours"]
    yield Row(
        "attention sampling", work, "torch", mine, 1e3 * seconds["theirs"], "all pixels, same layers", rate, "matmul"
    )


def linear_rows() -> Iterator[Row]:
    """Causal attention of 8 heads of width 64."""
    ways: dict[str, Attention] = {b: partial(linear_attention, causal=True, backend=b) for b in backends()}
    sdpa = partial(scaled_dot_product_attention, is_causal=True)
    for length, rounds, passes in ((512, 21, PASSES), (4096, 3, PASSES), (8192, 3, PASSES[:1])):
        for direction, run in passes:
            given, exactly = noise(length), noise(length, torch.float64)
            exact = run(partial(linear_attention, causal=True, backend="torch"), *exactly)[0]
            yield from _against_sdpa(
                "linear attention", f"causal, {length} positions, {direction}", ways, sdpa, run, given, exact, rounds
            )


def clustered_rows() -> Iterator[Row]:
    """Full attention of 8 heads of width 64, 64 clusters, top-32; the error is against softmax."""
    ways: dict[str, Attention] = {b: partial(clustered_attention, clusters=64, topk=32, backend=b) for b in backends()}
    for length, rounds, passes in ((1024, 11, PASSES[:1]), (4096, 3, PASSES), (8192, 3, PASSES[:1])):
        for direction, run in passes:
            tensors = tuple(x.requires_grad_() for x in structured(length))
            given = [*tensors, torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(1))]
            exact = forward(scaled_dot_product_attention, *given)[0]
            work = f"{length} positions, {direction}"
            sdpa = scaled_dot_product_attention
            yield from _against_sdpa("clustered attention", work, ways, sdpa, run, given, exact, rounds)


PASSES = (("forward", forward), ("forward and backward", forward_and_backward))


def _against_sdpa(
    technique: str,
    work: str,
    ways: dict[str, Attention],
    sdpa: Attention,
    run: Callable[..., tuple[Tensor, ...]],
    given: list[Tensor],
    exact: Tensor,
    rounds: int,
) -> Iterator[Row]:
    timed = {name: partial(run, attention, *given) for name, attention in (ways | {"sdpa": sdpa}).items()}
    seconds = take_turns(timed, rounds)
    for backend in ways:
        error = relative_error(timed[backend]()[0], exact)
        rate = flops(timed[backend]) / seconds[backend]
        ours, theirs = 1e3 * seconds[backend], 1e3 * seconds["sdpa"]
        yield Row(technique, work, backend, ours, theirs, "SDPA", rate, "matmul", error)


def decoding_rows() -> Iterator[Row]:
    """A token of a model of 8 layers, 256 wide: the mean over a generation of 784."""
    linear, softmax = LinearCausalLM(**DECODER), SoftmaxCausalLM(**DECODER)
    weights = sum(block.numel() for name, block in linear.named_parameters() if block.ndim == 2 and "blocks" in name)
    for batch, rounds in ((1, 5), (32, 3)):
        found = measure(linear, softmax, batch=batch, lengths=(784,), rounds=rounds, burst=4 if batch == 1 else 1)
        (row,) = found["lengths"]
        step = found["step_ms"]["linear"]
        rate = 1e3 * (4 * weights if batch == 1 else 2 * weights * batch) / step
        limit: Literal["matmul", "memory"] = "memory" if batch == 1 else "matmul"
        for baseline, key in (("softmax, key-value cache", "cache"), ("softmax, no cache", "no cache")):
            theirs = 1e3 * batch / row["tokens_per_second"][key]
            work = f"a token of 784, {'one sequence' if batch == 1 else f'{batch} sequences'}"
            yield Row("linear attention", work, found["backend"], step, theirs, baseline, rate, limit)


def write(path: Path, rows: Sequence[Row], limits: Limits) -> None:
    """Append one JSON line with everything that was measured, where, and with what."""
    found = [asdict(row) | {"speedup": row.theirs / row.ours, "share": row.share(limits)} for row in rows]
    record = {"experiment": "bench", "threads": 1, "limits": asdict(limits), "rows": found, **provenance()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
