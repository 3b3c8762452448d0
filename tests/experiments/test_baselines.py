"""The baselines: each one's claim about bias is tested, both ways, and what it spends is booked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flopwise import Ledger
from flopwise.experiments.baselines import (
    History,
    InfoBatch,
    OnlineBatchSelection,
    RandomSubset,
    SelectiveBackprop,
    Uniform,
    loss_based,
)

N, BATCH = 48, 12
REMEMBERING = {"ids": lambda data: data[2], "examples": N}
METHODS = [
    (Uniform, {}, True, 0),
    (RandomSubset, {}, True, 0),
    (loss_based, {}, True, N),
    (History, REMEMBERING, True, 0),
    (SelectiveBackprop, {}, False, N),
    (OnlineBatchSelection, REMEMBERING, False, 0),
]
every_method = pytest.mark.parametrize(
    ("make", "options", "unbiased", "scored"), METHODS, ids=lambda m: getattr(m, "__name__", "")
)


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator) * torch.rand(N, 1, generator=generator).exp() ** 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return model, (x, (x[:, :3] * x[:, 3:]).argmax(1), torch.arange(N))


def loss(outputs, data):
    return F.cross_entropy(outputs, data[1], reduction="none")


def gradient(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def estimates(method, model, data, passes: int):
    found = []
    for _ in range(passes):
        for batch in method.batches([data]):
            found.append(gradient(method.loss(method.forward(batch.data), batch), model))
    return torch.stack(found)


@every_method
def test_the_mean_gradient_is_what_the_method_says(make, options, unbiased, scored):
    model, data = problem()
    method = make(lambda batch: model(batch[0]), loss, batch_size=BATCH, **options)
    if hasattr(method, "memory"):  # remembers stale losses of another model
        method.memory = loss(model(data[0]) * 0.5, data).detach()
    truth = gradient(loss(model(data[0]), data).mean(), model)
    found = estimates(method, model, data, 400)
    chi_square = len(found) * (found.mean(0) - truth).square().sum() / found.var(0).sum()
    assert (chi_square < 11) == unbiased


@every_method
def test_what_it_spends_is_booked(make, options, unbiased, scored):
    model, data = problem()
    method = make(lambda batch: model(batch[0]), loss, batch_size=BATCH, **options)
    with Ledger() as ledger:
        for batch in method.batches([data]):
            method.loss(method.forward(batch.data), batch).backward()
    assert ledger.flops_by_phase.get("scoring", 0) == scored * 2 * (6 * 8 + 8 * 3)
    assert ledger.examples == (N if make is Uniform else BATCH)


@pytest.mark.parametrize("make", [History, OnlineBatchSelection, InfoBatch])
def test_what_is_trained_on_is_remembered_and_the_state_goes_on(make):
    model, data = problem()

    def fresh():
        return make(lambda batch: model(batch[0]), loss, batch_size=BATCH, **REMEMBERING)

    method = fresh()
    seen = torch.cat(
        [batch.indices for batch in method.batches([data]) if method.loss(model(batch.data[0]), batch) > 0]
    )
    assert torch.equal((~method.memory.isnan()).nonzero()[:, 0], seen.sort().values)
    other = fresh()
    other.load_state_dict(method.state_dict())
    one, two = (next(m.batches([data])) for m in (method, other))
    assert torch.equal(one.indices, two.indices) and torch.equal(one.weights, two.weights)


def test_infobatch_keeps_the_sum_over_a_pass():
    model, data = problem()
    method = InfoBatch(lambda batch: model(batch[0]), loss, batch_size=BATCH, **REMEMBERING)
    method.observe = lambda *_: None  # type: ignore[method-assign]
    sums = []
    method.memory = loss(model(data[0]), data).detach()
    for _ in range(400):
        batches = list(method.batches([data]))
        assert sum(len(b.weights) for b in batches) < N
        sums.append(sum(gradient((b.weights * loss(model(b.data[0]), b.data)).sum(), model) for b in batches))
    stacked, truth = torch.stack(sums), gradient(loss(model(data[0]), data).sum(), model)
    assert len(stacked) * (stacked.mean(0) - truth).square().sum() / stacked.var(0).sum() < 11
    method.progress = lambda: 0.9
    assert sum(len(b.weights) for b in method.batches([data])) == N


def test_history_has_less_variance_than_a_random_subset():
    model, data = problem()

    def uneven(outputs, batch):
        return torch.linspace(0, 1, N)[batch[2]] ** 8 * loss(outputs, batch)

    def forward(batch):
        return model(batch[0])

    history = History(forward, uneven, batch_size=BATCH, **REMEMBERING)
    for batch in Uniform(forward, uneven, batch_size=BATCH).batches([data]):
        history.loss(forward(batch.data), batch)
    history.observe = lambda *_: None  # type: ignore[method-assign]
    subset = RandomSubset(forward, uneven, batch_size=BATCH)
    ours, theirs = (float(estimates(m, model, data, 200).var(0).sum()) for m in (history, subset))
    assert ours < 0.5 * theirs


def test_bad_arguments():
    model, _ = problem()
    with pytest.raises(ValueError, match="share of the easy"):
        InfoBatch(model, loss, share=1.0, **REMEMBERING)
    with pytest.raises(ValueError, match="pressure is the largest"):
        OnlineBatchSelection(model, loss, pressure=0.5, **REMEMBERING)
