"""Saliency priors against windows cut out one by one, and the entropy terms."""

import pytest
import torch

from flopwise.attention_sampling import ReceptiveField, brightness, entropy, entropy_loss, local_contrast
from flopwise.attention_sampling.priors import BLANK, FLOOR, log_prior


@pytest.mark.parametrize("window", [1.0, 4.2, 5.3, 0.2])
@pytest.mark.parametrize("field", [((1, 1), (3, 3), (0, 0)), ((2, 3), (7, 4), (3, 0)), ((3, 2), (2, 5), (1, 2))])
def test_the_prior_is_the_mean_around_the_centre(field, window: float, generator: torch.Generator):
    field = ReceptiveField(*field)
    saliency = torch.rand(2, 1, 14, 17, generator=generator)
    sizes = [
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip((14, 17), field.padding, field.size, field.stride, strict=True)
    ]
    found = log_prior(saliency, field, (sizes[0], sizes[1]), (window, window))
    assert found.shape == (2, 1, *sizes)
    means = torch.zeros_like(found)
    padded = torch.nn.functional.pad(saliency, (20,) * 4)
    for row in range(sizes[0]):
        for column in range(sizes[1]):
            spans = []
            for d, i in ((0, row), (1, column)):
                centre = i * field.stride[d] + field.size[d] / 2 - field.padding[d]
                side = min(  # a whole number of pixels around this centre, the nearest to the window
                    (k for k in range(1, 20) if float(centre - k / 2).is_integer()), key=lambda k: (abs(k - window), k)
                )
                spans.append((centre - side / 2, side))
            (y, h), (x, w) = [(int(start) + 20, side) for start, side in spans]
            means[:, :, row, column] = padded[:, :, y : y + h, x : x + w].mean((2, 3))
    torch.testing.assert_close(found, (means + FLOOR * means.mean((2, 3), keepdim=True) + BLANK).log())


def test_saliencies(generator: torch.Generator):
    low = torch.rand(2, 3, 9, 11, generator=generator)
    torch.testing.assert_close(brightness(low), low.mean(1, keepdim=True))
    patch = low[1, :, 2:7, 3:8]
    torch.testing.assert_close(local_contrast(low)[1, 0, 4, 5], patch.flatten(1).std(1, correction=0).mean())
    assert float(local_contrast(torch.full((1, 1, 9, 9), 0.7)).abs().max()) < 1e-3
    assert local_contrast(low).shape == brightness(low).shape == (2, 1, 9, 11)


def test_entropy():
    even = torch.full((1, 8), 1 / 8).log().requires_grad_()
    assert float(entropy(even).detach()) == pytest.approx(torch.tensor(8.0).log().item())
    one = torch.tensor([[0.0, -torch.inf, -torch.inf]], requires_grad=True)
    value = entropy(one)
    value.sum().backward()
    assert float(value.detach()) == 0 and one.grad is not None and one.grad.isfinite().all()


def test_the_floor_acts_below_it_only():
    h = torch.tensor([1.0, 5.0], requires_grad=True)
    loss = entropy_loss(h, bonus=0.0, floor=3.0, weight=0.1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.1)
    assert h.grad is not None and h.grad.tolist() == pytest.approx([-0.05, 0.0])
    assert float(entropy_loss(h.detach(), bonus=1e-4)) == pytest.approx(-3e-4)
