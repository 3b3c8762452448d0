"""The layer: what it reads, that its estimate is unbiased through the whole network, and every kind of image."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flopwise.attention_sampling import AttentionSampling, Glimpse, ReceptiveField, reference
from flopwise.attention_sampling.expectation import WITH_REPLACEMENT, Estimator
from flopwise.attention_sampling.module import _Images

SCALE = 4
ESTIMATORS: tuple[Estimator, ...] = ("murthy", "des_raj", "replacement", "replacement_loo")


class Feature(nn.Module):
    """Smooth, small, and different for every patch."""

    def __init__(self, channels: int = 1, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, width, 3)
        self.calls: list[int] = []

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(patches))
        return self.layer(patches).sin().mean((2, 3))


@dataclass
class Level:
    height: int
    width: int
    downsample: float


class Lazy:
    """An image of someone else: levels and `read`, nothing more."""

    def __init__(self, pixels: torch.Tensor, levels: int = 1) -> None:
        self.pyramid = [pixels if d == 0 else F.avg_pool2d(pixels, 2**d) for d in range(levels)]
        self.levels = [Level(p.shape[1], p.shape[2], 2.0**d) for d, p in enumerate(self.pyramid)]
        self.reads: list[tuple[int, ...]] = []

    def read(self, level: int, y: int, x: int, height: int, width: int) -> torch.Tensor:
        self.reads.append((level, height, width))
        padded = F.pad(self.pyramid[level], (100,) * 4)
        return padded[:, y + 100 : y + 100 + height, x + 100 : x + 100 + width]


def attention(channels: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 2, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(2, 1, 1))


def randomised(module: AttentionSampling, seed: int = 0, scale: float = 0.5) -> AttentionSampling:
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, std=scale, generator=g)
    return module


def look(estimator: Estimator = "murthy", n_patches: int = 3, **options) -> AttentionSampling:
    options = {"patch_size": (8, 6), "n_patches": n_patches, "estimator": estimator, **options}
    return randomised(AttentionSampling(attention(), Feature(), **options))


def images(*sizes: tuple[int, int], seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Low and high views of images of these low-resolution sizes."""
    g = torch.Generator().manual_seed(seed)
    high = [torch.rand(1, h * SCALE, w * SCALE, generator=g) for h, w in sizes]
    return [F.avg_pool2d(x, SCALE) for x in high], high


def crop(image: torch.Tensor, y: int, x: int, size: tuple[int, int]) -> torch.Tensor:
    return F.pad(image, (200,) * 4)[:, y + 200 : y + 200 + size[0], x + 200 : x + 200 + size[1]]


def every_feature(module: AttentionSampling, high: torch.Tensor, map_size: tuple[int, int]) -> torch.Tensor:
    """f of the patch of every position of one image, (K, D): centres by hand for `attention`."""
    h, w = module.patch_size
    patches = [
        crop(high, round((2 * r + 0.5) * SCALE - h / 2), round((2 * c + 0.5) * SCALE - w / 2), (h, w))
        for r in range(map_size[0])
        for c in range(map_size[1])
    ]
    return module.feature(torch.stack(patches))


def test_what_it_reports_is_what_it_read():
    low, high = images((7, 9), (7, 9))
    module = look()
    found = module(torch.stack(low), torch.stack(high))
    assert isinstance(found, Glimpse) and isinstance(found.attention, torch.Tensor)
    assert found.attention.shape == (2, 4, 5) and found.features.shape == (2, 3)
    torch.testing.assert_close(found.attention.sum((1, 2)), torch.ones(2))
    for b in range(2):
        for i, (y, x) in enumerate(found.positions[b].tolist()):
            assert torch.equal(found.patches[b, i], crop(high[b], y, x, (8, 6)))
    features = module.feature(found.patches.flatten(0, 1)).view(2, 3, 3)
    torch.testing.assert_close(found.features, (found.weights[:, :, None] * features).sum(1))
    assert found.entropy.shape == (2,)


def value_and_gradient(module: AttentionSampling, phi: torch.Tensor) -> torch.Tensor:
    """The mean of Phi over a batch, and the gradient of a function of it at all parameters."""
    towards = torch.tensor([1.0, -2.0, 0.5])
    gradients = torch.autograd.grad(phi.mean(0) @ towards, list(module.parameters()))
    return torch.cat([phi.mean(0).detach(), *(g.flatten() for g in gradients)])


