"""Where a patch lies, against the support of a gradient; and how it is cut out, against slicing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flopwise.attention_sampling import ReceptiveField, receptive_field_of
from flopwise.attention_sampling.patches import as_float, corners, gather_patches

NETWORKS = {
    "one": lambda s: [nn.Conv2d(1, 1, 3, stride=s)],
    "valid": lambda s: [nn.Conv2d(1, 1, 3, stride=s), nn.Tanh(), nn.Conv2d(1, 1, 2), nn.Conv2d(1, 1, 3)],
    "padded": lambda s: [nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 5, stride=s, padding=2), nn.Conv2d(1, 1, 3)],
    "same": lambda s: [nn.Conv2d(1, 1, 4, padding="same"), nn.Conv2d(1, 1, 3, stride=s, padding="valid")],
    "pooled": lambda s: [nn.Conv2d(1, 1, 3), nn.AvgPool2d(2), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 2, stride=s)],
    "dilated": lambda s: [nn.Conv2d(1, 1, 2, dilation=3), nn.Conv2d(1, 1, 2, dilation=2, stride=s, padding=1)],
    "uneven": lambda s: [nn.ZeroPad2d((2, 0, 1, 2)), nn.Conv2d(1, 1, (3, 5), stride=(s, 1), padding=(0, 2))],
}


def network(name: str, stride: int) -> nn.Sequential:
    chain = nn.Sequential(*NETWORKS[name](stride), nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1))).eval()
    for parameter in chain.parameters():
        nn.init.constant_(parameter, 0.1)
    return chain.double()


def support(chain: nn.Module, image: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The pixels that a position of the map depends on, within their bounding box (dilation leaves gaps)."""
    x = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(chain(x)[0, 0, row, column], x)
    rows, columns = gradient[0, 0].nonzero().unbind(1)
    found = torch.zeros_like(gradient[0, 0], dtype=torch.bool)
    found[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_patch_is_what_its_position_sees(name: str, stride: int, scale: int):
    """With patches as large as the receptive field, the patch is the support, to the pixel; at an edge, cut by it."""
    chain, image = network(name, stride), torch.full((1, 1, 19, 23), 0.3, dtype=torch.float64)
    field = receptive_field_of(chain)
    rows, columns = chain(image).shape[2:]
    places = [(0, 0), (rows // 2, columns // 2), (rows - 1, columns - 1), (0, columns - 1)]
    if name == "dilated":  # at an edge its gaps lie outside, and the support says nothing
        places = places[1:2]
    index = torch.tensor([[r * columns + c for r, c in places]])
    size = (field.size[0] * scale, field.size[1] * scale)
    at = corners(index, torch.tensor([columns]), field, torch.full((1, 2), float(scale), dtype=torch.float64), size)
    for (row, column), (y, x) in zip(places, at[0].tolist(), strict=True):
        patch = torch.zeros(19 * scale, 23 * scale, dtype=torch.bool)
        patch[max(y, 0) : max(y + size[0], 0), max(x, 0) : max(x + size[1], 0)] = True
        seen = support(chain, image, row, column).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert torch.equal(patch, seen), (row, column)


def test_patches_of_any_size_keep_the_centre():
    field = ReceptiveField(stride=(2, 2), size=(5, 5), padding=(0, 0))
    index, width, scale = torch.tensor([[3]]), torch.tensor([2]), torch.tensor([[8.0, 7.5]], dtype=torch.float64)
    for size in ((40, 40), (41, 17)):  # position (1, 1): the centre is (4.5, 4.5) in low pixels
        (y, x) = corners(index, width, field, scale, size)[0, 0].tolist()
        assert abs(y + size[0] / 2 - 4.5 * 8) <= 0.5 and abs(x + size[1] / 2 - 4.5 * 7.5) <= 0.5


def test_a_network_of_unknown_geometry_asks_for_it():
    with pytest.raises(ValueError, match=r"chain of convolutions.*got a Linear.*receptive_field="):
        receptive_field_of(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(3, 3)))
    own = nn.Upsample(scale_factor=2)
    own.receptive_field = ReceptiveField(stride=(2, 2), size=(3, 3), padding=(1, 1))  # type: ignore[assignment]
    found = receptive_field_of(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), own))
    assert found == ReceptiveField(stride=(2, 2), size=(5, 5), padding=(2, 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_gathered_patches_are_slices_of_the_padded_image(dtype, memory_format, generator: torch.Generator):
    images = torch.randint(0, 255, (3, 2, 9, 12), generator=generator).to(dtype).contiguous(memory_format=memory_format)
    at = torch.tensor([[[-2, 3], [7, 10]], [[0, 0], [100, 4]], [[4, -50], [5, 5]], [[1, 1], [2, 2]]])
    of = torch.tensor([0, 2, 2, 1])
    found = gather_patches(images, at, (5, 3), of)
    padded = F.pad(images, (200,) * 4)
    for k, (image, rows) in enumerate(zip(of.tolist(), at.tolist(), strict=True)):
        for i, (y, x) in enumerate(rows):
            assert torch.equal(found[k, i], padded[image, :, y + 200 : y + 205, x + 200 : x + 203])
    assert found.dtype == dtype


def test_integer_pixels_become_fractions():
    assert as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert float(as_float(torch.tensor([65535], dtype=torch.uint16))) == 1
    x = torch.tensor([3.0], dtype=torch.float64)
    assert as_float(x) is x
