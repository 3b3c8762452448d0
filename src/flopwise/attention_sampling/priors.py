"""What gets attention started, and what keeps it from collapsing: saliency priors, and two terms on its entropy.

Left alone, the attention of a random network is flat, samples of it say little, and it takes about a million of them
before the symmetry breaks. A prior says where something may be; its strength beta is learned.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flopwise.attention_sampling.patches import Pair, ReceptiveField

Saliency = Callable[[Tensor], Tensor]  # (B, C, h, w) -> (B, 1, h, w), not negative
Prior = Literal["brightness", "local_contrast"] | Saliency | None
FLOOR = 1e-2  # of an image's mean saliency: where there is none, attention is low, not impossible
BLANK = 1e-6  # added, for an image without any


def brightness(low: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """The mean of the channels: for bright things on a dark ground, pixels in [0, 1]."""
    return low.mean(1, keepdim=True).clamp(min=0)


def local_contrast(low: Float[Tensor, "b c h w"], window: int = 5) -> Float[Tensor, "b 1 h w"]:
    """The standard deviation of the pixels around, averaged over the channels: where something is."""
    channels = [_deviation(channel, window) for channel in low.split(1, 1)]  # one at a time: less memory
    return torch.cat(channels, 1).mean(1, keepdim=True)


def _deviation(channel: Float[Tensor, "b 1 h w"], window: int) -> Float[Tensor, "b 1 h w"]:
    channel = F.pad(channel, (window // 2,) * 4, mode="replicate")
    mean, mean_square = (F.avg_pool2d(x, window, stride=1) for x in (channel, channel.square()))
    return (mean_square - mean.square()).clamp(min=0).sqrt()


SALIENCY: dict[str, Saliency] = {"brightness": brightness, "local_contrast": local_contrast}


def saliency_of(prior: Prior) -> Saliency | None:
    """The function that a prior's name stands for.

    Raises:
        ValueError: no prior has this name.
    """
    if prior is None or callable(prior):
        return prior
    if prior not in SALIENCY:
        raise ValueError(f"prior is one of {', '.join(SALIENCY)}, a function of the low view, or None; got {prior!r}.")
    return SALIENCY[prior]


def log_prior(
    saliency: Float[Tensor, "b 1 h w"], field: ReceptiveField, map_size: Pair, window: tuple[float, float]
) -> Float[Tensor, "b 1 rows columns"]:
    """log(s + 0.01 mean(s)), s the mean saliency in a window around the centre of a position, 0 outside the image.

    The constant is relative to the image's own mean, so that dark and bright images are treated alike.

    Args:
        field: places the positions on the low-resolution view.
        map_size: of the attention map.
        window: (y, x), in low-resolution pixels: what a patch covers. Rounded so that it centres on whole pixels.
    """
    sides, pads = [], []
    for d in (0, 1):
        odd = field.size[d] % 2
        side = max(2 * round((window[d] - odd) / 2) + odd, 2 - odd)
        before = field.padding[d] - (field.size[d] - side) // 2
        needed = (map_size[d] - 1) * field.stride[d] + side
        sides.append(side)
        pads = [before, needed - saliency.shape[2 + d] - before, *pads]  # F.pad wants the last dimension first
    around = F.avg_pool2d(F.pad(saliency, pads), sides, field.stride)
    return (around + FLOOR * around.mean((2, 3), keepdim=True) + BLANK).log()


def entropy(log_attention: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """H = -sum_i a_i log a_i in nats; a position with attention 0 adds 0."""
    present = log_attention > -torch.inf
    log_attention = log_attention.masked_fill(~present, 0.0)
    return -(log_attention.exp() * log_attention * present).sum(-1)


def entropy_loss(
    entropy: Float[Tensor, " b"], *, bonus: float = 1e-4, floor: float = 0.0, weight: float = 0.1
) -> Float[Tensor, ""]:
    """A term for the loss: mean of -bonus H + weight max(0, floor - H).

    The bonus keeps attention exploring; the floor, in nats, does nothing until attention has almost collapsed: 3 nats
    are 20 positions. Of the two one is enough.
    """
    return (-bonus * entropy + weight * F.relu(floor - entropy)).mean()