def deviation(module: AttentionSampling, low: torch.Tensor, high: torch.Tensor, truth: torch.Tensor) -> float:
    """||mean - truth||^2 over its expectation if unbiased, from 60 batches of 50 draws. Above 11: probability 0.001."""
    rows = low.expand(50, -1, -1, -1), high.expand(50, -1, -1, -1)
    estimates = torch.stack([value_and_gradient(module, module(*rows, seed=s).features) for s in range(60)])
    return float(60 * (estimates.mean(0) - truth).square().sum() / estimates.var(0).sum())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_features_and_gradients_are_unbiased_through_the_network(estimator: Estimator):
    """Over many draws, against the exact sum over all positions."""
    (low,), (high,) = images((5, 5))
    module = look(estimator, prior="local_contrast", smoothing=0.1)
    a = module.log_attention(low[None], (8 / SCALE, 6 / SCALE))[0].exp()
    truth = value_and_gradient(module, a.flatten()[None] @ every_feature(module, high, (3, 3)))
    assert deviation(module, low, high, truth) < 11


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Plain autograd through Des Raj's coefficients, which is biased."""
    (low,), (high,) = images((5, 5))
    module = look("des_raj")
    a = module.log_attention(low[None], (8 / SCALE, 6 / SCALE))[0].exp()
    truth = value_and_gradient(module, a.flatten()[None] @ every_feature(module, high, (3, 3)))

    def biased(log_a: torch.Tensor, features: torch.Tensor, *, estimator: Estimator) -> torch.Tensor:
        a, n = log_a.exp(), log_a.shape[1]
        c = ((1 - a.cumsum(1) + a) + torch.arange(n - 1, -1, -1) * a) / n
        return (c[:, :, None] * features).sum(1)

    monkeypatch.setattr("flopwise.attention_sampling.module.expectation", biased)
    assert deviation(module, low, high, truth) > 11


def test_topk_reads_the_positions_with_most_attention():
    (low,), (high,) = images((7, 9))
    module = look()
    found = module(low[None], high[None], estimator="topk", n_patches=4)
    assert isinstance(found.attention, torch.Tensor)
    a = found.attention[0].flatten()
    index = a.topk(4).indices
    torch.testing.assert_close(found.weights[0], a[index] / a[index].sum())
    every = every_feature(module, high, (4, 5))
    torch.testing.assert_close(found.features[0], (found.weights[0][:, None] * every[index]).sum(0))


def test_images_of_any_kind_give_the_same_result():
    low, high = images((7, 9), (7, 9), (7, 9))
    module = look(prior="brightness")
    wanted = module(torch.stack(low), torch.stack(high))
    for others in (high, [Lazy(x) for x in high]):
        found = module(torch.stack(low), others)
        assert torch.equal(found.positions, wanted.positions) and torch.equal(found.patches, wanted.patches)
        torch.testing.assert_close(found.features, wanted.features)
    wanted = module(torch.stack(low), torch.stack(high), estimator="topk")
    integers = module((255 * torch.stack(low)).byte(), (255 * torch.stack(high)).byte(), estimator="topk")
    assert float((integers.patches - wanted.patches).abs().max()) <= 1 / 255


