"""The expectation over an attention distribution, estimated from sampled positions, with unbiased gradients."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Estimator = Literal["murthy", "des_raj", "replacement", "replacement_loo", "topk"]
WITH_REPLACEMENT = ("replacement", "replacement_loo")
NO_ATTENTION = -200.0  # stands for log 0 where only ratios of attentions count


def expectation(
    log_attention: Float[Tensor, "b n"], features: Float[Tensor, "b n d"], *, estimator: Estimator = "murthy"
) -> Float[Tensor, "b d"]:
    """Phi ~ sum_i c_i f_i, an unbiased estimate of sum_i a_i f_i over all K positions, from n sampled ones.

    With h_i = dL/dPhi . f_i, the gradient for f_i is c_i dL/dPhi, and the one for log a_i is

        estimator           drawn                  c_i                              d L / d log a_i
        murthy              without replacement    a_i R_i                          c_i (h_i - sum_j R_ij a_j h_j)
        des_raj             without, in order      (pm_i + (n-1-i) a_i) / n         c_i h_i
        replacement         with replacement       1 / n                            c_i h_i
        replacement_loo     with replacement       1 / n                            c_i (h_i - mean_{j != i} h_j)
        topk                largest n              a_i / sum_j a_j                  plain autograd: biased

    R_i = P(S | i drawn first) / P(S), R_ij likewise for j after i (R_ii = 1), pm_i = 1 - a_0 - ... - a_{i-1}. With
    n = 1 there are no others to subtract, and the gradient is c_i h_i. All but the last are unbiased in value and
    gradient, given that log a is normalised over all K positions *before* it is gathered (`log_softmax`). Least
    variance: murthy.

    Args:
        log_attention: log a at the samples, (B, n), in the order they were drawn; -inf is attention 0.
        features: f at the samples, (B, n, D). Half precision is summed in float32.
        estimator: must match the way the positions were drawn.

    Returns:
        (B, D), in the dtype of `features`.

    Raises:
        ValueError: shapes disagree, or the estimator is unknown.

    Source: Katharopoulos & Fleuret, ICML 2019; Des Raj 1956; Murthy 1957; Kool, van Hoof & Welling, ICLR 2020.
    Departs from the first: their gradient without replacement is biased (by 60-120 %, enumerated).
    """
    if features.ndim != 3 or log_attention.shape != features.shape[:2]:
        raise ValueError(
            "log_attention is (B, n) and features are (B, n, D), one row for each sampled position; "
            f"got {tuple(log_attention.shape)} and {tuple(features.shape)}. "
            "Gather the attention at the sampled positions: log_attention.gather(1, indices)."
        )
    if estimator == "topk":
        weights = coefficients(log_attention, estimator)
        return (weights[:, :, None].to(features.dtype) * features).sum(1)
    c, mixing = _coefficients_and_mixing(log_attention, estimator)
    return _Expectation.apply(log_attention, features, c, mixing)


def coefficients(log_attention: Float[Tensor, "b n"], estimator: Estimator = "murthy") -> Float[Tensor, "b n"]:
    """c_i, the weight of each sampled position in `expectation`, in the dtype of `log_attention` (float32 at least)."""
    if estimator == "topk":
        at_least_one = log_attention.clamp(min=torch.finfo(log_attention.dtype).min)  # all 0: equal weights, not NaN
        return at_least_one.softmax(-1, dtype=_at_least_float32(log_attention.dtype))
    return _coefficients_and_mixing(log_attention, estimator, second_order=False)[0]


class _Expectation(torch.autograd.Function):
    """sum_i c_i f_i forwards; backwards the gradients that `expectation` states, c and mixing held fixed."""

    @staticmethod
    def forward(
        ctx, log_attention: Tensor, features: Tensor, c: Float[Tensor, "b n"], mixing: Float[Tensor, "b n n"] | None
    ) -> Tensor:
        ctx.save_for_backward(features, c, mixing)
        ctx.log_dtype = log_attention.dtype
        return (c[:, :, None] * features).sum(1).to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        features, c, mixing = ctx.saved_tensors
        gradient = gradient.to(c.dtype)
        h = (features * gradient[:, None]).sum(-1)
        if mixing is not None:
            h = (mixing * h[:, None]).sum(-1)
        log_attention_gradient = torch.where(c > 0, c * h, 0.0)
        return (
            log_attention_gradient.to(ctx.log_dtype),
            (c[:, :, None] * gradient[:, None]).to(features.dtype),
            None,
            None,
        )


@torch.no_grad()
def _coefficients_and_mixing(
    log_attention: Float[Tensor, "b n"], estimator: Estimator, second_order: bool = True
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n n"] | None]:
    """c, and the matrix M with d L / d log a_i = c_i sum_j M_ij h_j; None for the identity."""
    n, dtype = log_attention.shape[1], _at_least_float32(log_attention.dtype)
    if estimator == "murthy":
        c, mixing = murthy(log_attention, second_order=second_order and n > 1)
        return c.to(dtype), None if mixing is None else mixing.to(dtype)
    if estimator == "des_raj":
        a = log_attention.double().exp()
        left = (1 - a.cumsum(1) + a).clamp(min=0)
        after = torch.arange(n - 1, -1, -1, device=a.device)
        return ((left + after * a) / n).to(dtype), None
    if estimator in WITH_REPLACEMENT:
        c = torch.full_like(log_attention, 1 / n, dtype=dtype)
        if estimator == "replacement" or n == 1:
            return c, None
        identity = torch.eye(n, dtype=dtype, device=c.device)
        return c, (identity - (1 - identity) / (n - 1)).expand(len(c), n, n)
    raise ValueError(f"estimator is one of {', '.join(get_args(Estimator))}; got {estimator!r}.")


def murthy(
    log_attention: Float[Tensor, "b n"], *, second_order: bool = True
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n n"] | None]:
    """Murthy's c_i = a_i R_i and M_ij = [i = j] - R_ij a_j, in float64.

    A set is drawn when all its exponential times are below the first of the others, which come at rate A = 1 - sum_S a:

        P(S) = integral over t > 0 of A exp(-A t) prod_{s in S} (1 - exp(-a_s t)),

    and a member that was drawn first drops its factor. In x = log(A t) the integrand is analytic and falls off at both
    ends, so that the trapezoidal rule converges exponentially: the nodes below leave an error of some 1e-11. Everything
    is a ratio of such integrals, taken under one set of normalised weights: all the mass on one position, all of it
    sampled (A = 0) and positions without any are limits that need no case of their own.
    """
    n = log_attention.shape[1]
    step, low, high = 0.8 / math.sqrt(n + 8), -32.0, math.log(n + 8 * math.sqrt(n) + 50)
    x = torch.arange(low, high, step, dtype=torch.float64, device=log_attention.device)
    log_a = log_attention.double()
    rest = (1 - log_a.exp().sum(1, keepdim=True)).clamp(min=1e-30)
    log_rates = log_a.clamp(min=NO_ATTENTION) - rest.log()
    arrived = -torch.expm1(-(log_rates[:, :, None] + x).exp())  # 1 - exp(-a_s t), (B, n, nodes), above 0
    log_weights = x - x.exp() + arrived.log().sum(1)
    weights = log_weights.softmax(-1)
    inverse = 1 / arrived
    first = (inverse @ weights[:, :, None])[:, :, 0]  # R_i
    c = (log_a + first.log()).exp()
    if not second_order:
        return c, None
    both = (inverse * weights[:, None]) @ inverse.mT / first[:, :, None]  # R_ij
    identity = torch.eye(n, dtype=torch.bool, device=c.device)
    return c, identity.double() - both.masked_fill(identity, 1.0) * log_a.exp()[:, None]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
