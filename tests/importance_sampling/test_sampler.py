"""The sampler: unbiased steps, what it does when the gate is off, and what it says to bad input."""

from math import isnan

import checks
import pytest
import torch
from problems import Presamples, StatefulPresamples, examples, forward_of, gradient, loss, network
from torch import nn
from torch.nn import functional as F

from flopwise import ImportanceSampler, Ledger, endless
from flopwise.importance_sampling import ConstantVarianceSampler, loss_score, upper_bound_score
from flopwise.importance_sampling.sampler import LEARNED_EACH, MANY
from flopwise.importance_sampling.variance import drawn_size


def make_sampler(model: nn.Module | None = None, **options) -> ImportanceSampler:
    return ImportanceSampler(forward_of(model or network()), loss, **{"batch_size": 8, **options})


class TestUnbiased:
    @pytest.mark.parametrize("draw", ["without_replacement", "with_replacement"])
    @pytest.mark.parametrize("smoothing", [0.05, 0.1, 1.0])
    def test_weighted_gradients(self, draw: str, smoothing: float):
        checks.weighted_gradient_is_unbiased(draw, smoothing)

    def test_certain_examples(self):
        checks.certain_examples_are_weighted_by_their_inclusion_probability()

    def test_token_losses(self):
        checks.token_losses_are_unbiased()

    def test_example_weights_belong_in_the_loss_and_multiply_in(self):
        model, (x, y) = network(), examples(32)
        data = (x, y, torch.rand(32) * 5)

        def weighted(outputs, data):
            return data[2] * F.cross_entropy(outputs, data[1], reduction="none")

        forward = forward_of(model)
        sampler = ImportanceSampler(forward, weighted, batch_size=8)
        truth = gradient(weighted(forward(data), data).mean(), model)
        estimates = checks.gradients_of_draws(sampler, model, data, 500)
        assert checks.chi_square_per_dimension(estimates, truth) < 11

    def test_losses_of_two_dimensions_without_a_mask_are_averaged(self):
        model = network()

        def per_output(outputs, data):
            return (outputs - 1).square()

        forward, data = forward_of(model), examples(32)
        sampler = ImportanceSampler(forward, per_output, batch_size=8)
        truth = gradient(per_output(forward(data), data).mean(), model)
        estimates = checks.gradients_of_draws(sampler, model, data, 400)
        assert checks.chi_square_per_dimension(estimates, truth) < 11

    def test_less_variance_than_uniform(self):
        model, (x, y) = network(), examples(64)
        data = (x, y, torch.linspace(0, 1, 64) ** 8)
        forward = forward_of(model)

        def uneven(outputs, data):
            return data[2] * F.cross_entropy(outputs, data[1], reduction="none")

        truth = gradient(uneven(forward(data), data).mean(), model)

        def spread(**options) -> float:
            sampler = ImportanceSampler(forward, uneven, batch_size=16, **options)
            gradients = checks.gradients_of_draws(sampler, model, data, 150)
            return float((gradients - truth).square().sum(1).mean())

        ours, paper, uniform = spread(), spread(draw="with_replacement"), spread(smoothing=1.0)
        assert ours < paper < uniform