@pytest.mark.parametrize("lazy", [False, True])
def test_images_of_different_sizes(lazy: bool):
    """Each is treated as it would be alone."""
    low, high = images((7, 9), (4, 12), (9, 3))
    module = look(prior="brightness")
    found = module(low, [Lazy(x) for x in high] if lazy else high, estimator="topk")
    assert isinstance(found.attention, list) and [a.shape for a in found.attention] == [(4, 5), (2, 6), (5, 2)]
    for b in range(3):
        alone = module(low[b][None], high[b][None], estimator="topk")
        torch.testing.assert_close(found.attention[b], alone.attention[0])
        torch.testing.assert_close(found.features[b], alone.features[0])
        torch.testing.assert_close(found.entropy[b], alone.entropy[0])
        assert torch.equal(found.positions[b], alone.positions[0])
    sampled = found
    for s in range(50):  # never a position that the image does not have
        sampled = module(low, high, seed=s)
        for b, (height, width) in enumerate(x.shape[1:] for x in high):
            centre = sampled.positions[b] + torch.tensor([4, 3])
            assert (centre >= 0).all() and (centre < torch.tensor([height + 3, width + 3])).all()
    sampled.features.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_thumbnails_of_one_size_may_stand_for_images_of_many():
    low, high = images((6, 6), (6, 6))
    high[1] = F.interpolate(high[1][None], scale_factor=2.0)[0]
    module = look()
    found = module(torch.stack(low), high, estimator="topk")
    assert torch.equal(found.positions[1] + torch.tensor([4, 3]), 2 * (found.positions[1] + torch.tensor([4, 3])) // 2)
    alone = module(low[1][None], high[1][None], estimator="topk")
    assert torch.equal(found.positions[1], alone.positions[0])


def test_lazy_images_are_read_ahead_in_pieces_with_the_same_result():
    low, high = images(*[(7, 9)] * 9)
    module = look()
    found = module(torch.stack(low), [Lazy(x) for x in high])
    assert isinstance(module.feature, Feature) and module.feature.calls == [9, 9, 9]  # 3 images of 3 patches each
    torch.testing.assert_close(found.features, module(torch.stack(low), torch.stack(high)).features)
    calls = module.feature.calls
    module.feature = nn.Sequential(nn.BatchNorm2d(1), module.feature)
    module.train()(torch.stack(low), [Lazy(x) for x in high])
    assert calls[-1] == 27  # batch statistics are of the whole batch


def test_without_gradients_the_network_sees_few_patches_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flopwise.attention_sampling.module.PIXELS_AT_ONCE", 2 * 8 * 8 + 5)
    module, (low, high) = randomised(look(n_patches=5)), images((40, 48), (40, 48))
    whole = module(torch.stack(low), torch.stack(high))
    with torch.no_grad():
        pieces = module(torch.stack(low), torch.stack(high))
    assert isinstance(module.feature, Feature) and module.feature.calls == [10, 2, 2, 2, 2, 2]
    torch.testing.assert_close(pieces.features, whole.features.detach())


def test_the_attention_network_sees_few_views_at_once(monkeypatch: pytest.MonkeyPatch):
    low, high = (torch.stack(x) for x in images(*[(7, 9)] * 5))
    module, calls = randomised(look(n_patches=5)), []
    attention = module.attention
    attention.register_forward_pre_hook(lambda _, views: calls.append(len(views[0])))
    given = torch.rand(5, 7 * 9, generator=torch.Generator().manual_seed(0))  # otherwise attention's last bits decide
    monkeypatch.setattr("flopwise.attention_sampling.module.uniforms", lambda _, columns, __: given[:, :columns])

    def gradients() -> list[torch.Tensor]:
        found = module(low, high)
        return [
            found.features,
            found.attention,
            *torch.autograd.grad(found.features.sin().sum(), list(module.parameters())),
        ]

    whole = gradients()
    monkeypatch.setattr("flopwise.attention_sampling.module.VIEW_PIXELS_AT_ONCE", 2 * 7 * 9 + 5)
    pieces = gradients()
    assert calls == [5, 2, 2, 1]
    for piece, all_at_once in zip(pieces, whole, strict=True):
        torch.testing.assert_close(piece, all_at_once)
    module.attention = nn.Sequential(nn.BatchNorm2d(1), attention)
    module.train()(low, high)
    assert calls[4:] == [5]  # batch statistics are of the whole batch


def test_another_seed_is_another_draw_and_the_same_is_the_same():
    low, high = (torch.stack(x) for x in images((9, 9), (9, 9)))
    module = look()
    assert torch.equal(module(low, high).positions, module(low, high).positions)
    assert not torch.equal(module(low, high).positions, module(low, high, seed=1).positions)
    twins = low[:1].expand(2, -1, -1, -1), high[:1].expand(2, -1, -1, -1)
    draws = [module(*twins, seed=s).positions for s in range(5)]
    assert any(not torch.equal(d[0], d[1]) for d in draws)  # equal images are drawn from independently


def test_a_checkpointed_gradient_is_the_plain_one():
    low, high = (torch.stack(x) for x in images((9, 9), (9, 9)))
    gradients = []
    for checkpointed in (False, True):
        module = look()

        def features(low: torch.Tensor, high: torch.Tensor, module: AttentionSampling = module) -> torch.Tensor:
            return module(low, high).features

        phi = checkpoint(features, low, high, use_reentrant=False) if checkpointed else features(low, high)
        phi.square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_no_gradient_reaches_the_pixels_by_the_choice_of_patches():
    low, high = (torch.stack(x) for x in images((9, 9)))
    module = look()
    found = module(low, high.requires_grad_())
    (gradient,) = torch.autograd.grad(found.features.sum(), high)
    read = torch.zeros_like(high, dtype=torch.bool)
    for y, x in found.positions[0].tolist():
        read[0, 0, max(y, 0) : max(y + 8, 0), max(x, 0) : max(x + 6, 0)] = True
    assert (gradient[~read] == 0).all()


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "topk"])
def test_bfloat16_autocast_trains(estimator: Estimator):
    low, high = (torch.stack(x) for x in images((9, 9), (9, 9)))
    module = look(estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(low, high)
    found.features.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert isinstance(found.attention, torch.Tensor) and found.attention.dtype == torch.float32


@pytest.mark.parametrize("lazy", [False, True])
def test_nested_sampling_reads_a_few_patches_of_a_few_regions(lazy: bool):
    (low,), (high,) = images((12, 12))
    inner = AttentionSampling(attention(), Feature(), patch_size=4, n_patches=2, reduction=2)
    module = randomised(AttentionSampling(attention(), inner, patch_size=16, n_patches=3))
    image = Lazy(high, levels=2)
    found = module(low[None], [image] if lazy else high[None])
    assert found.positions.shape == (1, 6, 2) and found.patches.shape == (1, 6, 1, 4, 4)
    for i, (y, x) in enumerate(found.positions[0].tolist()):
        assert torch.equal(found.patches[0, i], crop(high, y, x, (4, 4)))
    features = inner.feature(found.patches[0])
    torch.testing.assert_close(found.features[0], found.weights[0] @ features)
    if lazy:  # regions at half the resolution, patches at the finest
        assert sorted(set(image.reads)) == [(0, 4, 4), (1, 8, 8)]
        torch.testing.assert_close(found.features, module(low[None], high[None]).features)


def test_nested_sampling_is_unbiased():
    (low,), (high,) = images((5, 5))
    inner = AttentionSampling(attention(), Feature(), patch_size=4, n_patches=2, reduction=2)
    module = randomised(AttentionSampling(attention(), inner, patch_size=8, n_patches=2))
    inner.n_patches = 4  # n = K reads everything: 9 regions, 4 positions in each
    truth = value_and_gradient(module, module(low[None], high[None], n_patches=9).features)
    inner.n_patches = 2
    assert deviation(module, low, high, truth) < 11


def test_all_positions_read_is_the_exact_sum():
    (low,), (high,) = images((5, 5))
    module = look()
    found = module(low[None], high[None], n_patches=9)
    assert isinstance(found.attention, torch.Tensor)
    exact = reference.expectation(found.attention[0].flatten(), every_feature(module, high, (3, 3)))
    torch.testing.assert_close(found.features[0], exact)


def test_smoothing_is_the_share_that_is_spread_evenly():
    (low,), (high,) = images((5, 5))
    plain, smooth = look()(low[None], high[None]).attention, look(smoothing=0.2)(low[None], high[None]).attention
    assert isinstance(plain, torch.Tensor) and isinstance(smooth, torch.Tensor)
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 / 9)


