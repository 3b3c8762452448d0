"""Break the estimator in the ways people do, and see the named check fail: the checks can be trusted."""

import checks
import pytest
import torch

from flopwise.importance_sampling import draw, sampler


def drop_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = draw.draw_without_replacement

    def mutant(p, draws, generator):
        indices, weights = real(p, draws, generator)
        return indices, torch.ones_like(weights)

    monkeypatch.setattr(sampler, "draw_without_replacement", mutant)


def weigh_by_p_as_if_nothing_were_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = draw.draw_without_replacement

    def mutant(p, draws, generator):
        indices, _ = real(p, draws, generator)
        return indices, 1 / (len(p) * p[indices])

    monkeypatch.setattr(sampler, "draw_without_replacement", mutant)


def divide_by_the_drawn_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sampler.ImportanceSampler.loss

    def mutant(self, outputs, batch):
        object.__setattr__(batch, "positions", float(batch.data["mask"].sum() / len(batch.weights)))
        return real(self, outputs, batch)

    monkeypatch.setattr(sampler.ImportanceSampler, "loss", mutant)


MUTATIONS = [
    (drop_the_weights, checks.weighted_gradient_is_unbiased),
    (weigh_by_p_as_if_nothing_were_capped, checks.certain_examples_are_weighted_by_their_inclusion_probability),
    (divide_by_the_drawn_tokens, checks.token_losses_are_unbiased),
]


@pytest.mark.parametrize(("mutate", "check"), MUTATIONS, ids=lambda f: f.__name__)
def test_a_mutation_fails_its_check(mutate, check, monkeypatch: pytest.MonkeyPatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