class TestSelect:
    def test_the_weighted_batch_is_the_data_at_its_indices(self):
        data = examples(40)
        batch = make_sampler().select(data)
        assert torch.equal(batch.data[0], data[0][batch.indices])
        assert torch.equal(batch.data[1], data[1][batch.indices])
        assert batch.drawn and batch.weights.shape == (8,) and len(batch.indices.unique()) == 8

    @pytest.mark.parametrize("n", [1, 7, 8])
    def test_a_presample_no_larger_than_the_batch_comes_back_whole(self, n: int):
        batch = make_sampler().select(examples(n))
        assert not batch.drawn
        assert batch.indices.tolist() == list(range(n)) and batch.weights.tolist() == [1.0] * n

    def test_any_pytree(self):
        x, y = examples(40)
        model = network()
        sampler = ImportanceSampler(
            lambda data: model(data["inputs"]["x"]),
            lambda outputs, data: F.cross_entropy(outputs, data["targets"][0], reduction="none"),
            batch_size=8,
        )
        batch = sampler.select({"inputs": {"x": x, "unused": None}, "targets": [y]})
        assert torch.equal(batch.data["inputs"]["x"], x[batch.indices])
        assert batch.data["inputs"]["unused"] is None

    def test_draws_follow_the_seed_and_not_the_global_generator(self):
        data = examples(40)
        torch.manual_seed(1)
        one = make_sampler(seed=3).select(data).indices
        torch.manual_seed(2)
        assert torch.equal(one, make_sampler(seed=3).select(data).indices)
        assert not torch.equal(one, make_sampler(seed=4).select(data).indices)

    def test_another_score(self):
        data = examples(40)
        sampler = make_sampler(score=lambda outputs, data: torch.arange(40.0) ** 8, smoothing=1e-6)
        assert sampler.select(data).indices.min() > 20

    def test_the_biased_mode_flattens_the_weights_and_keeps_the_weighted_score(self):
        model, data = network(), examples(40)
        unbiased, biased = make_sampler(model), make_sampler(model, weight_exponent=0.5)
        one, other = unbiased.select(data), biased.select(data)
        assert torch.equal(one.indices, other.indices)
        scores = upper_bound_score(model(one.data[0]), one.data, loss)
        torch.testing.assert_close((one.weights * scores).sum(), (other.weights * scores).sum())
        assert other.weights.std() < one.weights.std()


