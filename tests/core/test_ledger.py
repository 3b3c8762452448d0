"""The ledger against hand formulas: once per signature, then replayed, forward and backward."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flopwise import Budget, Ledger, endless
from flopwise.core.ledger import active_ledger


def spent_by(work) -> int:
    with Ledger() as ledger:
        work()
    return ledger.flops


# Every operation that the experiments use, and every one for which torch has no formula.
B, T, S, D, H, E = 3, 7, 5, 8, 2, 4


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


class TestHandFormulas:
    def test_linear_forward_and_backward(self):
        layer = nn.Linear(D, E)
        assert spent_by(lambda: layer(leaf(B, D))) == 2 * B * D * E
        assert spent_by(lambda: layer(leaf(B, D)).sum().backward()) == 3 * 2 * B * D * E
        data = torch.randn(B, D)  # needs no gradient: one of the two backward products is not done
        assert spent_by(lambda: layer(data).sum().backward()) == 2 * 2 * B * D * E

    @pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 2), (3, 0)])
    def test_convolution_forward_and_backward(self, stride: int, padding: int):
        layer = nn.Conv2d(2, 4, 5, stride=stride, padding=padding)
        x = leaf(B, 2, 12, 12)
        side = layer(x).shape[-1]
        forward = 2 * B * side**2 * 4 * 2 * 25
        assert spent_by(lambda: layer(x)) == forward
        assert spent_by(lambda: layer(x).sum().backward()) == 3 * forward
        assert spent_by(lambda: layer(x.detach()).sum().backward()) == 2 * forward  # no gradient of the input

    @pytest.mark.parametrize("groups", [2, 6])
    def test_a_grouped_convolution_costs_its_groups(self, groups: int):
        layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
        x = leaf(B, 6, 8, 8)
        assert spent_by(lambda: layer(x).sum().backward()) == 3 * 2 * B * 8 * 8 * 6 * (6 // groups) * 9

    def test_transposed_convolution(self):
        layer = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        x = leaf(B, 6, 8, 8)
        forward = 2 * B * 8 * 8 * 6 * 2 * 9
        assert spent_by(lambda: layer(x)) == forward
        assert spent_by(lambda: layer(x).sum().backward()) == 3 * forward

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("key_heads", [1, 2])
    def test_attention_on_the_cpu_which_torch_counts_as_zero(self, causal: bool, key_heads: int):
        q, k, v = leaf(B, H, T, E), leaf(B, key_heads, T, E), leaf(B, key_heads, T, E)

        def attend():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=key_heads != H)

        forward = 2 * B * H * T * T * (E + E)
        assert spent_by(attend) == forward
        assert spent_by(lambda: attend().sum().backward()) == forward + forward * 5 // 2

    def test_fused_encoder_layer(self):
        layer = nn.TransformerEncoderLayer(D, H, dim_feedforward=11, batch_first=True, dropout=0.0)
        x = torch.randn(B, T, D)
        products = 2 * B * T * (4 * D * D + 2 * D * 11)
        attention = 2 * B * T * T * 2 * D
        assert spent_by(lambda: layer(x)) == products + attention
        layer.eval()
        with torch.no_grad():
            assert spent_by(lambda: layer(x)) == products + attention

    def test_fused_multi_head_attention(self):
        layer = nn.MultiheadAttention(D, H, batch_first=True).eval()
        x = torch.randn(B, T, D)
        with torch.no_grad():
            assert spent_by(lambda: layer(x, x, x)) == 2 * B * T * 4 * D * D + 2 * B * T * T * 2 * D

    def test_matrix_vector_products(self):
        assert spent_by(lambda: torch.randn(D, E) @ torch.randn(E)) == 2 * D * E
        assert spent_by(lambda: torch.randn(E) @ torch.randn(E)) == 2 * E

    def test_an_operation_without_a_formula_is_an_error_not_a_zero(self):
        lstm = nn.LSTM(D, E)
        with pytest.raises(NotImplementedError, match=r"no FLOP formula.*register_flop_formula"), Ledger():
            lstm(torch.randn(T, B, D))
        assert active_ledger() is None

    def test_autocast_counts_alike(self):
        layer, x = nn.Linear(D, E), leaf(B, D)

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                layer(x).sum().backward()

        assert spent_by(step) == 3 * 2 * B * D * E


def test_counted_once_per_signature_then_replayed():
    layer = nn.Linear(D, E)
    batches = [torch.randn(n, D) for n in (4, 4, 2, 4, 2)]
    bodies = 0
    with Ledger() as ledger:
        for x in ledger.batches(batches):
            modes_before = torch._C._len_torch_dispatch_stack()
            bodies += modes_before > 0
            layer(x).sum().backward()
    assert bodies == 2  # the first batch of 4 and the first batch of 2
    assert ledger.flops_by_phase["training"] == ledger.flops == sum(2 * 2 * len(x) * D * E for x in batches)
    assert ledger.examples == 16


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Mish(), nn.GELU(), nn.Softplus()], ids=lambda layer: str(layer))
def test_a_counted_step_computes_what_a_replayed_one_does(activation: nn.Module, generator: torch.Generator):
    """To the last bit: a resumed run counts at another step."""
    x = torch.randn(33, D, generator=generator, requires_grad=True)
    gradients = []
    with Ledger() as ledger:
        for data in itertools.islice(ledger.batches(endless([x])), 2):
            gradients += torch.autograd.grad(activation(data).square().sum(), data)
    assert torch.equal(*gradients)


def test_the_budget_is_spent_while_the_last_step_is_still_open():
    layer = nn.Linear(D, E)
    step = 2 * 2 * 4 * D * E
    budget, ledger, steps = Budget(flops=5 * step), Ledger(), 0
    batches = ledger.batches(endless([torch.randn(4, D)]))
    with ledger:
        while not budget.spent(ledger):
            layer(next(batches)).sum().backward()
            steps += 1
            assert budget.share(ledger) == pytest.approx(steps / 5)
    assert steps == 5
    assert ledger.flops == 5 * step


def test_a_step_left_half_way_is_no_measure():
    layer, x = nn.Linear(D, E), torch.randn(4, D)
    ledger = Ledger()
    with ledger:
        for data in ledger.batches([x]):
            layer(data)
            break
        for data in ledger.batches([x]):
            layer(data).sum().backward()
    assert ledger.flops == (1 + 2) * 2 * 4 * D * E


def test_pauses_cost_nothing():
    layer, x = nn.Linear(D, E), torch.randn(4, D)
    ledger = Ledger()
    with ledger:
        for data in ledger.batches([x, x]):
            layer(data)
            with ledger.paused():
                layer(torch.randn(100, D))
                for probe in ledger.batches(torch.randn(n, D) @ torch.randn(D, D) for n in (50, 50)):
                    layer(probe).sum().backward()
        seconds = ledger.seconds
        with ledger.paused():
            torch.mm(torch.randn(400, 400), torch.randn(400, 400))
            assert ledger.seconds == pytest.approx(seconds, abs=2e-3)
    assert ledger.flops == 2 * 2 * 4 * D * E and ledger.examples == 8


def test_what_the_loader_spends_is_loading():
    matrix = torch.randn(D, D)
    ledger = Ledger()
    with ledger:
        for _ in ledger.batches(torch.randn(n, D) @ matrix for n in (4, 4, 2)):
            pass
    assert ledger.flops_by_phase["loading"] == 2 * (4 + 4 + 2) * D * D
    assert ledger.flops_by_phase["training"] == 0


def test_resumed_costs_are_booked_at_the_same_moment():
    layer, x = nn.Linear(D, E), torch.randn(4, D)

    def shares(ledger: Ledger) -> list[int]:
        seen = []
        for data in ledger.batches([x, x]):
            seen.append(ledger.flops)
            layer(data).sum().backward()
        return seen

    with Ledger() as whole:
        first, second = shares(whole)[1], shares(whole)
    with Ledger() as part:
        shares(part)
        state = part.state_dict()
    resumed = Ledger()
    resumed.load_state_dict(state)
    with resumed:
        assert shares(resumed) == second
    assert first < second[0]


def test_a_generator_that_outlives_its_ledger_does_no_harm():
    ledger = Ledger()
    batches = ledger.batches([torch.randn(2, D)] * 2)
    with ledger:
        next(batches)
    assert torch._C._len_torch_dispatch_stack() == 0
    batches.close()  # type: ignore[attr-defined]
    with ledger:
        torch.mm(torch.randn(D, D), torch.randn(D, D))
    assert ledger.flops == 2 * D**3


def test_interleaved_loops_are_an_error():
    one, other = Ledger(), Ledger()
    with pytest.raises(RuntimeError, match="whose FLOPs are whose"):
        for _ in zip(one.batches([torch.randn(2, D)] * 2), other.batches([torch.randn(2, D)] * 2), strict=True):
            pass
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_loop_that_an_exception_left_open_does_not_go_on_counting():
    """In a notebook the traceback keeps the loop alive, and with it the counter of its first step."""
    layer, x = nn.Linear(D, E), torch.randn(4, D)
    left_open = Ledger().batches([x])
    next(left_open)
    assert torch._C._len_torch_dispatch_stack() == 2
    ledger = Ledger()
    for data in ledger.batches([x, x]):
        layer(data).sum().backward()
    assert ledger.flops == 2 * 2 * 2 * 4 * D * E
    assert torch._C._len_torch_dispatch_stack() == 0
    left_open.close()  # type: ignore[attr-defined]


def test_entering_twice_and_nesting_are_errors():
    ledger = Ledger()
    with ledger:
        with pytest.raises(RuntimeError, match="already counting"):
            ledger.__enter__()
        with pytest.raises(RuntimeError, match="another Ledger"):
            Ledger().__enter__()
    with ledger:  # and it may be entered again
        pass


def test_recount_after_the_cost_has_changed():
    layer, x = nn.Linear(D, E), torch.randn(4, D)
    ledger = Ledger()
    with ledger:
        for data in itertools.islice(ledger.batches(endless([x])), 2):
            layer(data)
        ledger.recount()
        for data in ledger.batches([x]):
            layer(data).sum().backward()
    assert ledger.flops == (1 + 1 + 2) * 2 * 4 * D * E


class TestBudget:
    @pytest.mark.parametrize("limits", [{}, {"flops": 1.0, "seconds": 1.0}])
    def test_exactly_one_limit(self, limits: dict):
        with pytest.raises(ValueError, match="exactly one of flops, seconds and examples"):
            Budget(**limits)

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
    def test_above_zero(self, value: float):
        with pytest.raises(ValueError, match="above zero"):
            Budget(flops=value)

    def test_seconds_and_examples(self):
        ledger = Ledger()
        with ledger:
            for _ in ledger.batches([torch.randn(6, 1)]):
                pass
        assert Budget(examples=12).share(ledger) == 0.5
        assert 0 < Budget(seconds=100).share(ledger) < 1
        assert Budget(examples=6).spent(ledger)
