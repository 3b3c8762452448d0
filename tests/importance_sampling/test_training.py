"""Inside real training: batch normalisation, dropout, mixed precision, accumulation, checkpointing, budgets."""

import functools

import pytest
import torch
from problems import Presamples, examples, forward_of, loss, network, seeded
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from flopwise import Budget, ImportanceSampler, Ledger, endless
from flopwise.importance_sampling import cosine, staircase
from flopwise.importance_sampling.modes import find_models


def normalised() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)))  # type: ignore[return-value]


class TestModes:
    def test_statistics_come_from_uniform_data_only(self):
        model, data = normalised(), examples(64)
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
        sampler = ImportanceSampler(forward_of(model), loss, batch_size=16, gate="always")
        for batch in sampler.batches([data]):
            before = norm.running_mean.clone(), int(norm.num_batches_tracked)  # type: ignore[arg-type]
            hidden = model[0](data[0])
            torch.testing.assert_close(before[0], 0.1 * hidden.mean(0).detach())  # the scoring forward saw all 64
            assert before[1] == 1
            outputs = model(batch.data[0])
            sampler.loss(outputs, batch).backward()
            assert torch.equal(norm.running_mean, before[0]) and int(norm.num_batches_tracked) == before[1]  # type: ignore[arg-type]
            expected = nn.functional.batch_norm(
                model[0](batch.data[0]), None, None, norm.weight, norm.bias, training=True
            )
            torch.testing.assert_close(model[1](model[0](batch.data[0])), expected)  # and it used the batch's
        assert norm.track_running_stats
        model(data[0])
        assert int(norm.num_batches_tracked) == 2  # type: ignore[arg-type]

    def test_a_plain_batch_updates_them_as_ever(self):
        model = normalised()
        sampler = ImportanceSampler(forward_of(model), loss, batch_size=16, gate="never")
        for batch in sampler.batches([examples(64)]):
            sampler.loss(model(batch.data[0]), batch).backward()
        assert int(model[1].num_batches_tracked) == 4  # type: ignore[arg-type]

    def test_learning_the_cost_of_scoring_leaves_them_alone(self):
        model = normalised()
        sampler = ImportanceSampler(forward_of(model), loss, batch_size=16, gate="auto")
        next(sampler.batches([examples(64)]))
        assert int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type]

    def test_a_frozen_norm_stays_frozen(self):
        model = normalised()
        model[1].eval()
        sampler = ImportanceSampler(forward_of(model), loss, batch_size=16, gate="always")
        for batch in sampler.batches([examples(64)]):
            sampler.loss(model(batch.data[0]), batch).backward()
        assert int(model[1].num_batches_tracked) == 0 and not model[1].training and model[3].training  # type: ignore[arg-type]

    def test_scores_are_taken_with_dropout_off(self):
        model, data = normalised(), examples(64)
        for _ in range(2):
            one, other = (ImportanceSampler(forward_of(model), loss, batch_size=16).select(data) for _ in range(2))
            assert torch.equal(one.indices, other.indices) and torch.equal(one.weights, other.weights)
        assert model[3].training

    def test_models_are_found_where_forward_names_them(self):
        model = network()
        assert find_models(model) == [model]
        assert find_models(model.forward) == [model]
        assert find_models(forward_of(model)) == [model]
        assert find_models(lambda data: model(data[0])) == [model]

        @functools.wraps(forward_of(model))
        def decorated(data):
            return None

        assert find_models(decorated) == [model]


