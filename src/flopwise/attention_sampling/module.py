"""Attention sampling as a layer: attention over the low-resolution view, features from a few patches of the image."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from flopwise.attention_sampling.expectation import WITH_REPLACEMENT, Estimator, coefficients, expectation
from flopwise.attention_sampling.images import read_patches
from flopwise.attention_sampling.patches import (
    Pair,
    ReceptiveField,
    as_float,
    corners,
    gather_patches,
    receptive_field_of,
)
from flopwise.attention_sampling.priors import Prior, entropy, log_prior, saliency_of
from flopwise.attention_sampling.sampling import check_draw, draw, topk, uniforms

PIXELS_AT_ONCE = 2**18  # through the feature network, where nothing is kept for a backward pass: 4 patches of 256
VIEW_PIXELS_AT_ONCE = 2**17  # through the attention network: its hidden layers stay in the cache, 3 times faster
READ_AHEAD = 4  # pieces a batch of lazy images is read in, each while the network works on the one before


class Glimpse(NamedTuple):
    """What `AttentionSampling` saw.

    Attributes:
        features: Phi, the estimated expectation of the features over the attention, (B, D).
        attention: (B, rows, columns), summing to 1; a list of (rows, columns) where the images differ in size.
        positions: (y, x) of the top-left pixel of every patch that was read, in high-resolution pixels, (B, n, 2). May
            be negative at an edge. In the order they were drawn.
        patches: the pixels themselves, (B, n, C, h, w).
        weights: the coefficient of every patch in `features`, (B, n).
        entropy: of the attention, in nats, (B,); for `entropy_loss`.
    """

    features: Float[Tensor, "b d"]
    attention: Float[Tensor, "b rows columns"] | list[Float[Tensor, "rows columns"]]
    positions: Int[Tensor, "b n 2"]
    patches: Float[Tensor, "b n c h w"]
    weights: Float[Tensor, "b n"]
    entropy: Float[Tensor, " b"]


class AttentionSampling(nn.Module):
    """Phi = sum_i a_i f(patch_i), estimated from n patches sampled from a = softmax(attention(low)).

        look = AttentionSampling(attention, feature, patch_size=40, n_patches=10)
        logits = head(look(low, high).features)

    Only the sampled patches of `high` are read; no gradient passes through their choice but the unbiased one of
    `expectation`. The features are best of bounded norm (L2-normalised): attention is then the best distribution to
    sample from.

    The draw is a function of `seed` and of the attention itself, so that the module has no random state: a checkpointed
    or resumed forward draws as before, and the same call on the same weights gives the same result. For another draw,
    pass another `seed` to `forward`.

    Nested: `feature` may be an `AttentionSampling`. Its `low` is then the region that the outer one chose, at 1 /
    `reduction` of the finest resolution, its `high` the region at the finest; n x n' patches are read, and none of the
    regions as a whole.

    Args:
        attention: low (B, C, h, w) -> logits (B, 1, rows, columns).
        feature: patches (B n, C, p, p) -> features (B n, D); or an `AttentionSampling`.
        patch_size: in pixels of `high`, one number or (height, width).
        n_patches: how many are read of each image.
        estimator: see `expectation`; "topk" takes the n positions with the most attention, for inference.
        prior: "brightness", "local_contrast", a function of `low`, or None. Adds beta log(saliency) to the logits,
            beta learned; see `log_prior`.
        prior_strength: beta at the start.
        smoothing: the share of the attention that is spread evenly over all positions.
        receptive_field: of `attention`; found from its layers where it is None.
        reduction: nested, the resolution of this module's `low`: 8 is an eighth of the finest.
        seed: of the draws.

    Raises:
        ValueError: a number is out of its range, the estimator or prior is unknown, or the receptive field cannot be
            found.

    Source: Katharopoulos & Fleuret, ICML 2019. Departs from it: unbiased gradients without replacement, exact patch
    centres, priors.
    """

    def __init__(
        self,
        attention: nn.Module,
        feature: nn.Module,
        *,
        patch_size: int | Pair,
        n_patches: int,
        estimator: Estimator = "murthy",
        prior: Prior = None,
        prior_strength: float = 1.0,
        smoothing: float = 0.0,
        receptive_field: ReceptiveField | None = None,
        reduction: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is a share of the attention, from 0 to below 1; got {smoothing}.")
        self.attention, self.feature = attention, feature
        self.patch_size: Pair = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        self.n_patches, self.smoothing, self.reduction, self.seed = n_patches, smoothing, reduction, seed
        self.estimator: Estimator = estimator
        self.field = receptive_field or receptive_field_of(attention)
        self.saliency = saliency_of(prior)
        self.beta = nn.Parameter(torch.tensor(float(prior_strength))) if self.saliency else None
        if isinstance(feature, AttentionSampling) and any(side % feature.reduction for side in self.patch_size):
            raise ValueError(
                f"a region that is looked into again is a multiple of the inner reduction, {feature.reduction}; got "
                f"patch_size={self.patch_size}."
            )

    def forward(
        self,
        low: Num[Tensor, "b c h w"] | Sequence[Num[Tensor, "c _ _"]],
        high: Any,
        *,
        estimator: Estimator | None = None,
        n_patches: int | None = None,
        seed: int | None = None,
    ) -> Glimpse:
        """Looks at a batch of images.

        Args:
            low: the low-resolution views, (B, C, h, w), or one (C, h, w) an image where sizes differ. Integer pixels
                are scaled to [0, 1], here and in `high`.
            high: the images: (B, C, H, W), or a sequence of tensors (C, H, W) or lazy images, of any sizes.
            estimator, n_patches, seed: in place of the module's, for this call.

        Raises:
            ValueError: the batch sizes disagree, or an image has fewer positions than patches are to be read.
        """
        pixels = _pixels(high)
        if len(pixels.sizes) != len(low):
            raise ValueError(f"low and high hold the same images; got {len(low)} and {len(pixels.sizes)} of them.")
        n = self.n_patches if n_patches is None else n_patches
        return self._look(low, pixels, estimator or self.estimator, n, self.seed if seed is None else seed)

    def log_attention(self, low: Float[Tensor, "b c h w"], patch_size: tuple[float, float]) -> Float[Tensor, "b _ _"]:
        """log a, (B, rows, columns), float32 at least; `patch_size` is in pixels of `low`, for the prior."""
        logits = self.attention(low)
        if logits.ndim != 4 or logits.shape[1] != 1:
            raise ValueError(f"attention gives logits (B, 1, rows, columns); got {tuple(logits.shape)}.")
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        if self.saliency is not None and self.beta is not None:
            prior = log_prior(self.saliency(low).to(logits.dtype), self.field, logits.shape[2:], patch_size)
            logits = logits + self.beta * prior
        log_a = logits.flatten(1).log_softmax(1)
        if self.smoothing:
            even = torch.full_like(log_a, math.log(self.smoothing / log_a.shape[1]))
            log_a = torch.logaddexp(log_a + math.log1p(-self.smoothing), even)
        return log_a.view(len(log_a), *logits.shape[2:])

    def _look(self, low: Any, pixels: "_Pixels", estimator: Estimator, n: int, seed: int) -> Glimpse:
        together = isinstance(low, Tensor) and len(set(pixels.sizes)) == 1
        views = self._few_at_once(as_float(low)) if together else [as_float(view)[None] for view in low]
        scales = [
            (height / view.shape[-2], width / view.shape[-1])
            for view, (height, width) in zip(low, pixels.sizes, strict=True)
        ]
        maps = [
            self.log_attention(view, (self.patch_size[0] / y, self.patch_size[1] / x))
            for view, (y, x) in zip(views, scales, strict=False)  # together, the scales are all the same
        ]
        maps = [torch.cat(maps)] if together else maps
        log_a, index = self._draw(maps, estimator, n, seed)
        chosen = log_a.gather(1, index)
        weights = coefficients(chosen, estimator).detach()

        device, images = log_a.device, len(log_a)
        width = torch.tensor([view.shape[2] for view in maps], device=device).expand(images)
        scale = torch.tensor(scales, dtype=torch.float64, device=device)
        positions = corners(index, width, self.field, scale, self.patch_size)
        if isinstance(self.feature, AttentionSampling):
            inner = self._refine(self.feature, pixels, positions, estimator, seed)
            features, patches = inner.features, inner.patches.unflatten(0, (images, n)).flatten(1, 2)
            positions = inner.positions.view(images, -1, 2)
            weights = (weights[:, :, None] * inner.weights.view(images, n, -1)).flatten(1)
        else:
            features, patches = self._features(pixels, positions)
        features = features.view(images, n, -1)
        return Glimpse(
            expectation(chosen, features, estimator=estimator),
            maps[0].exp() if together else [view[0].exp() for view in maps],
            positions,
            patches,
            weights,
            entropy(log_a),
        )

    def _few_at_once(self, low: Float[Tensor, "b c h w"]) -> Sequence[Float[Tensor, "_ c h w"]]:
        """Parts of a batch for the attention network, one after another."""
        if _sees_the_batch(self.attention):
            return [low]
        return low.split(max(1, VIEW_PIXELS_AT_ONCE // math.prod(low.shape[2:])))

    def _draw(self, maps: list[Tensor], estimator: Estimator, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """log a in rows as long as the largest map, (B, K), and the positions that are looked at, (B, n)."""
        replace = estimator in WITH_REPLACEMENT
        rows = [view.flatten(1) for view in maps]
        for row in rows:
            check_draw(row, n, replace)
        longest = max(row.shape[1] for row in rows)
        log_a = torch.cat([F.pad(row, (0, longest - row.shape[1]), value=-torch.inf) for row in rows])
        if estimator == "topk":
            return log_a, topk(log_a, n)
        return log_a, draw(log_a, n, uniforms(log_a, n if replace else longest, seed), replace=replace)

    def _features(self, pixels: "_Pixels", at: Int[Tensor, "b n 2"]) -> tuple[Tensor, Tensor]:
        """f(patch) for every patch, (B n, D), and the patches. Slow pixels are read while the network works."""

        def read(images: Tensor) -> Tensor:
            return as_float(pixels.read(images, at[images], self.patch_size))

        def network(patches: Tensor) -> Tensor:
            patches = patches.flatten(0, 1)
            if whole or torch.is_grad_enabled():
                return self.feature(patches)
            at_once = max(1, PIXELS_AT_ONCE // math.prod(self.patch_size))
            return torch.cat([self.feature(part) for part in patches.split(at_once)])

        images = torch.arange(len(at), device=at.device)
        whole = _sees_the_batch(self.feature)
        if not pixels.slow or whole:
            patches = read(images)
            return network(patches), patches
        pieces = images.split(-(-len(images) // READ_AHEAD))
        features, patches = [], []
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, pieces[0])
            for following in [*pieces[1:], None]:
                patches.append(ahead.result())
                if following is not None:
                    ahead = reader.submit(read, following)
                features.append(network(patches[-1]))
        return torch.cat(features), torch.cat(patches)

    def _refine(
        self, inner: "AttentionSampling", pixels: "_Pixels", at: Int[Tensor, "b n 2"], estimator: Estimator, seed: int
    ) -> Glimpse:
        """Looks into every chosen region again, each as an image of its own, (B n) of them."""
        at = at - at % inner.reduction  # so that both resolutions show the same pixels
        low = pixels.read(torch.arange(len(at), device=at.device), at, self.patch_size, inner.reduction).flatten(0, 1)
        windows = _Windows(pixels, at, self.patch_size)
        kind: Estimator = estimator if estimator == "topk" else inner.estimator
        found = inner._look(low, windows, kind, inner.n_patches, seed ^ inner.seed)
        return found._replace(positions=found.positions + at.view(-1, 1, 2))


def _sees_the_batch(network: nn.Module) -> bool:
    """Whether its result for one image depends on the others: batch statistics are of the whole batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules())


