"""One rank of a job under torchrun, for the tests.   torchrun ... job.py WHAT WRAP FOLDER [KILL_AT]

WHAT: train (checkpoints, resumes, may be killed) | unbiased | unequal (presamples that differ in size), joined by +.
WRAP: ddp | fsdp2. Writes FOLDER/WHAT_RANK.pt for each.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from flopwise import ImportanceSampler, Ledger, endless

Batch = tuple[torch.Tensor, torch.Tensor]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BATCH, PRESAMPLE, STEPS = 8, 32, 110


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return model


def wrapped(model: nn.Module, how: str) -> Any:
    if how == "ddp":
        # DDP lays its buckets out anew after the first step of a process, and then more than two ranks' gradients are
        # added up in another order: a restart would differ in the last bit. Looking for unused parameters, it does not.
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def examples(rank: int, n: int) -> Batch:
    """Every rank has data of its own, and on rank 0 alone the examples matter very differently."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(n, 6, generator=generator)
    if rank == 0:
        x = x * torch.rand(n, 1, generator=generator).exp() ** 3
    return x, (x[:, :3] * x[:, 3:]).argmax(1)


def loss(outputs: torch.Tensor, data: Batch) -> torch.Tensor:
    return data[0].norm(dim=1) ** 4 * F.cross_entropy(outputs, data[1], reduction="none") / 1000


class Presamples:
    def __init__(self, rank: int, size: int) -> None:
        self.data, self.size = examples(rank, 4 * PRESAMPLE), size
        self.generator = torch.Generator().manual_seed(100 + rank)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.randperm(len(self.data[0]), generator=self.generator).split(self.size):
            yield self.data[0][index], self.data[1][index]


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([full(p.grad).flatten() for p in model.parameters()])  # type: ignore[arg-type]


def train(how: str, folder: Path, kill_at: int) -> dict[str, Any]:
    rank = dist.get_rank()
    model = wrapped(network(), how)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    sampler = ImportanceSampler(lambda data: model(data[0]), loss, batch_size=BATCH, model=model)
    ledger = Ledger()
    own, steps = {"sampler": sampler, "ledger": ledger}, 0
    checkpoints = sorted(folder.glob("checkpoint*"))
    if checkpoints:
        common = torch.load(checkpoints[-1] / "common.pt", weights_only=True)
        set_state_dict(
            model, optimizer, model_state_dict=common["model"], optim_state_dict=common["optimizer"], options=FULL
        )
        steps = common["steps"]
        mine = torch.load(checkpoints[-1] / f"rank{rank}.pt", weights_only=True)
        for name, part in own.items():
            part.load_state_dict(mine[name])
    batches, decisions = sampler.batches(endless(Presamples(rank, PRESAMPLE))), []
    with ledger:
        while steps < STEPS:
            batch = next(batches)
            sampler.loss(model(batch.data[0]), batch).backward()
            with sampler.scaled_rate(optimizer):
                optimizer.step()
            optimizer.zero_grad()
            steps += 1
            decisions.append((batch.drawn, sampler._gate.ratio, sampler.rate_scale))
            if steps == kill_at and rank == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if steps % 7 == 0:
                with ledger.paused():
                    save(folder, steps, model, optimizer, {name: part.state_dict() for name, part in own.items()})
    parameters = torch.cat([full(p).flatten() for p in model.parameters()])
    return {"parameters": parameters, "decisions": decisions, "metrics": sampler.metrics(), "flops": ledger.flops}


def save(folder: Path, steps: int, model: nn.Module, optimizer: Any, own: dict[str, Any]) -> None:
    """Whole or not at all: every rank writes its file, then the folder gets its name."""
    part, rank = folder / "part", dist.get_rank()
    part.mkdir(exist_ok=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FULL)
    torch.save(own, part / f"rank{rank}.pt")
    if rank == 0:
        torch.save({"model": model_state, "optimizer": optimizer_state, "steps": steps}, part / "common.pt")
    dist.barrier()
    if rank == 0:
        part.rename(folder / f"checkpoint{steps:04}")
    dist.barrier()


def unbiased(how: str) -> dict[str, Any]:
    """K ||mean - truth||^2 / tr Cov of the global gradients of K draws; the truth by one process without any draw."""
    world, rank, draws = dist.get_world_size(), dist.get_rank(), 150
    oracle = network()
    presamples = [examples(r, PRESAMPLE) for r in range(world)]
    mean = torch.stack([loss(oracle(data[0]), data).mean() for data in presamples]).mean()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(oracle.parameters()))])
    model = wrapped(network(), how)
    sampler = ImportanceSampler(lambda data: model(data[0]), loss, batch_size=BATCH, model=model, gate="always")
    estimates, indices = [], []
    for batch in (sampler.select(presamples[rank]) for _ in range(draws)):
        model.zero_grad()
        sampler.loss(model(batch.data[0]), batch).backward()
        estimates.append(gradient(model))
        indices.append(batch.indices)
    stacked = torch.stack(estimates)
    error, spread = (stacked.mean(0) - truth).square().sum(), stacked.var(0).sum()
    return {"chi_square": float(draws * error / spread), "indices": torch.stack(indices), "gradient": stacked[-1]}


def unequal(how: str) -> dict[str, Any]:
    model = wrapped(network(), how)
    sampler = ImportanceSampler(lambda data: model(data[0]), loss, batch_size=BATCH, model=model)
    try:
        next(sampler.batches(Presamples(dist.get_rank(), PRESAMPLE - dist.get_rank())))
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def main(what: str, how: str, folder: Path, kill_at: int = -1) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parts = {
        "train": lambda: train(how, folder, kill_at),
        "unbiased": lambda: unbiased(how),
        "unequal": lambda: unequal(how),
    }
    for part in what.split("+"):
        torch.save(parts[part](), folder / f"{part}_{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(
        0
    )  # all is written; gloo's threads sometimes abort a busy process that tears them down ("terminate called")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
