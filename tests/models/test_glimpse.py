"""The glimpse classifier: saved and loaded to the bit, and what it predicts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from flopwise.attention_sampling import ReceptiveField, entropy_loss, open_image
from flopwise.attention_sampling.patches import receptive_field_of
from flopwise.models import GlimpseClassifier, GlimpseConfig
from flopwise.models.glimpse import attention_network

CONFIG = GlimpseConfig(classes=("cat", "dog", "hen"), channels=3, patch_size=16, n_patches=4, reduction=4, features=12)


def image(height: int = 96, width: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [None, 6])
def test_a_training_step_reaches_every_parameter(window: int | None):
    model = GlimpseClassifier(replace(CONFIG, attention_window=window))
    torch.nn.init.ones_(model.look.attention.get_parameter("4.weight"))  # it begins with zeros: attention is the prior
    high = torch.stack([image(seed=s) for s in range(3)])
    logits, glimpse = model(model.low_views(high), high)
    assert logits.shape == (3, 3) and glimpse.patches.shape == (3, 4, 3, 16, 16)
    (cross_entropy(logits, torch.tensor([0, 1, 2])) + entropy_loss(glimpse.entropy, floor=3.0)).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    constant = "look.attention.4.bias"  # a constant in all logits changes nothing, but for rounding
    assert reached | {constant} == {name for name, _ in model.named_parameters()}


def test_equal_configurations_start_equal():
    one, other = GlimpseClassifier(CONFIG), GlimpseClassifier(CONFIG)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_saved_and_loaded_it_is_the_same_model(tmp_path: Path):
    model = GlimpseClassifier(CONFIG)
    model.save(tmp_path / "model")
    loaded = GlimpseClassifier.load(tmp_path / "model")
    assert loaded.config == CONFIG
    for a, b in zip(model.predict([image()]), loaded.predict([image()]), strict=True):
        torch.testing.assert_close(a.probabilities, b.probabilities)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_window_is_judged_by_itself():
    network = attention_network(2, 4, window=6)
    low = torch.rand(1, 2, 13, 16, generator=torch.Generator().manual_seed(0))
    logits = network(low)
    assert logits.shape == (1, 1, 4, 6)
    torch.testing.assert_close(network(low[:, :, 4:10, 6:12])[0, 0, 0, 0], logits[0, 0, 2, 3])
    assert receptive_field_of(network) == ReceptiveField(stride=(2, 2), size=(6, 6))


def test_what_is_no_model_is_explained(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a folder with config.json and model.safetensors; .* lacks config.json"):
        GlimpseClassifier.load(tmp_path)
    GlimpseClassifier(CONFIG).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "Other"}))
    with pytest.raises(ValueError, match="not the configuration of a GlimpseClassifier"):
        GlimpseClassifier.load(tmp_path)
    with pytest.raises(ValueError, match="so that it can be saved"):
        GlimpseConfig(classes=2, prior="dark")


@pytest.mark.parametrize("kind", ["tensor", "lazy"])
def test_predict_says_what_it_read(kind: str):
    pixels = (255 * image()).byte()
    high = pixels if kind == "tensor" else open_image(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    model = GlimpseClassifier(CONFIG).train()
    (found,) = model.predict([high], estimator="topk")
    assert found.label in CONFIG.classes  # type: ignore[operator]
    assert float(found.probabilities.sum()) == pytest.approx(1) and float(found.weights.sum()) == pytest.approx(1)
    assert found.attention.ndim == 2 and float(found.attention.sum()) == pytest.approx(1, abs=1e-5)
    padded = torch.nn.functional.pad(pixels, (50,) * 4)
    for (y, x), patch in zip(found.positions.tolist(), found.patches, strict=True):
        torch.testing.assert_close(patch, padded[:, y + 50 : y + 66, x + 50 : x + 66].float() / 255)
    assert model.training
    assert len(model.predict([high], n_patches=2)[0].positions) == 2


def test_images_of_different_sizes_are_predicted_one_after_another():
    model = GlimpseClassifier(CONFIG)
    found = model.predict([image(96, 128), image(80, 200, seed=1)])
    assert found[0].attention.shape != found[1].attention.shape
    alone = model.predict([image(80, 200, seed=1)])[0]
    torch.testing.assert_close(found[1].probabilities, alone.probabilities)


@pytest.mark.parametrize("patch_size", [7, 28, 40, 50, 256])
def test_any_patch_size_gives_unit_features(patch_size: int):
    model = GlimpseClassifier(GlimpseConfig(classes=2, patch_size=patch_size, feature_width=4, features=5))
    features = model.look.feature(torch.rand(2, 1, patch_size, patch_size, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(features.norm(dim=1), torch.full((2,), 8.0))