@runtime_checkable
class _Pixels(Protocol):
    """Where patches come from: sizes (height, width) of the images, and whether reading them is worth doing ahead."""

    sizes: list[Pair]
    slow: bool

    def read(
        self, of: Int[Tensor, " b"], at: Int[Tensor, "b n 2"], size: Pair, reduction: int = 1
    ) -> Num[Tensor, "b n c h w"]:
        """Patches of the images `of` at these corners, each pixel the mean of reduction x reduction of the finest."""
        ...


def _pixels(high: Any) -> _Pixels:
    return _Batch(high) if isinstance(high, Tensor) else _Images(high)


class _Batch:
    """A tensor of images (B, C, H, W)."""

    slow = False

    def __init__(self, images: Num[Tensor, "b c height width"]) -> None:
        if images.ndim != 4:
            raise ValueError(f"high is (B, C, H, W), or a sequence of images; got {tuple(images.shape)}.")
        self.images = images
        self.sizes: list[Pair] = [(images.shape[2], images.shape[3])] * len(images)

    def read(self, of: Tensor, at: Tensor, size: Pair, reduction: int = 1) -> Tensor:
        return _reduced(gather_patches(self.images, at, size, of), reduction)


class _Images:
    """Tensors (C, H, W) or lazy images, of any sizes."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images
        self.slow = any(not isinstance(image, Tensor) for image in images)
        self.sizes: list[Pair] = [
            (image.shape[1], image.shape[2])
            if isinstance(image, Tensor)
            else (image.levels[0].height, image.levels[0].width)
            for image in images
        ]

    def read(self, of: Tensor, at: Tensor, size: Pair, reduction: int = 1) -> Tensor:
        images = [self.images[i] for i in of.tolist()]
        if reduction == 1 and self.slow:
            return read_patches(images, 0, at.cpu(), size).to(at.device)
        return torch.cat(
            [self._read_one(image, here[None], size, reduction) for image, here in zip(images, at, strict=True)]
        )

    def _read_one(self, image: Any, at: Int[Tensor, "1 n 2"], size: Pair, reduction: int) -> Tensor:
        """From the coarsest level that is fine enough."""
        if isinstance(image, Tensor):
            return _reduced(gather_patches(image[None], at, size, torch.zeros_like(at[:, 0, 0])), reduction)
        level = max(i for i, level in enumerate(image.levels) if reduction % level.downsample == 0)
        downsample = int(image.levels[level].downsample)
        side = size[0] // downsample, size[1] // downsample
        patches = read_patches([image], level, at.cpu() // downsample, side).to(at.device)
        return _reduced(patches, reduction // downsample)


class _Windows:
    """Regions of other images, (B n) of them, each an image of its own."""

    def __init__(self, pixels: _Pixels, at: Int[Tensor, "b n 2"], size: Pair) -> None:
        self.pixels, self.at, self.per_image = pixels, at.flatten(0, 1), at.shape[1]
        self.sizes = [size] * len(self.at)
        self.slow = pixels.slow

    def read(self, of: Tensor, at: Tensor, size: Pair, reduction: int = 1) -> Tensor:
        return self.pixels.read(of // self.per_image, at + self.at[of][:, None], size, reduction)


def _reduced(patches: Num[Tensor, "b n c h w"], reduction: int) -> Num[Tensor, "b n c _ _"]:
    if reduction == 1:
        return patches
    return F.avg_pool2d(as_float(patches).flatten(0, 1), reduction).unflatten(0, patches.shape[:2])