def train(sampler, model, loader, steps, *, scaler=None, scheduler=None, accumulate=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    batches = sampler.batches(endless(loader))
    for step in range(steps):
        batch = next(batches)
        value = sampler.loss(sampler.forward(batch.data), batch) / accumulate
        (value if scaler is None else scaler.scale(value)).backward()
        if (step + 1) % accumulate == 0:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()


@pytest.mark.parametrize("gate", ["auto", "always"])
def test_bf16_autocast_inside_forward(gate):
    model = network()

    def forward(data):
        with torch.autocast("cpu", torch.bfloat16):
            return model(data[0])

    sampler = ImportanceSampler(forward, loss, batch_size=8, gate=gate)
    train(sampler, model, Presamples(examples(128), 32), 24)
    assert sampler.metrics()["tau2"] > 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_grad_scaler_changes_nothing():
    """A power of two times the loss: the same parameters to the last bit, and the same gate."""
    plain, scaled, data = network(), network(), examples(256)
    one = ImportanceSampler(forward_of(plain), loss, batch_size=8)
    other = ImportanceSampler(forward_of(scaled), loss, batch_size=8)
    train(one, plain, Presamples(data, 64), 60)
    train(other, scaled, Presamples(data, 64), 60, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(p, q)
    assert one.metrics()["tau2"] == pytest.approx(other.metrics()["tau2"], rel=1e-5)


def test_scores_of_an_overflow_are_left_out():
    model = network()
    sampler, before = ImportanceSampler(forward_of(model), loss, batch_size=8), {}
    for factor in (1.0, float("inf")):
        for batch in sampler.batches([examples(8)]):
            (sampler.loss(model(batch.data[0]), batch) * factor).backward()
        before = sampler.metrics() if factor == 1.0 else before
    assert sampler.metrics()["tau2"] == before["tau2"] > 1


def test_regularisers_on_the_outputs_are_not_scored():
    model, data = network(), examples(8)
    scores = []
    for weight in (0.0, 100.0):
        sampler = ImportanceSampler(forward_of(model), loss, batch_size=8)
        batch = next(sampler.batches([data]))
        outputs = model(batch.data[0])
        (sampler.loss(outputs, batch) + weight * outputs.square().sum()).backward()
        scores.append(sampler.state_dict()["scores"])
    torch.testing.assert_close(scores[0], scores[1])


def test_scores_recorded_from_the_backward_pass_are_the_upper_bound():
    from flopwise.importance_sampling import upper_bound_score

    model, data = network(), examples(8)

    def masked(outputs, data):
        return (outputs - 1).square() * 3, torch.arange(24).view(8, 3) % 5 != 0

    sampler = ImportanceSampler(forward_of(model), masked, batch_size=8)
    batch = next(sampler.batches([data]))
    outputs = model(batch.data[0])
    sampler.loss(outputs, batch).backward()
    torch.testing.assert_close(sampler.state_dict()["scores"], upper_bound_score(outputs, data, masked))


@pytest.mark.parametrize("gate", ["auto", "always"])
def test_accumulation_adds_up_to_the_larger_batch(gate):
    model = network()
    sampler = ImportanceSampler(forward_of(model), loss, batch_size=8, gate=gate, accumulate=4)
    train(sampler, model, Presamples(examples(256), 64), 64, accumulate=4)
    assert sampler._steps == 64


def test_activation_checkpointing_gives_the_same_gradient():
    from torch.utils.checkpoint import checkpoint

    plain, recomputed = normalised(), normalised()
    plain[3], recomputed[3] = nn.Identity(), nn.Identity()

    def forward(data):
        return checkpoint(recomputed, data[0], use_reentrant=False)

    one = ImportanceSampler(forward_of(plain), loss, batch_size=16, gate="always")
    other = ImportanceSampler(forward, loss, batch_size=16, gate="always")
    for batch in one.batches([examples(64)]):
        one.loss(plain(batch.data[0]), batch).backward()
    for batch in other.batches([examples(64)]):
        other.loss(forward(batch.data), batch).backward()
    for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.equal(plain[1].running_mean, recomputed[1].running_mean)  # type: ignore[arg-type]


def test_a_torch_scheduler_on_the_share_of_the_budget():
    model = network()
    sampler = ImportanceSampler(forward_of(model), loss, batch_size=8, gate="always")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    budget, ledger, rates = Budget(examples=80), Ledger(), []
    scheduler = LambdaLR(optimizer, lambda _: cosine(budget.share(ledger)))
    batches = sampler.batches(endless(Presamples(examples(64), 32)))
    with ledger:
        while not budget.spent(ledger):
            batch = next(batches)
            sampler.loss(sampler.forward(batch.data), batch).backward()
            with sampler.scaled_rate(optimizer):
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * cosine(share / 10) for share in range(1, 11)])


def test_schedules():
    assert [cosine(0.0), cosine(0.5), cosine(1.0)] == pytest.approx([1, 0.5, 0])
    assert [cosine(0.05, warmup=0.1), cosine(0.1, warmup=0.1)] == pytest.approx([0.5, 1])
    assert [staircase(s) for s in (0.0, 0.59, 0.6, 0.9)] == pytest.approx([1, 1, 0.1, 0.01])


def test_compiled_models_are_counted_and_trained():
    """The counted step runs eagerly under the counter; the others run compiled."""
    model = network()
    compiled = torch.compile(model, backend="eager")

    def forward(data):
        return compiled(data[0])

    sampler = ImportanceSampler(forward, loss, batch_size=8, gate="always", model=model)
    with Ledger() as ledger:
        train(sampler, model, Presamples(examples(64), 32), 4)
    plain = ImportanceSampler(forward_of(network()), loss, batch_size=8, gate="always")
    with Ledger() as expected:
        train(plain, plain.models[0], Presamples(examples(64), 32), 4)
    assert ledger.flops == expected.flops
