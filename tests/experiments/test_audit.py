"""The audit: its variances are those of the sampler's own steps, its verdicts those of settings known beforehand."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flopwise import ImportanceSampler
from flopwise.experiments.audit import WORTH, Audit, Stage, audit_importance
from flopwise.importance_sampling.gate import RATIOS

N, BATCH = 256, 8


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return model


def examples(skew: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and a weight of the loss; with skew 0 all weigh the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator)
    return x, torch.randint(3, (N,), generator=generator), torch.rand(N, generator=generator) ** skew


def loss(outputs, batch):
    return batch[2] * F.cross_entropy(outputs, batch[1], reduction="none")


def batches(data):
    return [tuple(part[a : a + BATCH] for part in data) for a in range(0, N, BATCH)]


def setup(skew: float = 12.0):
    return network(), loss, batches(examples(skew))


def even():
    return setup(0.0)


class TestVerdict:
    def test_few_examples_carry_the_gradient(self):
        audit = audit_importance(setup, steps=0, examples=N)
        assert (
            audit.helps
            and audit.course.needed <= WORTH
            and "likely to help" in audit.verdict
            and "unlikely" not in audit.verdict
        )
        assert audit.score_share > 0.85
        assert audit.batch_size == BATCH and audit.stages[0].examples == N

    def test_all_examples_matter_alike(self):
        audit = audit_importance("test_audit:even", steps=0, examples=N)
        assert not audit.helps and audit.R > 1
        assert "unlikely to help" in audit.verdict and "matter too equally" in audit.verdict

    def test_scoring_that_costs_too_much(self):
        """The model's forward is nearly all of a step: a large frozen part before a small trained one."""

        class Frozen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.frozen = nn.Sequential(nn.Linear(6, 500), nn.Linear(500, 500), nn.Linear(500, 6))
                self.frozen.requires_grad_(False)
                self.trained = network()

            def forward(self, x):
                return self.trained(x + 1e-3 * self.frozen(x))

        audit = audit_importance(lambda: (Frozen(), loss, batches(examples(2.0))), steps=0, examples=N)
        assert audit.scoring_cost["flops"] > 0.9 and not audit.helps
        assert "scoring costs too much" in audit.verdict

    def test_a_score_that_ranks_them_badly(self):
        class Scaled(nn.Module):
            """The gradient is in the inputs' scale, which the score does not see."""

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 3)

            def forward(self, x):
                return self.layer(x)

        x, y, weight = examples(0.0)
        scale = torch.where(torch.arange(N) % 20 == 0, 30.0, 0.3)[:, None]
        data = (x * scale, y, weight)

        def small(outputs, batch):
            return loss(1e-3 * outputs, batch)

        audit = audit_importance(lambda: (Scaled(), small, batches(data)), steps=0, examples=N)
        assert not audit.helps and "the score keeps only" in audit.verdict

    def test_more_signal_than_noise(self):
        def one_direction():
            x, _, weight = examples(4.0)
            data = (torch.ones_like(x), torch.zeros(N, dtype=torch.long), 0.1 + weight)
            return network(), loss, [tuple(part[:128] for part in data)]

        audit = audit_importance(one_direction, steps=0, examples=128)
        assert not audit.helps and "less noise buys little" in audit.verdict
        assert audit.course.needed > audit.R  # what less noise saves of a step, not of its noise

    def test_a_fresh_model_is_trained_for_a_while(self):
        audit = audit_importance(setup, steps=30, examples=64)
        assert [stage.steps for stage in audit.stages] == [0, 30]
        assert "after steps" in str(audit) and audit.verdict in str(audit)
        json.dumps(audit.record())

    def test_batch_normalisation_is_measured_with_the_statistics_of_training(self):
        """Whatever its running means have become; frozen, its running means are the model."""

        def normalised(mean: float, frozen: bool):
            model, loss, loader = setup()
            norm = nn.BatchNorm1d(8)
            norm.load_state_dict({**norm.state_dict(), "running_mean": torch.full((8,), mean)})
            model.insert(1, norm.train(not frozen))
            return model, loss, loader

        def tau2(mean: float, frozen: bool = False) -> float:
            return audit_importance(lambda: normalised(mean, frozen), steps=0, examples=N).stages[0].tau2

        assert tau2(100.0) == pytest.approx(tau2(0.0))
        assert abs(tau2(100.0, frozen=True) - tau2(0.0, frozen=True)) > 0.1

    def test_several_stages_of_one_training(self):
        def without_dropout():
            model, loss, loader = setup()
            model[2] = nn.Identity()
            return model, loss, loader

        audit = audit_importance(without_dropout, steps=[10, 30], examples=64, budget=40)
        assert [stage.steps for stage in audit.stages] == [0, 10, 30]
        once = audit_importance(without_dropout, steps=30, examples=64)
        assert audit.stages[-1].tau2 == pytest.approx(once.stages[-1].tau2)
        assert not audit.helps  # the gate has not learned anything yet


