"""Both draws against enumerated probabilities, and the noise that needs no state."""

from collections import Counter

import pytest
import torch

from flopwise.attention_sampling import reference, sample, topk
from flopwise.attention_sampling.sampling import draw, uniforms

A = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64)
DRAWS = 40_000


def deviations(found: Counter, expected: list[tuple[tuple[int, ...], float]]) -> float:
    """By how many of its standard deviations chi-square exceeds its mean, the degrees of freedom."""
    total, freedom = sum(found.values()), len(expected) - 1
    chi_square = sum((found[d] - total * p) ** 2 / (total * p) for d, p in expected)
    return (chi_square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_draws_have_their_probabilities_in_draw_order(replace: bool, n: int, dtype, generator: torch.Generator):
    rows = sample(A.log().to(dtype).expand(DRAWS, 4), n, replace=replace, generator=generator)
    expected = reference.draws(A, n, replace=replace)
    assert deviations(Counter(map(tuple, rows.tolist())), expected) < 4


@pytest.mark.parametrize("replace", [False, True])
def test_noise_from_the_attentions_own_bits_is_as_good(replace: bool, generator: torch.Generator):
    """Rows that differ in their last bits, as after an optimizer step, or not at all."""
    for jitter in (1e-6, 0.0):
        logits = A.log().float() + jitter * torch.randn(DRAWS, 4, generator=generator)
        log_a = logits.log_softmax(1)
        rows = draw(log_a, 2, uniforms(log_a, 2 if replace else 4, seed=0), replace=replace)
        assert deviations(Counter(map(tuple, rows.tolist())), reference.draws(A, 2, replace=replace)) < 4


def test_the_noise_is_uniform_and_uncorrelated(generator: torch.Generator):
    log_a = torch.randn(200, 5000, generator=generator).log_softmax(1)
    u = uniforms(log_a, 5000, seed=0)
    assert float(u.min()) >= 0 and float(u.max()) <= 1
    histogram = torch.histc(u, 1000, 0, 1)
    assert float(((histogram - 1000) ** 2 / 1000).mean()) == pytest.approx(1, abs=0.15)
    z = (u - 0.5) * 12**0.5
    limit = 5 / u.numel() ** 0.5
    assert abs(float(z.mean())) < limit and abs(float(z.square().mean()) - 1) < limit
    assert abs(float((z[:, 1:] * z[:, :-1]).mean())) < limit  # neighbours
    assert abs(float((z[1:] * z[:-1]).mean())) < limit  # rows
    again = uniforms(log_a, 5000, seed=1)
    assert abs(float((z * (again - 0.5) * 12**0.5).mean())) < limit  # seeds
    same = log_a[:1].expand(200, -1)
    one, other = uniforms(same, 5000, seed=3), uniforms(same, 5000, seed=4)
    assert not (one[1:] == other[:-1]).any(1).all()  # the next row of a seed is no row of the next seed
    assert abs(float((z * log_a).mean() - z.mean() * log_a.mean())) < limit  # the attention itself
    assert torch.equal(u, uniforms(log_a.clone(), 5000, seed=0))


def test_no_attention_is_drawn_last_or_never(generator: torch.Generator):
    log_a = torch.tensor([[-torch.inf, 0.0, -torch.inf, -1.0, -torch.inf]]).log_softmax(1).expand(500, 5)
    without = sample(log_a, 3, generator=generator)
    assert set(without[:, :2].flatten().tolist()) == {1, 3}
    assert all(len(set(row)) == 3 for row in without.tolist())
    assert set(sample(log_a, 9, replace=True, generator=generator).flatten().tolist()) == {1, 3}
    certain = draw(log_a, 1, torch.ones(500, 1), replace=True)
    assert set(certain.flatten().tolist()) == {3}
    assert not draw(log_a, 2, torch.ones(500, 5), replace=False).equal(torch.zeros(500, 2))


def test_a_seeded_draw_repeats():
    log_a = torch.zeros(3, 50).log_softmax(1)
    draws = [sample(log_a, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_topk_is_the_largest_first():
    assert topk(A[None].log(), 3).tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("n", [0, 5, -1])
def test_a_draw_that_cannot_be_is_explained(n: int):
    with pytest.raises(ValueError, match=rf"between 1 and K.*got n = {n} of K = 4"):
        sample(A.log()[None], n)
    with pytest.raises(ValueError, match="between 1 and K"):
        topk(A.log()[None], n)
