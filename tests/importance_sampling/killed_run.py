"""A training script for the tests that kill it: checkpoints after every step, resumes if there is one.

python killed_run.py FOLDER KILL_AT MOMENT LOADER     MOMENT: step | score; LOADER: plain | stateful
"""

import os
import signal
import sys
from pathlib import Path

import torch
from problems import Presamples, StatefulPresamples, examples, loss
from torch import nn

from flopwise import Budget, ImportanceSampler, Ledger, endless
from flopwise.importance_sampling import cosine


def main(folder: Path, kill_at: int, moment: str, loader_kind: str) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    budget, ledger = Budget(flops=4e6), Ledger()
    steps = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def forward(data):
        if moment == "score" and 0 <= kill_at <= steps and not torch.is_grad_enabled():
            outputs = model(data[0])
            die()
            return outputs
        return model(data[0])

    def skewed(outputs, data):
        return data[0].norm(dim=1) ** 3 * loss(outputs, data)

    sampler = ImportanceSampler(forward, skewed, batch_size=8, accumulate=2)
    loader = {"plain": Presamples, "stateful": StatefulPresamples}[loader_kind](examples(200), 56)
    parts = {"model": model, "optimizer": optimizer, "sampler": sampler, "ledger": ledger}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        steps = saved["steps"]
    batches = sampler.batches(endless(loader))
    with ledger:
        while not budget.spent(ledger):
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * cosine(budget.share(ledger))
            (sampler.loss(forward(batch.data), batch) / 2).backward()
            steps += 1
            if steps % 2 == 0:
                with sampler.scaled_rate(optimizer):
                    optimizer.step()
                optimizer.zero_grad()
                with ledger.paused():
                    state = {name: part.state_dict() for name, part in parts.items()} | {"steps": steps}
                    torch.save(state, folder / "part")
                    (folder / "part").replace(checkpoint)
            if moment == "step" and steps == kill_at:
                die()
    metrics = sampler.metrics()
    torch.save(
        {"model": model.state_dict(), "steps": steps, "flops": ledger.flops, "metrics": metrics}, folder / "end.pt"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
