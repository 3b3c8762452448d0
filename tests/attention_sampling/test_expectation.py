"""Every estimator against enumeration: its coefficients, and the mean of its value and gradient over all draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flopwise.attention_sampling import coefficients, expectation, reference
from flopwise.attention_sampling.expectation import WITH_REPLACEMENT, Estimator, murthy

UNBIASED: tuple[Estimator, ...] = ("murthy", "des_raj", "replacement", "replacement_loo")
PEAKS = {"even": 0.3, "peaked": 3.0, "extreme": 8.0}


def problem(positions: int, peak: float, seed: int = 0):
    """logits, features and the gradient at Phi, in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = peak * torch.randn(positions, generator=g, dtype=torch.float64)
    features = torch.randn(positions, 3, generator=g, dtype=torch.float64)
    return logits, features, torch.randn(3, generator=g, dtype=torch.float64)


def estimate(estimator: Estimator, logits, features, gradient, draw):
    """The estimate of Phi from one draw and its gradients at the logits and at all features."""
    logits, features = logits.clone().requires_grad_(), features.clone().requires_grad_()
    index = torch.tensor(draw)
    value = expectation(logits.log_softmax(0)[index][None], features[index][None], estimator=estimator)[0]
    return value.detach(), *torch.autograd.grad(value @ gradient, (logits, features))


def mean_over_draws(estimator: Estimator, logits, features, gradient, n: int):
    value, at_logits, at_features = 0.0, 0.0, 0.0
    replace = estimator in WITH_REPLACEMENT
    for draw, probability in reference.draws(logits.softmax(0), n, replace=replace):
        found = estimate(estimator, logits, features, gradient, draw)
        value, at_logits, at_features = (
            total + probability * part for total, part in zip((value, at_logits, at_features), found, strict=True)
        )
    return value, at_logits, at_features


@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("positions, n", [(1, 1), (2, 1), (2, 2), (4, 1), (5, 2), (6, 3), (5, 3), (3, 3)])
@pytest.mark.parametrize("peak", PEAKS.values(), ids=PEAKS)
def test_value_and_gradient_are_unbiased(estimator: Estimator, positions: int, n: int, peak: float):
    logits, features, gradient = problem(positions, peak)
    value, at_logits, at_features = mean_over_draws(estimator, logits, features, gradient, n)
    a = logits.softmax(0)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(value, reference.expectation(a, features), **close)
    torch.testing.assert_close(at_logits, reference.attention_gradient(a, features, gradient), **close)
    torch.testing.assert_close(at_features, a[:, None] * gradient, **close)


