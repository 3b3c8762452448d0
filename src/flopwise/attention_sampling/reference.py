"""The method as the papers write it: every draw enumerated, one at a time. The tests hold everything else to it."""

from itertools import permutations, product

import torch
from torch import Tensor

Draw = tuple[int, ...]  # positions, in the order they were drawn


def expectation(attention: Tensor, features: Tensor) -> Tensor:
    """Phi = sum_i a_i f_i over every position (Katharopoulos & Fleuret 2019, equation 3)."""
    return sum((a * f for a, f in zip(attention, features, strict=True)), torch.zeros_like(features[0]))


def attention_gradient(attention: Tensor, features: Tensor, gradient: Tensor) -> Tensor:
    """d L / d logits of a = softmax(logits): a_i (h_i - sum_j a_j h_j), h_i = gradient . f_i."""
    h = [float(gradient @ f) for f in features]
    mean = sum(float(a) * x for a, x in zip(attention, h, strict=True))
    return torch.tensor([float(a) * (x - mean) for a, x in zip(attention, h, strict=True)], dtype=attention.dtype)


def draws(attention: Tensor, n: int, *, replace: bool) -> list[tuple[Draw, float]]:
    """Every ordered draw of n positions, with its probability."""
    a = attention.tolist()
    if replace:
        return [(draw, _product(a[i] for i in draw)) for draw in product(range(len(a)), repeat=n)]
    return [(draw, probability_of_order(a, draw)) for draw in permutations(range(len(a)), n)]


def probability_of_order(a: list[float], draw: Draw, first: Draw = ()) -> float:
    """One after another, each in proportion to its attention among those left; `first` were drawn before."""
    left = [i for i in range(len(a)) if i not in first]
    probability = 1.0
    for i in draw:
        probability *= a[i] / sum(a[j] for j in left)
        left.remove(i)
    return probability


def probability_of_set(a: list[float], members: Draw, first: Draw = ()) -> float:
    """P(S), the sum over the orders in which S may be drawn; with `first`, given that those were drawn first."""
    rest = [i for i in members if i not in first]
    return sum(probability_of_order(a, order, first) for order in permutations(rest))


def coefficients(estimator: str, attention: Tensor, draw: Draw) -> list[float]:
    """c_i for every drawn position: the estimate of Phi is sum_i c_i f_i."""
    a, n = attention.tolist(), len(draw)
    if estimator in ("replacement", "replacement_loo"):
        return [1 / n for _ in draw]
    if estimator == "topk":
        return [a[i] / sum(a[j] for j in draw) for i in draw]
    if estimator == "des_raj":  # the mean of n estimates, the i-th of which uses draws 0 to i (Des Raj 1956)
        c = [0.0] * n
        for i in range(n):
            for j in range(i):
                c[j] += a[draw[j]] / n
            c[i] += (1 - sum(a[j] for j in draw[:i])) / n
        return c
    if estimator == "murthy":  # Des Raj's averaged over the orders of the set (Murthy 1957)
        whole = probability_of_set(a, draw)
        return [a[i] * probability_of_set(a, draw, first=(i,)) / whole for i in draw]
    raise ValueError(estimator)


def log_attention_gradient(estimator: str, attention: Tensor, draw: Draw, h: list[float]) -> list[float]:
    """d L / d log a_i for every drawn position, from h_i = dL/dPhi . f_i.

    c_i h_i is unbiased whenever c is: dL/d logits = sum_i a_i (h_i dlog a_i) is an expectation of the same kind. Since
    sum_i a_i dlog a_i = 0, a baseline that does not depend on i's own draw leaves it so (Kool et al. 2020).
    """
    a, n = attention.tolist(), len(draw)
    c = coefficients(estimator, attention, draw)
    if estimator == "replacement_loo" and n > 1:
        return [c[i] * (h[i] - (sum(h) - h[i]) / (n - 1)) for i in range(n)]
    if estimator == "murthy" and n > 1:  # alone, a draw has no other to be compared with
        found = []
        for i in range(n):
            given_i = probability_of_set(a, draw, first=(draw[i],))
            baseline = a[draw[i]] * h[i]
            for j in range(n):
                if j != i:
                    given_both = probability_of_set(a, draw, first=(draw[i], draw[j]))
                    baseline += given_both / given_i * a[draw[j]] * h[j]
            found.append(c[i] * (h[i] - baseline))
        return found
    return [c[i] * h[i] for i in range(n)]


def _product(numbers) -> float:
    result = 1.0
    for x in numbers:
        result *= x
    return result