class TestGate:
    def test_never_is_a_plain_loop_to_the_last_bit(self):
        data = examples(100)
        ours, plain = network(), network()
        sampler = make_sampler(ours, gate="never")
        forward = forward_of(ours)
        for _ in range(2):
            for batch in sampler.batches(Presamples(data, 24)):
                gradients = torch.autograd.grad(sampler.loss(forward(batch.data), batch), list(ours.parameters()))
                for p, g in zip(ours.parameters(), gradients, strict=True):
                    p.data -= 0.1 * g
        for _ in range(2):
            for x, y in Presamples(data, 24):
                for a in range(0, len(x), 8):
                    value = F.cross_entropy(plain(x[a : a + 8]), y[a : a + 8])
                    gradients = torch.autograd.grad(value, list(plain.parameters()))
                    for p, g in zip(plain.parameters(), gradients, strict=True):
                        p.data -= 0.1 * g
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)

    def run(self, sampler: ImportanceSampler, data, size: int, steps: int) -> list:
        """Train on the same model all along, so that the scores do not change."""
        batches, seen = sampler.batches(endless(Presamples(data, size))), []
        for _ in range(steps):
            batch = next(batches)
            sampler.loss(sampler.forward(batch.data), batch).backward()
            seen.append(batch)
        return seen

    def test_off_every_example_is_trained_on_and_scored_for_free(self):
        data, calls = examples(64), []
        model = network()

        def forward(d):
            calls.append(len(d[0]))
            return model(d[0])

        sampler = ImportanceSampler(forward, loss, batch_size=8, gate="auto")
        sampler._gate.variances = dict.fromkeys(sampler._gate.variances, 1e9)  # it will not switch on
        seen = torch.cat([b.indices for b in self.run(sampler, data, 64, 8)])
        assert sorted(seen.tolist()) == list(range(64))
        assert calls == [8] * 9  # eight steps, and one forward to learn what scoring costs
        next(sampler.batches([data]))  # closes nothing: the scores below are those of the finished presample
        tau2 = float(upper_bound_score(model(data[0]), data, loss).square().mean())
        tau2 /= float(upper_bound_score(model(data[0]), data, loss).mean()) ** 2
        self.run(sampler, data, 64, 9)
        assert sampler.metrics()["tau2"] == pytest.approx(tau2, rel=1e-4)

    def test_off_for_long_every_example_is_scored_and_the_gate_learns_from_eight_presamples_at_once(self):
        sampler = make_sampler(gate="auto")
        sampler._gate.updates = LEARNED_EACH
        sampler._gate.variances = dict.fromkeys(sampler._gate.variances, 1e9)
        learned = []
        learn = sampler._gate.learn
        sampler._gate.learn = lambda evidence: learned.append(evidence[0]) or learn(evidence)
        x, y = examples(384)
        presamples = list(zip(x.split(64), y.split(64), strict=True))
        for _ in range(3):  # passes of 6: short ones do not keep the gate from learning
            for batch in sampler.batches(presamples):
                sampler.loss(sampler.forward(batch.data), batch).backward()
        assert learned == [8 * 64] * 2
        assert sampler._unlearned == 2
        assert sampler.metrics()["ess"] <= 64

    def test_large_gradients_are_scored_at_once_and_the_graph_is_let_go(self):
        sampler = make_sampler(gate="auto")
        batch = next(sampler.batches([examples(64)]))
        outputs = torch.zeros(8, MANY // 4, requires_grad=True)
        sampler.loss_per_example = lambda outputs, data: outputs.sum(1)
        sampler.loss(outputs, batch).backward()
        sampler._keep_gradients()
        assert not sampler._outputs
        assert not sampler._gradients
        assert torch.allclose(sampler._scores[0], torch.full((8,), (MANY // 4) ** 0.5))

    def test_auto_switches_on_where_it_pays_and_stays_off_where_it_does_not(self):
        x, y = examples(512)
        x[1:] *= (torch.arange(511)[:, None] % 16 == 0).float() + 1e-3  # few examples carry the gradient
        model = nn.Linear(6, 3, bias=False)
        nn.init.zeros_(model.weight)

        def forward(data):
            return model(data[0])

        paying = ImportanceSampler(forward, lambda z, d: 1e3 * loss(z, d), batch_size=16, score=None)
        # equal scores at zero weights: nothing to gain
        seen = self.run(paying, (x, y), 128, 300)
        assert not any(b.drawn for b in seen)
        assert paying.rate_scale == 1.0

        skewed = ImportanceSampler(forward, lambda z, d: x_norm(d) * loss(z, d), batch_size=16)
        seen = self.run(skewed, (x, y), 128, 300)
        metrics = skewed.metrics()
        assert seen[-1].drawn and metrics["on"] == 1 and metrics["R"] < 0.9 and metrics["tau2"] > 5
        assert metrics["share_on"] > 0.3 and 0.3 < metrics["scoring_share"] < 1
        assert 1 < skewed.rate_scale <= 2

    def test_the_paper_compares_cost_with_tau(self):
        sampler = make_sampler(gate="paper")
        gate = sampler._gate
        gate.tau = 1.9
        gate.decide(3.0, 1 / 3)
        assert not gate.on  # B + 3b < 3 tau b with B = 3b: tau > 2
        gate.tau = 2.1
        gate.decide(3.0, 1 / 3)
        assert gate.on

    def test_the_ratio_minimises_r_and_changes_seldom(self):
        gate = make_sampler()._gate
        gate.variances = {1.5: 0.7, 2.0: 0.55, 3.0: 0.4, 4.0: 0.3, 6.0: 0.29, 8.0: 0.285}
        gate.decide(8.0, 1 / 12)
        assert gate.on and gate.ratio == 4.0
        gate.variances[8.0] = 0.1
        gate.decide(8.0, 1 / 12)
        assert gate.ratio == 4.0
        gate.updates += 20
        gate.decide(8.0, 1 / 12)
        assert gate.ratio == 8.0
        gate.decide(3.0, 1 / 12)  # a smaller presample: what does not fit is no choice
        assert gate.ratio == 3.0

    def test_hysteresis(self):
        gate = make_sampler()._gate
        gate.variances = dict.fromkeys(gate.variances, 0.95)
        gate.decide(4.0, 0.0)
        assert not gate.on  # R = 0.95 is not below 0.9
        gate.on = True
        gate.decide(4.0, 0.0)
        assert gate.on  # but not above 1 either

    def test_the_gate_is_constant_within_a_window_of_accumulation(self):
        sampler = make_sampler(accumulate=4, gate="auto")
        flips = iter([True, False] * 1000)
        sampler._gate.decide = lambda *_: (
            setattr(sampler._gate, "on", next(flips)) or setattr(sampler._gate, "ratio", 2.0)
        )  # type: ignore[method-assign]
        seen = [b.drawn for b in self.run(sampler, examples(160), 80, 64) if len(b.weights) == 8]
        windows = [seen[i : i + 4] for i in range(0, 64, 4)]
        assert all(len(set(w)) == 1 for w in windows)
        assert len({w[0] for w in windows}) == 2

    def test_on_each_piece_of_the_presample_gives_a_batch(self):
        sampler = make_sampler(gate="auto")
        sampler._gate.decide = lambda *_: setattr(sampler._gate, "on", True) or setattr(sampler._gate, "ratio", 3.0)  # type: ignore[method-assign]
        seen = self.run(sampler, examples(96), 96, 4)
        assert [len(b.weights) for b in seen] == [8] * 4
        assert [(int(b.indices.min()) // 24, int(b.indices.max()) // 24) for b in seen] == [(i, i) for i in range(4)]

    @pytest.mark.parametrize(("shrink", "size"), [(0.0, 16), (0.5, 8), (0.75, 6), (1.0, 4)])
    def test_on_a_gain_makes_batches_smaller(self, shrink: float, size: int):
        """A quarter of the variance: 16 examples become 16 / 4^shrink, pieces shrink along, the rate has the rest."""
        sampler = make_sampler(gate="auto", shrink=shrink, batch_size=16)
        sampler._gate.decide = lambda *_: setattr(sampler._gate, "on", True) or setattr(sampler._gate, "ratio", 4.0)  # type: ignore[method-assign]
        sampler._gate.variances[4.0] = 0.25
        steps = 192 // (4 * size)
        seen = self.run(sampler, examples(192), 192, steps)
        assert [len(b.weights) for b in seen] == [size] * steps
        pieces = [(int(b.indices.min()) // (4 * size), int(b.indices.max()) // (4 * size)) for b in seen]
        assert pieces == [(i, i) for i in range(steps)]
        sampler._gate.variances[4.0] = 0.25  # the pass has taught it something else
        assert sampler.rate_scale == pytest.approx((4 * size / 16) ** 0.5)

    def test_only_auto_draws_smaller_batches(self):
        sampler = make_sampler(gate="always", shrink=1.0)
        sampler._gate.decide(4.0, 0.1)
        sampler._gate.variances[4.0] = 0.25
        assert sampler.draw_size() == 8 and sampler.rate_scale == 2.0

    def test_a_drawn_batch_is_a_number_of_eighths_and_no_fewer_than_four(self):
        assert [drawn_size(64, v, 1.0) for v in (0.0, 0.1, 0.2, 0.49, 0.97, 1.5)] == [4, 8, 16, 32, 64, 64]
        assert [drawn_size(b, 0.01, 1.0) for b in (1, 3, 4, 8, 16, 100)] == [1, 3, 4, 4, 4, 4]
        assert drawn_size(64, 0.1, 0.0) == 64

    def test_a_last_short_presample_is_used(self):
        sampler = make_sampler(gate="always")
        sizes = [(len(b.weights), b.drawn) for b in sampler.batches(Presamples(examples(53), 24))]
        assert sizes == [(8, True), (8, True), (5, False)]

    def test_seconds_are_timed_then_frozen(self):
        sampler = make_sampler(gate="auto", cost="seconds")
        self.run(sampler, examples(256), 64, 128)
        known = dict(sampler._costs.known)
        assert set(known) == {"loading", "scoring", "training"} and all(v > 0 for v in known.values())
        self.run(sampler, examples(256), 64, 64)
        assert sampler._costs.known == known

    def test_seconds_have_loading_in_them(self):
        sampler = make_sampler(gate="auto", cost="seconds")
        self.run(sampler, examples(256), 64, 128)
        sampler._costs.known.update(loading=2.0, scoring=1.0, training=3.0)
        assert sampler.metrics()["scoring_cost"] == 0.6
        sampler._costs.known.pop("loading")
        assert isnan(sampler.metrics()["scoring_cost"])

    def test_metrics_reach_the_callback_once_a_presample(self):
        seen = []
        sampler = make_sampler(gate="always", callback=seen.append)
        self.run(sampler, examples(96), 48, 4)
        assert len(seen) == 3  # the fourth presample is still open
        assert {"tau", "ess", "largest_weight", "share_on", "scoring_share", "R"} <= set(seen[0])
        assert 1 <= seen[-1]["largest_weight"] <= 10 and seen[-1]["share_on"] == 1

    def test_metrics_may_be_read_at_any_moment(self):
        sampler = make_sampler(gate="auto", cost="seconds")
        sampler._costs.known["scoring"] = 1.0
        for batch in sampler.batches(Presamples(examples(256), 16)):
            sampler.metrics()
            sampler.loss(sampler.forward(batch.data), batch).backward()
        assert len(sampler._costs.timings["training"]) == 10 and min(sampler._costs.timings["training"]) > 1e-5

    def test_ledger_books_scoring_and_training_apart(self):
        with Ledger() as ledger:
            self.run(make_sampler(gate="always"), examples(96), 48, 4)
        per_example = 2 * (6 * 8 + 8 * 3)
        assert ledger.flops_by_phase["scoring"] == 4 * 48 * per_example
        assert ledger.flops_by_phase["training"] == 4 * 8 * (2 * per_example + 2 * 8 * 3)
        assert ledger.examples == 4 * 8


class TestTrainersView:
    """What trainers need: batches fetched before they are trained on, and states between two passes."""

    def test_batches_fetched_ahead_are_the_same_and_are_booked_in_their_steps(self):
        ends, flops = [], []
        for ahead in (False, True):
            model = network()
            sampler = make_sampler(model, gate="always", accumulate=2)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            with Ledger() as ledger:
                if ahead:
                    draws = sampler.draws(endless(Presamples(examples(96), 32)))
                    for _ in range(6):
                        for batch in [next(draws), next(draws)]:
                            with sampler.step(batch):
                                sampler.loss(sampler.forward(batch.data), batch).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                else:
                    batches = sampler.batches(endless(Presamples(examples(96), 32)))
                    for step in range(12):
                        batch = next(batches)
                        sampler.loss(sampler.forward(batch.data), batch).backward()
                        if step % 2:
                            optimizer.step()
                            optimizer.zero_grad()
            flops.append(ledger.flops_by_phase["training"])
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert flops[0] == flops[1] > 0
        assert torch.equal(ends[0], ends[1])

    @pytest.mark.parametrize("gate", ["never", "always"])
    def test_a_state_taken_between_two_passes_goes_on_with_the_next(self, gate: str):
        sampler, loader = make_sampler(gate=gate), StatefulPresamples(examples(96), 40)
        for batch in sampler.batches(loader):
            sampler.loss(sampler.forward(batch.data), batch).backward()
        state = sampler.state_dict()
        expected = list(sampler.batches(loader))
        other = make_sampler(gate=gate)
        other.load_state_dict(state)
        resumed = list(other.batches(StatefulPresamples(examples(96), 40)))
        assert len(expected) == len(resumed) > 0
        for one, two in zip(expected, resumed, strict=True):
            assert torch.equal(one.data[0], two.data[0]) and torch.equal(one.weights, two.weights)


def x_norm(data) -> torch.Tensor:
    return data[0].norm(dim=1)


class TestRateScale:
    def test_it_is_the_root_of_the_gain_while_on_and_capped(self):
        sampler = make_sampler(gate="always")
        sampler._gate.decide(4.0, 0.1)
        sampler._gate.variances[4.0] = 0.5
        assert sampler.rate_scale == pytest.approx(2**0.5)
        assert sampler.scale_of("linear") == pytest.approx(2.0)
        sampler._gate.variances[4.0] = 0.1
        assert sampler.rate_scale == 2.0 and sampler.scale_of("linear", cap=8.0) == 8.0
        sampler._gate.variances[4.0] = 1.5
        assert sampler.rate_scale == 1.0

    def test_the_optimizer_gets_its_rates_back(self):
        model = network()
        sampler = make_sampler(model, gate="always")
        sampler._gate.decide(4.0, 0.1)
        sampler._gate.variances[4.0] = 0.25
        groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
        optimizer = torch.optim.SGD(groups)
        with sampler.scaled_rate(optimizer):
            assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert [g["lr"] for g in optimizer.param_groups] == [0.1 * (i + 1) for i in range(4)]


class TestConstantVariance:
    def make(self, **options) -> ConstantVarianceSampler:
        sampler = ConstantVarianceSampler(forward_of(network()), loss, batch_size=32, gate="always", **options)
        sampler._gate.decide(4.0, 0.1)
        return sampler

    def test_it_draws_as_many_examples_as_the_variance_needs(self):
        sampler = self.make()
        sampler._gate.variances[4.0] = 0.5
        assert len(sampler.select(examples(128)).weights) == 16
        assert sampler.rate_scale == 1.0
        sampler._gate.variances[4.0] = 0.01
        assert sampler.draw_size() == 8  # the floor

    def test_a_rising_loss_brings_whole_batches_back(self):
        sampler = self.make()
        sampler._gate.variances[4.0] = 0.25
        batch = sampler.select(examples(128))
        for scale in [1.0] * 20 + [5.0] * 10:
            sampler.loss(scale * sampler.forward(batch.data), batch)
        assert sampler.guarded and sampler.draw_size() == 32

    def test_bad_guards(self):
        with pytest.raises(ValueError, match="floor is a share"):
            self.make(floor=0.0)
        with pytest.raises(ValueError, match="tolerance"):
            self.make(tolerance=0.0)

    def test_shrink_is_not_for_it(self):
        with pytest.raises(ValueError, match="leave shrink out"):
            self.make(shrink=0.5)


def unchecked(function):
    """Without the type checks that only the tests switch on, and that would catch a wrong name first."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"batch_size": 0}, "batch_size is at least 1"),
            ({"smoothing": 1.5}, "smoothing is the share"),
            ({"gate": "sometimes"}, "gate is one of auto, paper, always, never"),
            ({"cost": "joules"}, "cost is one of"),
            ({"draw": "twice"}, "draw is one of"),
            ({"accumulate": 0}, "accumulate counts"),
            ({"shrink": 1.5}, "shrink goes from 0"),
            ({"weight_exponent": 2.0}, "weight_exponent goes from 0"),
        ],
    )
    def test_arguments(self, options: dict, says: str):
        with pytest.raises(ValueError, match=says):
            unchecked(ImportanceSampler.__init__)(
                object.__new__(ImportanceSampler), forward_of(network()), loss, **options
            )

    def test_a_reduced_loss(self):
        sampler = ImportanceSampler(forward_of(network()), lambda z, d: F.cross_entropy(z, d[1]), batch_size=8)
        with pytest.raises(ValueError, match="reduction='none'"):
            sampler.select(examples(20))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scores_that_are_not_finite(self, value: float):
        data = examples(20)
        data[0][3] = value
        with pytest.raises(ValueError, match=r"examples \[3\] of 20"):
            make_sampler().select(data)

    def test_all_zero_scores_draw_uniformly(self):
        sampler = make_sampler(score=lambda z, d: torch.zeros(len(z)))
        assert sampler.select(examples(20)).weights.tolist() == pytest.approx([1.0] * 8)
        assert sampler.metrics()["tau2"] == 1.0

    def test_a_single_class_scores_zero_and_draws_uniformly(self):
        model = nn.Linear(6, 1)
        x, y = examples(20)
        sampler = ImportanceSampler(forward_of(model), loss, batch_size=8)
        assert sampler.select((x, torch.zeros_like(y))).weights.tolist() == pytest.approx([1.0] * 8)

    def test_scores_of_the_wrong_shape(self):
        with pytest.raises(ValueError, match=r"one number an example, shape \(20,\); got \(20, 3\)"):
            make_sampler(score=lambda z, d: z).select(examples(20))

    def test_the_loss_may_be_the_score_and_then_never_gates_alone(self):
        sampler = make_sampler(score=lambda z, d: loss_score(z, d, loss))
        assert sampler.select(examples(20)).drawn

    def test_a_model_out_of_sight(self):
        class Holder:
            model = network()

            def forward(self, data):
                return self.model(data[0])

        with pytest.raises(ValueError, match=r"must see the model.*model=model"):
            ImportanceSampler(Holder().forward, loss)
        ImportanceSampler(Holder().forward, loss, model=Holder.model)
