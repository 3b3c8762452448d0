"""Scores from a small network that learns along: what is drawn, what is learned, and what the gate believes."""

import copy
from typing import Any

import pytest
import torch
from checks import chi_square_per_dimension
from problems import StatefulPresamples, examples, forward_of, gradient, loss, network, seeded
from torch import nn

from flopwise import ImportanceSampler, Ledger, endless
from flopwise.importance_sampling import relative_variance, upper_bound_score
from flopwise.importance_sampling.gate import RATIOS, Gate
from flopwise.importance_sampling.sampler import LEARNED_EACH


def small(seed: int = 1) -> nn.Module:
    return seeded(nn.Linear(6, 3), seed)


def make_sampler(model: nn.Module, proxy: nn.Module, **options) -> ImportanceSampler:
    return ImportanceSampler(forward_of(model), loss, proxy=forward_of(proxy), **{"batch_size": 8, **options})


def scores_of(model: nn.Module, data) -> torch.Tensor:
    return upper_bound_score(model(data[0]), data, loss)


@pytest.mark.parametrize("draw", ["without_replacement", "with_replacement"])
def test_gradients_and_evidence_are_unbiased(draw):
    model, proxy, data = network(), small(), examples(40)
    sampler = make_sampler(model, proxy, gate="always", draw=draw)
    gate = Gate("always", draw, 0.1)
    gradients, own, evidence = [], [], []
    for _ in range(400):
        batch = sampler.select(data)
        value = sampler.loss(model(batch.data[0]), batch)
        gradients.append(gradient(value, model).clone())
        value = sampler.loss(model(batch.data[0]), batch)
        own.append(gradient(value, proxy).clone())
        sampler._outputs.clear()
        sampler.loss(model(batch.data[0]), batch).backward()
        evidence.append(gate.evidence(*sampler.state_dict()["scores"][:, -40:]))
    truth = loss(model(data[0]), data).mean(), loss(proxy(data[0]), data).mean()
    assert chi_square_per_dimension(torch.stack(gradients), gradient(truth[0], model)) < 11
    assert chi_square_per_dimension(torch.stack(own), gradient(truth[1], proxy)) < 11
    expected = torch.tensor(gate.evidence(scores_of(proxy, data), scores_of(model, data), torch.ones(40)))
    found = torch.tensor(evidence)
    assert torch.equal(found[:, 0], expected[0].expand(400))
    assert chi_square_per_dimension(found[:, 1:2], expected[1:2]) < 11
    assert chi_square_per_dimension(found[:, 2:], expected[2:]) < 11


def test_evidence_of_a_plain_batch_is_what_the_proxys_draw_is_worth():
    model, proxy, data = network(), small(), examples(8)
    sampler = make_sampler(model, proxy)
    batch = next(sampler.batches([data]))
    sampler.loss(model(batch.data[0]), batch).backward()
    count, total, squares, *variances = Gate("auto", "without_replacement", 0.1).evidence(
        *sampler.state_dict()["scores"]
    )
    cheap, true = scores_of(proxy, data), scores_of(model, data)
    assert (count, total, squares) == pytest.approx((8, float(true.sum()), float(true.square().sum())))
    expected = [relative_variance(cheap, ratio, norms=true) for ratio in RATIOS]
    assert [v / squares for v in variances] == pytest.approx(expected)


def test_losses_and_the_models_gradient_are_as_without_a_proxy():
    model, data = network(), examples(8)
    plain, ours = ImportanceSampler(forward_of(model), loss, batch_size=8), make_sampler(model, small())
    values = []
    for sampler in (plain, ours):
        batch = next(sampler.batches([data]))
        value = sampler.loss(model(batch.data[0]), batch)
        values.append((value.detach(), gradient(value, model)))
    assert torch.equal(values[0][0], values[1][0]) and torch.equal(values[0][1], values[1][1])


def test_the_proxy_draws_and_is_all_that_scoring_costs():
    model, proxy, data = network(), small(), examples(48)
    ran = []
    model.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    sampler = make_sampler(model, proxy, gate="always", smoothing=1e-6)
    with Ledger() as ledger:
        for batch in sampler.batches([data]):
            sampler.loss(model(batch.data[0]), batch).backward()
    assert ran == [True]
    assert ledger.flops_by_phase["scoring"] == 48 * 2 * 6 * 3
    step, forward = 3 * 8 * 2 * (6 * 8 + 8 * 3), 8 * 2 * 6 * 3
    inputs = 8 * 2 * 6 * 8  # the input has no gradient
    assert ledger.flops_by_phase["training"] == step - inputs + 2 * forward
    scores = scores_of(proxy, data)
    assert scores[sampler.select(data).indices].mean() > scores.mean()


