"""From a position of the attention map to the pixels it stands for: where a patch is, and how it is cut out."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

Pair = tuple[int, int]  # (y, x)
IN_PLACE = ("activation", "batchnorm", "normalization", "instancenorm", "dropout")  # modules of torch.nn.modules


@dataclass(frozen=True)
class ReceptiveField:
    """What one position of an attention map sees of the low-resolution view, in its pixels, as (y, x).

    Position i covers [i stride - padding, i stride - padding + size): its centre is i stride + size / 2 - padding, with
    pixel p covering [p, p + 1).

    Attributes:
        stride: from one position to the next.
        size: of the receptive field.
        padding: total padding on the top and on the left, counted in input pixels.
    """

    stride: Pair = (1, 1)
    size: Pair = (1, 1)
    padding: Pair = (0, 0)

    def then(self, stride: Pair, size: Pair, padding: Pair) -> "ReceptiveField":
        """Of this network followed by a layer."""
        return ReceptiveField(
            stride=_pair(a * b for a, b in zip(self.stride, stride, strict=True)),
            size=_pair(r + (k - 1) * s for r, k, s in zip(self.size, size, self.stride, strict=True)),
            padding=_pair(p + q * s for p, q, s in zip(self.padding, padding, self.stride, strict=True)),
        )


def receptive_field_of(network: nn.Module) -> ReceptiveField:
    """The receptive field of a chain of convolutions, poolings, paddings and elementwise layers.

    A module may say it itself, in an attribute `receptive_field`.

    Raises:
        ValueError: the network has a layer whose geometry is not known here.
    """
    field = ReceptiveField()
    for layer in _layers(network):
        if isinstance(layer, ReceptiveField):
            field = field.then(layer.stride, layer.size, layer.padding)
        elif isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            kernel, stride, dilation = (
                _both(getattr(layer, name, 1)) for name in ("kernel_size", "stride", "dilation")
            )
            extent = _pair(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
            if layer.padding == "same":  # torch puts the odd one on the right
                padding = _pair((e - 1) // 2 for e in extent)
            else:
                padding = (0, 0) if layer.padding == "valid" else _both(layer.padding)
            field = field.then(stride, extent, padding)
        else:  # nn.ZeroPad2d and its like: (left, right, top, bottom)
            left, _, top, _ = layer.padding  # type: ignore[misc]
            field = field.then((1, 1), (1, 1), (top, left))  # type: ignore[arg-type]
    return field


def corners(
    index: Int[Tensor, "b n"], width: Int[Tensor, " b"], field: ReceptiveField, scale: Float[Tensor, "b 2"], size: Pair
) -> Int[Tensor, "b n 2"]:
    """(y, x) of the top-left pixels of the patches centred on these positions; may be negative at an edge.

    Args:
        index: flat positions in attention maps.
        width: of every map.
        scale: high-resolution pixels per low-resolution pixel, (y, x) for every image.
        size: of a patch, in high-resolution pixels.
    """
    place = torch.stack([index // width[:, None], index % width[:, None]], -1).double()
    stride, extent, padding, patch = (
        torch.tensor(pair, dtype=torch.float64, device=index.device)
        for pair in (field.stride, field.size, field.padding, size)
    )
    centre = (place * stride + extent / 2 - padding) * scale[:, None]
    return (centre - patch / 2 + 0.5).floor().long()


def gather_patches(
    images: Num[Tensor, "k c height width"], corners: Int[Tensor, "b n 2"], size: Pair, of: Int[Tensor, " b"]
) -> Num[Tensor, "b n c h w"]:
    """The patches with these top-left corners, 0 outside the image. Only their pixels are touched; channels-last.

    Args:
        of: which image each row of corners belongs to.
    """
    height, width = images.shape[2:]
    rows = corners[:, :, :1] + torch.arange(size[0], device=corners.device)
    columns = corners[:, :, 1:] + torch.arange(size[1], device=corners.device)
    inside_y = ((rows >= 0) & (rows < height)).to(images.dtype)  # two factors: faster than one mask of every pixel
    inside_x = ((columns >= 0) & (columns < width)).to(images.dtype)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    found = images[of[:, None, None, None], :, rows[:, :, :, None], columns[:, :, None]]
    return (found * inside_y[:, :, :, None, None] * inside_x[:, :, None, :, None]).movedim(-1, 2)


def as_float(pixels: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Integer pixels as floats in [0, 1], by the largest value of their dtype; floats as they are."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(torch.iinfo(pixels.dtype).max)


def _layers(network: nn.Module) -> Iterator[nn.Module | ReceptiveField]:
    """The layers that move positions, in order."""
    said = getattr(network, "receptive_field", None)
    kind = type(network).__module__
    if isinstance(said, ReceptiveField):
        yield said
    elif isinstance(network, nn.Sequential):
        for layer in network:
            yield from _layers(layer)
    elif isinstance(network, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) or kind == "torch.nn.modules.padding":
        yield network
    elif not (isinstance(network, nn.Identity) or kind in [f"torch.nn.modules.{name}" for name in IN_PLACE]):
        raise ValueError(
            "the geometry of the attention map follows from a chain of convolutions, poolings, paddings and elementwise"
            f" layers; got a {type(network).__name__}. Pass receptive_field=ReceptiveField(stride, size, padding), or "
            "set it as an attribute `receptive_field` of that module."
        )


def _pair(numbers) -> Pair:
    y, x = numbers
    return y, x


def _both(number) -> Pair:
    return _pair(number) if isinstance(number, tuple | list) else (number, number)
