"""Claim 3: linear attention learns as softmax attention does, for fewer FLOPs, and generates at a constant cost.

    python -m flopwise.experiments.linear digits         trains and writes the digit model that the package ships
    python -m flopwise.experiments.linear shakespeare    likewise the model that writes plays
    python -m flopwise.experiments.linear compare        digits: softmax and both recipes, each at its own best rate

One thread; about 17, 4 and 60 minutes of a core. `compare` keeps its records in runs/linear.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from flopwise.core import Budget, Ledger
from flopwise.experiments import digits, shakespeare
from flopwise.experiments.linear_baseline import SoftmaxCausalLM
from flopwise.experiments.linear_speed import measure
from flopwise.experiments.runner import Records, run_all, save_checkpoint
from flopwise.models import LinearCausalLM, Sampling
from flopwise.models.decoding import Weights

Task = Literal["digits", "shakespeare"]
Method = Literal["linear", "modern", "softmax"]
METHODS: tuple[Method, ...] = ("softmax", "linear", "modern")

# Every method of a task has these sizes; "modern" has dim^2 more weights a layer, for its gate.
SIZES: dict[Task, dict[str, Any]] = {
    "digits": {
        "vocab_size": digits.VOCABULARY,
        "dim": 96,
        "depth": 4,
        "heads": 6,
        "ff": 384,
        "max_length": digits.PIXELS + 1,  # the class and all pixels: a decoder takes up the last one, too
    },
    "shakespeare": {"vocab_size": shakespeare.VOCABULARY, "dim": 128, "depth": 4, "heads": 4, "ff": 512},
}
BATCH = {"digits": 8, "shakespeare": 4}
EXCERPT = 256  # bytes of a play that are trained on together
CURVE_POINTS = 10
CURVE_EXAMPLES = 100
WARM_UP = 0.03  # share of the budget in which the rate rises
CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Run:
    """One training run; two runs with equal fields are the same run."""

    task: Task
    method: Method
    rate: float
    flops: float
    seed: int = 0
    kind: str = "run"

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-rate{self.rate:g}-flops{self.flops:.4g}-seed{self.seed}"


# What the shipped models were trained with.
SHIPPED: dict[Task, Run] = {
    "digits": Run("digits", "modern", 0.032, 4.126e13, kind="shipped"),
    "shakespeare": Run("shakespeare", "modern", 0.004, 7e12, kind="shipped"),
}
COMPARED = 2.063e13  # FLOPs
TUNING = 0.1  # share of the budget for each rate that is tried
RATES = (0.002, 0.004, 0.008)


def compare(folder: Path, flops: float = COMPARED, methods: tuple[Method, ...] = METHODS) -> None:
    """Digits: every method with the same FLOPs, at its own best rate; records in `folder`/records.jsonl.

    A rate is tried with `TUNING` of the budget, and while the best is on the edge of the grid, the grid grows there.
    """
    for method in methods:
        rates = sorted(RATES)
        while True:
            grid = [Run("digits", method, rate, TUNING * flops, kind="tune") for rate in rates]
            records = run_all(grid, train, folder, title=f"tuning {method}")
            bits = [math.inf if record["bits_per_dim"] is None else record["bits_per_dim"] for record in records]
            best = bits.index(min(bits))
            if 0 < best < len(rates) - 1:
                break
            rates = [rates[0] / 2, *rates] if best == 0 else [*rates, rates[-1] * 2]
        run_all([replace(grid[best], flops=flops, kind="run")], train, folder, title=f"training {method}")


def build(task: Task, method: Method, seed: int = 0) -> LinearCausalLM:
    """A fresh model."""
    size = SIZES[task]
    if method == "softmax":
        return SoftmaxCausalLM(**size, seed=seed)
    return LinearCausalLM(**size, recipe="modern" if method == "modern" else "thesis", seed=seed)


def shipped(task: Task) -> LinearCausalLM:
    """The trained model that the package carries."""
    return LinearCausalLM.load(_path(task))


def _path(task: Task) -> Path:
    return Path(str(files("flopwise.experiments") / "data" / f"linear-{task}.safetensors"))


def train(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Train until the budget is spent and return the record; see `fit`."""
    return fit(run, checkpoint, progress)[1]