@pytest.mark.parametrize("estimator", [*UNBIASED, "topk"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("peak", PEAKS.values(), ids=PEAKS)
def test_one_draw_is_the_reference(estimator: Estimator, n: int, peak: float):
    logits, features, gradient = problem(7, peak, seed=1)
    a = logits.softmax(0)
    drawn = (4, 0, 6, 2, 1)[:n]
    h = (features[list(drawn)] @ gradient).tolist()
    log_a = a.log()[list(drawn)][None].requires_grad_()
    f = features[list(drawn)][None].requires_grad_()
    value = expectation(log_a, f, estimator=estimator)
    at_log_a, at_f = torch.autograd.grad(value[0] @ gradient, (log_a, f))
    c = torch.tensor(reference.coefficients(estimator, a, drawn), dtype=torch.float64)
    torch.testing.assert_close(value[0], c @ features[list(drawn)], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(at_f[0], c[:, None] * gradient, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(coefficients(log_a, estimator)[0].detach(), c, rtol=1e-8, atol=1e-10)
    if estimator != "topk":
        wanted = torch.tensor(reference.log_attention_gradient(estimator, a, drawn, h), dtype=torch.float64)
        torch.testing.assert_close(at_log_a[0], wanted, rtol=1e-7, atol=1e-9)


def test_the_enumeration_notices_a_broken_gradient(monkeypatch: pytest.MonkeyPatch):
    """The authors' mistake, plain autograd through the forward, is found at once: these checks can fail."""
    logits, features, gradient = problem(5, 1.0)
    wanted = reference.attention_gradient(logits.softmax(0), features, gradient)
    total = torch.zeros_like(logits)
    for draw, probability in reference.draws(logits.softmax(0), 2, replace=False):
        x = logits.clone().requires_grad_()
        a = x.softmax(0)[list(draw)]
        c = ((1 - a.cumsum(0) + a) + torch.tensor([1, 0]) * a) / 2
        total += probability * torch.autograd.grad(c @ features[list(draw)] @ gradient, x)[0]
    assert float((total - wanted).norm() / wanted.norm()) > 0.3


@pytest.mark.parametrize("n", [10, 64, 256])
def test_the_integral_converged(n: int, monkeypatch: pytest.MonkeyPatch):
    """With half as many nodes again nothing moves."""
    g = torch.Generator().manual_seed(n)
    log_a = (4 * torch.randn(3, 5 * n, generator=g, dtype=torch.float64)).log_softmax(1)
    log_a = log_a.sort(dim=1, descending=True).values[:, :n]
    c, mixing = murthy(log_a)
    real = torch.arange

    def finer(low, high, step, **kw):
        return real(low, high, step / 1.5, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "arange", finer)
        c_finer, mixing_finer = murthy(log_a)
    torch.testing.assert_close(c, c_finer, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(mixing, mixing_finer, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("estimator", [*UNBIASED, "topk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "log_a",
    [
        [0.0, -60.0, -90.0, -200.0],  # one position holds all the mass
        [0.0, -torch.inf, -torch.inf, -torch.inf],
        [-0.6931472, -0.6931472, -torch.inf, -torch.inf],
        [-1.3862944] * 4,  # all of them sampled
        [-50.0, -52.0, -55.0, -90.0],  # nearly nothing sampled
        [-1e4, -1e4, -1e4, -1e4],
    ],
)
def test_extreme_attention_gives_finite_convex_weights(estimator: Estimator, dtype: torch.dtype, log_a: list[float]):
    log_attention = torch.tensor([log_a], dtype=dtype, requires_grad=True)
    features = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    value = expectation(log_attention, features, estimator=estimator)
    value.sum().backward()
    assert value.dtype == dtype and value.isfinite().all()
    assert log_attention.grad is not None and log_attention.grad.isfinite().all()
    assert features.grad is not None and features.grad.isfinite().all()
    c = coefficients(log_attention, estimator)
    assert (c >= 0).all() and float(c.detach().sum()) < 1.01
    if log_a[0] == 0.0 and estimator not in WITH_REPLACEMENT:
        torch.testing.assert_close(value, features[:, 0], rtol=0, atol=1e-6)


@given(st.lists(st.floats(-40, 0), min_size=2, max_size=12), st.data())
def test_murthys_weights_do_not_depend_on_the_order(logits: list[float], data: st.DataObject):
    log_a = torch.tensor(logits, dtype=torch.float64).log_softmax(0)
    n = data.draw(st.integers(1, len(logits)))
    order = data.draw(st.permutations(range(n)))
    c = coefficients(log_a[None, :n])
    torch.testing.assert_close(coefficients(log_a[None, :n][:, order]), c[:, order], rtol=1e-7, atol=1e-12)
    if n == len(logits):  # everything was read: the exact sum
        torch.testing.assert_close(c[0], log_a.exp(), rtol=1e-7, atol=1e-9)


@given(st.lists(st.floats(-40, 0), min_size=1, max_size=12))
def test_des_rajs_weights_sum_to_one(logits: list[float]):
    log_a = torch.tensor(logits, dtype=torch.float64).log_softmax(0)
    for n in range(1, len(logits) + 1):
        assert float(coefficients(log_a[None, :n], "des_raj").sum()) == pytest.approx(1)


def test_half_precision_features_lose_no_more_than_their_rounding():
    logits, features, _ = problem(8, 2.0)
    log_a, features = logits.log_softmax(0)[None, :5].float(), features[None, :5]
    wanted = expectation(log_a.double(), features)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = expectation(log_a, features.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_no_second_derivative_is_made_up():
    x = torch.zeros(2, 3).log_softmax(1).requires_grad_()
    value = expectation(x, torch.ones(2, 3, 5))
    (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
