"""What shape checks stand in the way of: torch.compile, and our own words for broken shapes."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from flopwise.attention_sampling import AttentionSampling, expectation, sample
from flopwise.attention_sampling.expectation import Estimator

if not os.environ.get("FLOPWISE_NO_SHAPE_CHECKS"):

    def test_without_shape_checks():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", __file__],
            env={**os.environ, "FLOPWISE_NO_SHAPE_CHECKS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout

else:

    def look(**options) -> AttentionSampling:
        attention = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Conv2d(2, 1, 1))
        feature = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        module = AttentionSampling(attention, feature, patch_size=8, n_patches=3, **options)
        for parameter in module.parameters():
            if parameter.ndim:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        return module

    def test_broken_shapes_are_explained():
        log_a, features = torch.zeros(2, 3), torch.zeros(2, 4, 5)
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4, 5\).*gather"):
            expectation(log_a, features)
        with pytest.raises(ValueError, match=r"estimator is one of murthy, des_raj.*'raj'"):
            expectation(log_a, features[:, :3], estimator="raj")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"prior is one of brightness, local_contrast.*'dark'"):
            look(prior="dark")

    # torch's own tracer makes an instance of every autograd function it meets, and warns of that
    @pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("estimator", ["murthy", "des_raj", "replacement_loo", "topk"])
    def test_the_expectation_compiles(estimator: Estimator):
        g = torch.Generator().manual_seed(0)
        logits, features = torch.randn(3, 20, generator=g), torch.randn(3, 20, 4, generator=g)
        index = sample(logits, 6, generator=g)

        def value(logits, features):
            log_a = logits.log_softmax(1).gather(1, index)
            f = features.gather(1, index[:, :, None].expand(-1, -1, 4))
            return expectation(log_a, f, estimator=estimator).square().sum()

        results = []
        for function in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
            x, f = logits.clone().requires_grad_(), features.clone().requires_grad_()
            results.append(torch.autograd.grad(function(x, f), (x, f)))
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(eager, compiled)

    @pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("estimator", ["murthy", "des_raj", "replacement", "topk"])
    def test_the_layer_compiles_as_one_graph(estimator: Estimator):
        """The same draw, features and gradients."""
        g = torch.Generator().manual_seed(0)
        low, high = torch.rand(2, 1, 11, 13, generator=g), torch.rand(2, 1, 44, 52, generator=g)
        module = look(estimator=estimator, prior="local_contrast", smoothing=0.1)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        results = []
        for layer in (module, compiled):
            found = layer(low, high)
            gradients = torch.autograd.grad(found.features.square().sum(), list(module.parameters()))
            results.append((found, gradients))
        (eager, eager_gradients), (traced, traced_gradients) = results
        assert torch.equal(eager.positions, traced.positions)
        torch.testing.assert_close(eager.features, traced.features)
        for wanted, found in zip(eager_gradients, traced_gradients, strict=True):
            torch.testing.assert_close(found, wanted)