def measured(steps: int, variance: float, noise_scale: float = float("inf")) -> Stage:
    """A stage at which every r divides the variance by what it costs at c = 1, and by `variance`."""
    table = {r: variance / (1 + r) for r in RATIOS}
    return Stage(steps, 2.0, 2.0, table, table, noise_scale, 64)


def audited(*stages: Stage, budget: int | None = None) -> Audit:
    return Audit(16, "flops", {"flops": 1.0, "seconds": 1.0}, stages, 1.0, budget)


class TestRule:
    def test_all_noise_needs_R(self):
        audit = audited(measured(0, 0.6))
        assert pytest.approx(0.6) == audit.R and audit.course.needed == pytest.approx(0.6) and audit.helps

    def test_half_noise(self):
        """N = b: phi = 1/2, and (1 + c r) (1 - phi + phi v) = (1 + r) / 2 + R / 2."""
        audit = audited(measured(0, 0.6, noise_scale=16.0))
        assert audit.stages[0].noise_share(16) == 0.5
        assert audit.course.needed == pytest.approx((1 + audit.ratio) / 2 + 0.3) and not audit.helps

    def test_no_noise_at_all(self):
        audit = audited(measured(0, 0.6, noise_scale=0.0))
        assert audit.course.needed == pytest.approx(1 + audit.ratio) and not audit.helps

    def test_a_long_training_is_what_its_stages_say(self):
        audit = audited(measured(0, 0.6), budget=3 * 10**4)
        assert audit.course.on > 0.99 and pytest.approx(0.6, abs=0.01) == audit.course.R and audit.helps

    def test_a_short_one_is_over_before_the_gate_is_on(self):
        audit = audited(measured(0, 0.6), budget=60)
        assert not audit.helps and audit.course.on < 0.5 and "a longer training gains more" in audit.verdict
        assert pytest.approx(1 - 0.4 * audit.course.on) == audit.course.R

    def test_the_gate_stays_off_where_it_does_not_pay(self):
        audit = audited(measured(0, 1.2), budget=10**5)
        assert (audit.course.on, audit.course.R, audit.course.needed) == (0.0, 1.0, 1.0) and not audit.helps

    def test_between_two_stages_lies_a_line(self):
        """Variance falls from 1.2 to 0.4: below 0.9 from 3/8 on, where the gate comes on a little later."""
        audit = audited(measured(0, 1.2), measured(3 * 10**4, 0.4), budget=3 * 10**4)
        assert audit.course.on == pytest.approx(5 / 8, abs=0.03)
        assert pytest.approx(1 - 5 / 8 * (1 - 0.65), abs=0.03) == audit.course.R

    def test_after_the_last_stage_it_stays(self):
        short, long = (audited(measured(0, 1.2), measured(5000, 0.4), budget=n) for n in (25_000, 50_000))
        assert 0.4 < long.course.R < short.course.R < 0.5


def test_the_predicted_variance_is_that_of_the_samplers_own_steps():
    model, data = network().eval(), examples(8.0)
    audit = audit_importance(lambda: (model, loss, batches(data)), steps=0, examples=N)
    parameters, generator, ratio = list(model.parameters()), torch.Generator().manual_seed(5), 4
    sampler = ImportanceSampler(lambda batch: model(batch[0]), loss, batch_size=BATCH, gate="always", model=model)

    def spread(drawn: bool) -> float:
        gradients = []
        for _ in range(1500):
            index = torch.randint(N, ((ratio if drawn else 1) * BATCH,), generator=generator)
            batch = sampler.select(tuple(part[index] for part in data))
            value = sampler.loss(model(batch.data[0]), batch)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
        return float(torch.stack(gradients).var(0).sum())

    assert audit.stages[0].variance[4.0] == pytest.approx(spread(True) / spread(False), rel=0.15)


def test_the_users_model_and_the_global_generator_are_left_alone():
    model = network()
    before, state = [p.clone() for p in model.parameters()], torch.random.get_rng_state()
    audit_importance(lambda: (model, loss, batches(examples(1.0))), steps=0, examples=64)
    assert torch.equal(state, torch.random.get_rng_state())
    audit_importance(lambda: (model, loss, batches(examples(1.0))), steps=5, examples=64)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)) and model.training


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("no_such_module:f", r"named module:function.*'no_such_module:f'"),
        ("test_audit:nothing", "named module:function"),
        (lambda: network(), r"setup returns \(model, loss, loader\).*got Sequential"),
        (lambda: (loss, network(), []), "setup returns"),
        (lambda: (network(), lambda z, b: loss(z, b).mean(), batches(examples(1.0))), "reduction='none'"),
        (lambda: (network(), loss, []), "yielded nothing"),
    ],
)
def test_bad_setups(bad, says: str):
    with pytest.raises(ValueError, match=says):
        audit_importance(bad, steps=0)