def fit(
    run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None
) -> tuple[LinearCausalLM, dict[str, Any]]:
    """The trained model and the record. A checkpoint is written every few seconds and resumed.

    Adam with clipped gradients; the rate rises, then falls as a cosine. A batch follows from the generator alone, so
    a resumed run is the run that was not interrupted.
    """
    train_set, test_set = digits.load() if run.task == "digits" else shakespeare.load()
    model = build(run.task, run.method, run.seed)
    optimizer = torch.optim.Adam(model.parameters(), run.rate, betas=(0.9, 0.95))
    budget, ledger = Budget(flops=run.flops), Ledger()
    generator = torch.Generator().manual_seed(run.seed)
    record: dict[str, Any] = {"curve": [], "steps": 0}
    parts = {"model": model, "optimizer": optimizer, "ledger": ledger}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        record = saved["record"]
    written = time.monotonic()

    batches = ledger.batches(_loader(run.task, train_set, generator))
    with ledger:
        while not budget.spent(ledger):
            ids = next(batches)
            share = budget.share(ledger)
            for group in optimizer.param_groups:
                group["lr"] = run.rate * min(1.0, share / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * share))
            loss = cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            record["steps"] += 1

            with ledger.paused():
                progress(share)
                if share * CURVE_POINTS >= len(record["curve"]):
                    bits = bits_per_dim(model, run.task, test_set, limit=CURVE_EXAMPLES)
                    point = {"share": share, "flops": ledger.flops, "examples": ledger.examples, "bits_per_dim": bits}
                    record["curve"].append(point)
                if time.monotonic() - written > CHECKPOINT_SECONDS:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    save_checkpoint(checkpoint, state | {"generator": generator.get_state(), "record": record})
                    written = time.monotonic()

    return model, record | {
        "experiment": "linear",
        "kind": run.kind,
        "task": run.task,
        "method": run.method,
        "rate": run.rate,
        "size": SIZES[run.task],
        "parameters": sum(p.numel() for p in model.parameters()),
        "budget": {"flops": run.flops},
        "flops": ledger.flops_by_phase,
        "seconds": ledger.seconds,
        "examples": ledger.examples,
        "bits_per_dim": bits_per_dim(model, run.task, test_set),
    }