def opinionated(score) -> tuple[ImportanceSampler, nn.Module, tuple[torch.Tensor, ...]]:
    """A sampler whose proxy thinks `score(data)`, and data of which one example in sixteen matters, by data[2]."""
    model, generator = network(), torch.Generator().manual_seed(0)
    matters = 1 + 29.0 * (torch.rand(512, generator=generator) < 1 / 16)

    def uneven(outputs, data):
        return data[2] * loss(outputs, data)

    sampler = ImportanceSampler(forward_of(model), uneven, batch_size=8, proxy=forward_of(small()))
    sampler._scores_of = lambda outputs, data: (score(data), None)
    return sampler, model, (*examples(512), matters)


def one_pass(sampler: ImportanceSampler, model: nn.Module, data: tuple[torch.Tensor, ...]) -> dict[str, float]:
    for batch in sampler.batches(list(zip(*(x.split(64) for x in data), strict=True))):
        sampler.loss(model(batch.data[0]), batch).backward()
    return sampler.metrics()


def test_a_proxy_that_knows_opens_the_gate_and_one_that_is_wrong_later_closes_it():
    """While on, nothing but the true scores of what the proxy draws can tell."""
    wrong = []
    sampler, model, data = opinionated(lambda data: data[2].roll(1) if wrong else data[2])
    metrics = [one_pass(sampler, model, data) for _ in range(6)][-1]
    assert metrics["on"] and metrics["R"] < 0.7
    wrong.append(True)
    on = [one_pass(sampler, model, data)["on"] for _ in range(6)]
    assert not any(on[-3:])


def test_a_sure_proxy_that_knows_nothing_does_not_open_the_gate():
    generator = torch.Generator().manual_seed(0)
    sampler, model, data = opinionated(lambda data: torch.rand(len(data[2]), generator=generator) ** 8)
    metrics = [one_pass(sampler, model, data) for _ in range(6)][-1]
    assert not metrics["share_on"] and metrics["R"] > 1


def test_never_leaves_the_proxy_alone():
    model, proxy = network(), small()
    ran = []
    proxy.register_forward_hook(lambda *_: ran.append(1))
    sampler = make_sampler(model, proxy, gate="never")
    for batch in sampler.batches([examples(48)]):
        sampler.loss(model(batch.data[0]), batch).backward()
    assert not ran


def test_batch_normalisation_needs_uniform_data():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"statistics of uniform.*eval\(\) first, or leave out proxy"):
        make_sampler(model, small())
    model[1].eval()
    make_sampler(model, small())


def test_a_proxy_with_modes_of_its_own():
    norm, dropout = nn.BatchNorm1d(8), nn.Dropout(0.5)
    proxy = nn.Sequential(nn.Linear(6, 8), norm, dropout, nn.Linear(8, 3))
    seen = []
    dropout.register_forward_hook(lambda *_: seen.append((dropout.training, int(norm.num_batches_tracked or 0))))
    model = network()
    sampler = make_sampler(model, proxy, gate="always")
    for batch in sampler.batches([examples(48)]):
        sampler.loss(model(batch.data[0]), batch).backward()
    assert seen == [(False, 1), (True, 1)]  # scoring: dropout off, uniform statistics; training: on, and left alone


@pytest.mark.parametrize("stop", [30, 31, 400])
def test_resumed_is_identical(stop: int):
    def run(state: dict[str, Any] | None, upto: int) -> dict[str, Any]:
        model, proxy = network(), small()
        optimizer = torch.optim.Adam([*model.parameters(), *proxy.parameters()], 1e-2)
        sampler = ImportanceSampler(
            forward_of(model),
            lambda outputs, data: data[0].norm(dim=1) ** 3 * loss(outputs, data),
            batch_size=8, proxy=forward_of(proxy),
        )  # fmt: skip
        loader = StatefulPresamples(examples(200), 56)
        parts: dict[str, Any] = {"model": model, "proxy": proxy, "optimizer": optimizer, "sampler": sampler}
        steps = 0
        if state is not None:
            steps = state.pop("steps")
            for name, part in parts.items():
                part.load_state_dict(state[name])
        for batch in sampler.batches(endless(loader)):
            sampler.loss(model(batch.data[0]), batch).backward()
            with sampler.scaled_rate(optimizer):
                optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == upto:
                break
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()} | {"steps": steps})

    assert LEARNED_EACH < 500 / 7
    whole = run(None, 500)
    resumed = run(run(None, stop), 500)
    assert whole["sampler"]["gate"] == resumed["sampler"]["gate"]
    for part in ("model", "proxy"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), name
    assert whole["sampler"]["steps"] == resumed["sampler"]["steps"] and whole["sampler"]["steps"][1] > 50
