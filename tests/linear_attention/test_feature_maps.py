"""Feature maps: what they compute, what they approximate, and that their draws are kept."""

import copy

import pytest
import torch

from flopwise.linear_attention import (
    Favor,
    GeneralizedRandomFeatures,
    Hedgehog,
    LinearAttention,
    RandomFourierFeatures,
    SmoothedRandomFourierFeatures,
    feature_width,
    linear_attention,
)
from flopwise.linear_attention import feature_maps as maps

RANDOM = (RandomFourierFeatures, SmoothedRandomFourierFeatures, Favor, GeneralizedRandomFeatures)


def test_named_maps(generator):
    x = torch.randn(2, 3, 10, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(maps.elu(x), torch.nn.functional.elu(x) + 1)
    assert (maps.squared_relu(x) == x.clamp(min=0) ** 2).all() and maps.identity(x) is x
    y = torch.randn(2, 3, 10, 6, generator=generator, dtype=torch.float64)
    s = (x * y).sum(-1) / 6**0.5
    torch.testing.assert_close((maps.taylor2(x) * maps.taylor2(y)).sum(-1), 1 + s + s**2 / 2)
    for name, width in {"elu": 6, "relu": 6, "squared_relu": 6, "taylor2": 43, "identity": 6}.items():
        assert feature_width(name, 6) == width == maps.features_of(name, x).shape[-1]


def test_elu_keeps_small_features_and_its_slope_at_zero():
    x = torch.tensor([-50.0, -torch.inf, 0.0], requires_grad=True)
    features = maps.elu(x)
    assert features.tolist() == [torch.tensor(-50.0).exp().item(), 0.0, 1.0]
    assert torch.autograd.grad(features.sum(), x)[0].tolist() == [features[0].item(), 0.0, 1.0]


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", [RandomFourierFeatures, SmoothedRandomFourierFeatures, Favor])
def test_products_of_random_features_are_the_kernel_in_the_mean(kind, orthogonal, generator):
    """256 draws of 64: the mean lies within five standard errors, for values and for gradients."""
    query, key = (torch.randn(20, 8, generator=generator) for _ in range(2))
    query.requires_grad_()
    scaled_query, scaled_key = query * 8**-0.25, key * 8**-0.25
    if kind is Favor:
        exact = (scaled_query * scaled_key).sum(-1).exp()
    else:
        exact = (-(scaled_query - scaled_key).square().sum(-1) / 2).exp()
        exact = exact + (1.0 if kind is SmoothedRandomFourierFeatures else 0.0)
    (slope,) = torch.autograd.grad(exact.sum(), query)
    values, slopes = [], []
    for _ in range(256):
        feature_map = kind(8, 64, orthogonal=orthogonal, generator=generator)
        estimate = (feature_map(query) * feature_map(key)).sum(-1)
        values.append(estimate.detach())
        slopes.append(torch.autograd.grad(estimate.sum(), query)[0])
    for samples, truth in ((values, exact.detach()), (slopes, slope)):
        samples = torch.stack(samples)
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - truth).abs() <= 5 * error + 1e-6).all()


def test_orthogonal_draws_have_less_variance(generator):
    query, key = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)

    def spread(orthogonal):
        drawn = [RandomFourierFeatures(8, 32, orthogonal=orthogonal, generator=generator) for _ in range(100)]
        return torch.stack([(f(query) * f(key)).sum(-1) for f in drawn]).var(0).mean()

    assert spread(True) < spread(False)
    omega = Favor(8, 20, generator=generator).omega
    gram = omega[:, :8].T @ omega[:, :8]
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", RANDOM)
def test_draws_come_from_the_generator_and_stay(kind, generator):
    def seeded(seed):
        return kind(8, 16, generator=torch.Generator().manual_seed(seed))

    one, same, other = seeded(1), seeded(1), seeded(2)
    x = torch.randn(3, 8, generator=generator)
    assert (one(x) == same(x)).all() and (one(x) != other(x)).any()
    assert (copy.deepcopy(one)(x) == one(x)).all()
    other.load_state_dict(one.state_dict())
    assert (other(x) == one(x)).all()
    other.redraw(torch.Generator().manual_seed(3))
    assert (other(x) != one(x)).any()
    before = torch.random.get_rng_state()
    seeded(4)
    assert (torch.random.get_rng_state() == before).all()


@pytest.mark.parametrize("kind", RANDOM)
def test_random_maps_in_attention_and_in_a_module(kind, backend, generator):
    feature_map = kind(8, 16, generator=generator)
    query, key, value = (torch.randn(2, h, 50, 8, generator=generator) for h in (4, 2, 2))
    out = linear_attention(query, key, value, causal=True, feature_map=feature_map, backend=backend)
    features = feature_map(query), feature_map(key)
    torch.testing.assert_close(
        out, linear_attention(*features, value, causal=True, feature_map="identity", backend=backend)
    )
    module = LinearAttention(32, 4, feature_map=feature_map)
    assert "feature_map.omega" in module.state_dict()
    assert feature_width(feature_map, 8) == features[0].shape[-1] == module.init_state(1).memory.shape[2]


def test_generalized_features_are_kernel_of_projection(generator):
    feature_map = GeneralizedRandomFeatures(8, 16, kernel=torch.cos, epsilon=0.1, generator=generator)
    x = torch.randn(3, 8, generator=generator)
    torch.testing.assert_close(feature_map(x), ((x @ feature_map.omega).cos() + 0.1) / 4)


def test_hedgehog_learns_one_map_a_key_head(generator):
    """From the identity to the attention of softmax, on random inputs: the divergence falls by a third."""
    query, key = (torch.randn(8, heads, 20, 6, generator=generator) for heads in (4, 2))
    each = torch.eye(20).expand(8, 2, 20, 20)  # as values: the output is the attention
    target = torch.nn.functional.scaled_dot_product_attention(query, key, each, enable_gqa=True)
    hedgehog = Hedgehog(2, 6)
    assert feature_width(hedgehog, 6) == 12
    torch.testing.assert_close(hedgehog(query)[..., :6], query.softmax(-1))
    optimizer = torch.optim.Adam(hedgehog.parameters(), 0.1)
    losses = []
    for _ in range(40):
        attention = linear_attention(query, key, each, feature_map=hedgehog, backend="torch")
        loss = -(target * attention.log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    entropy = -(target * target.log()).sum(-1).mean().item()
    assert losses[-1] - entropy < (losses[0] - entropy) * 2 / 3


def test_what_does_not_fit_is_refused(generator):
    with pytest.raises(ValueError, match=r"feature_map is one of elu, relu, .*or a function.*got 'softmax'"):
        maps.features_of("softmax", torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"made for width 8; got \(1, 1, 3, 6\)"):
        Favor(8, generator=generator)(torch.ones(1, 1, 3, 6))
    with pytest.raises(ValueError, match=r"made for 2 key heads, or a multiple; got \(1, 3, 3, 6\)"):
        Hedgehog(2, 6)(torch.ones(1, 3, 3, 6))