def test_a_lazy_images_pixels_are_read_and_nothing_else():
    (low,), (high,) = images((9, 9))
    image = Lazy(high)
    look()(low[None], [image])
    assert image.reads == [(0, 8, 6)] * 3
    assert _Images([image]).sizes == [(36, 36)]


def test_what_cannot_be_is_explained():
    low, high = (torch.stack(x) for x in images((5, 5), (5, 5)))
    with pytest.raises(ValueError, match=r"got n = 10 of K = 9.*larger low-resolution view"):
        look()(low, high, n_patches=10)
    with pytest.raises(ValueError, match="same images; got 1 and 2"):
        look()(low[:1], high)
    with pytest.raises(ValueError, match="smoothing is a share"):
        look(smoothing=1.0)
    with pytest.raises(ValueError, match=r"logits \(B, 1, rows, columns\); got \(2, 2, 3, 3\)"):
        AttentionSampling(nn.Conv2d(1, 2, 3), Feature(), patch_size=4, n_patches=1)(low, high)
    inner = AttentionSampling(attention(), Feature(), patch_size=4, n_patches=2, reduction=3)
    with pytest.raises(ValueError, match="multiple of the inner reduction, 3"):
        AttentionSampling(attention(), inner, patch_size=16, n_patches=2)
    with pytest.raises(ValueError, match="between 1 and K"):
        look(n_patches=0)(low, high)
    said = AttentionSampling(
        nn.Sequential(nn.Flatten(), nn.Linear(25, 9), nn.Unflatten(1, (1, 3, 3))),
        Feature(),
        patch_size=4,
        n_patches=2,
        receptive_field=ReceptiveField((2, 2), (3, 3), (1, 1)),
    )
    assert said(low, high).features.shape == (2, 3)
    assert "replacement" in WITH_REPLACEMENT
