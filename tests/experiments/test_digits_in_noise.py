"""The megapixel task: what is read is what is there, and the low view is its mean."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from flopwise.experiments.digits_in_noise import DIGITS, STROKES, DigitsInNoise, load_digits, strokes


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_the_low_view_is_the_mean_of_the_image(reduction: int):
    low, images, labels = next(iter(DigitsInNoise(side=500, size=3, reduction=reduction)))
    assert low.shape == (3, 1, 504 // reduction, 504 // reduction) and labels.shape == (3,)
    for view, image in zip(low, images, strict=True):
        whole = image.read(0, 0, 0, 504, 504)
        torch.testing.assert_close(avg_pool2d(whole.float() / 255, reduction), view)


def test_a_patch_is_a_part_of_the_image():
    _, (image,), _ = next(iter(DigitsInNoise(side=500, size=1)))
    whole = torch.nn.functional.pad(image.read(0, 0, 0, 504, 504), (60,) * 4)
    for y, x in ((0, 0), (-13, 240), (490, -60), (137, 211), (480, 480)):
        assert torch.equal(image.read(0, y, x, 40, 50), whole[:, y + 60 : y + 100, x + 60 : x + 110])


def test_three_digits_are_of_the_class_and_nothing_overlaps():
    digits, labels = load_digits("train")
    known = {bytes(d.flatten().tolist()): int(label) for d, label in zip(digits, labels, strict=True)}
    _, images, answers = next(iter(DigitsInNoise(side=500, size=8)))
    for image, answer in zip(images, answers.tolist(), strict=True):
        classes = [known[bytes(g.flatten().tolist())] for g in image.glyphs[:DIGITS]]
        assert classes.count(answer) == 3 and len(set(classes)) == 3
        at = torch.tensor(image.at)
        assert len(at) == DIGITS + STROKES
        apart = (at[:, None] - at).abs().amax(-1) + 28 * torch.eye(len(at), dtype=torch.long)
        assert int(apart.min()) >= 28


def test_batches_follow_from_seed_and_number():
    one, other = DigitsInNoise(side=500, size=2), DigitsInNoise(side=500, size=2)
    first, second = (next(iter(one)) for _ in range(2))
    other.load_state_dict({"batch": 1})
    again = next(iter(other))
    assert torch.equal(again[0], second[0]) and not torch.equal(again[0], first[0])
    assert not torch.equal(next(iter(DigitsInNoise(side=500, size=2, seed=1)))[0], first[0])


def test_training_and_test_images_share_nothing():
    train, test = ({bytes(d.flatten().tolist()) for d in load_digits(split)[0]} for split in ("train", "test"))
    assert not train & test
    assert not {bytes(s.flatten().tolist()) for s in strokes(500, seed=0)} & {
        bytes(s.flatten().tolist()) for s in strokes(500, seed=1)
    }