@torch.no_grad()
def bits_per_dim(model: LinearCausalLM, task: Task, test_set: UInt8[Tensor, "..."], limit: int | None = None) -> float:
    """Mean bits for a pixel of a held-out digit, given its class, or for a byte of a held-out play.

    A play is cut into excerpts as long as those of the training, so that a model with a window is not at a loss.
    """
    sequences = test_set if task == "digits" else test_set[: len(test_set) // EXCERPT * EXCERPT].view(-1, EXCERPT)
    if limit is not None:
        sequences = sequences[:: max(1, len(sequences) // limit)]
    total, count = 0.0, 0
    for ids in sequences.long().split(16):
        loss = cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="sum")
        total, count = total + loss.item(), count + ids[:, 1:].numel()
    return total / count / math.log(2)


def bits_decoded(model: LinearCausalLM, ids: Int[Tensor, "b n"], weights: Weights) -> float:
    """Bits for a token after the first, when the decoder reads sequences token by token; see `bits_per_dim`."""
    decoder, total = model.decoder(len(ids), weights=weights), 0.0
    for here, after in zip(ids.T[:-1].contiguous(), ids.T[1:], strict=True):
        total += cross_entropy(decoder.step(here), after, reduction="sum").item()
    return total / ids[:, 1:].numel() / math.log(2)


def paint(model: LinearCausalLM, each: int, generator: torch.Generator, temperature: float = 1.0) -> dict[str, Any]:
    """`each` new pictures of every digit."""
    names = torch.arange(10).repeat_interleave(each)[:, None] + digits.LEVELS
    start = time.process_time()
    ids = model.generate(names, max_new_tokens=digits.PIXELS, temperature=temperature, generator=generator)
    return {
        "experiment": "linear",
        "kind": "painted",
        "digits": (names[:, 0] - digits.LEVELS).tolist(),
        "temperature": temperature,
        "cpu_seconds": time.process_time() - start,
        "pictures": digits.pictures(ids[:, 1:]),
    }


def complete(
    model: LinearCausalLM, sequences: UInt8[Tensor, "b 785"], each: int, generator: torch.Generator
) -> dict[str, Any]:
    """The lower halves of held-out digits, painted `each` times; the upper halves are read once."""
    half = digits.PIXELS // 2
    ids = sequences.long()
    decoder = model.decoder(len(ids))
    decoder.feed(ids[:, : 1 + half])
    lower = decoder.fork(each).generate(half, sampling=Sampling(temperature=1.0), generator=generator)
    whole = torch.cat([ids[:, 1 : 1 + half].repeat_interleave(each, 0), lower], 1)
    pictures = digits.pictures(whole)
    return {
        "experiment": "linear",
        "kind": "completed",
        "digits": (ids[:, 0] - digits.LEVELS).tolist(),
        "given_rows": digits.SIDE // 2,
        "originals": digits.pictures(ids[:, 1:]),
        "completions": [pictures[row * each : (row + 1) * each] for row in range(len(ids))],
    }


def write_play(
    model: LinearCausalLM, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.8
) -> Iterator[str]:
    """The continuation of `prompt`, character by character."""
    sampling = Sampling(temperature=temperature, top_p=0.95)
    for token in model.stream(
        shakespeare.encode(prompt), max_new_tokens=length, sampling=sampling, generator=generator
    ):
        yield shakespeare.decode(token)


def speed(batch: int, lengths: tuple[int, ...] = (digits.PIXELS,), rounds: int = 5) -> dict[str, Any]:
    """The shipped digit model's speed against a softmax model of the same size, with and without a cache."""
    size: dict[str, Any] = {**SIZES["digits"], "max_length": max(lengths) + 1}
    linear = LinearCausalLM(**size, recipe="modern" if SHIPPED["digits"].method == "modern" else "thesis")
    softmax = SoftmaxCausalLM(**size)
    result = measure(linear, softmax, batch=batch, lengths=lengths, rounds=rounds, burst=2)
    for row in result["lengths"]:
        row["images_per_second"] = {name: rate / row["length"] for name, rate in row["tokens_per_second"].items()}
    return {"experiment": "linear", "kind": "speed", "task": "digits", "size": size} | result


def _loader(task: Task, train_set: UInt8[Tensor, "..."], generator: torch.Generator) -> Iterator[Int[Tensor, "b n"]]:
    if task == "digits":
        return iter(digits.Shuffled(train_set, size=BATCH[task], generator=generator))
    return iter(shakespeare.Excerpts(train_set, size=BATCH[task], length=EXCERPT, generator=generator))


def ship(task: Task, folder: Path) -> None:
    """Train the model that the package ships and write it; its record is added to `folder`/records.jsonl."""
    run = SHIPPED[task]
    checkpoint = folder / "checkpoints" / f"{run.name}.pt"
    model, record = fit(run, checkpoint, lambda share: print(f"\r{share:.1%}", end="", flush=True))
    what = "pixels of the held-out digits" if task == "digits" else "bytes of Macbeth"
    about = (
        f"python -m flopwise.experiments.linear {task}: {run.method}, {record['examples']} examples in batches of "
        f"{BATCH[task]}, rate {run.rate}, {sum(record['flops'].values()):.3g} FLOPs; "
        f"{record['bits_per_dim']:.3f} bits for each of the {what}."
    )
    model.save(_path(task), dtype=torch.float16, about=about)
    Records(folder).add(run, record)
    checkpoint.unlink(missing_ok=True)
    print(f"\n{about}\n{_path(task)}: {_path(task).stat().st_size:,} bytes")


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    folder = Path("runs/linear")
    if arguments == ["compare"]:
        compare(folder)
    elif arguments in (["digits"], ["shakespeare"]):
        ship("digits" if arguments == ["digits"] else "shakespeare", folder)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
