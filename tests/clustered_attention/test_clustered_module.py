import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flopwise.clustered_attention import ClusteredAttention, save_clusters


def module_and_input(generator, **settings):
    module = ClusteredAttention(16, 4, clusters=5, topk=4, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module, torch.randn(2, 70, 16, generator=generator, requires_grad=True)


class Calls(TorchDispatchMode):
    """Counts the clusterings that really run."""

    def __init__(self):
        super().__init__()
        self.clusterings = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.clusterings += function is torch.ops.flopwise.cluster.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("context", "clusterings"), [({}, 2), ({"context_fn": save_clusters}, 1)])
def test_a_checkpointed_gradient_is_the_plain_gradient(backend, context, clusterings, generator):
    module, x = module_and_input(generator, backend=backend)
    weight = torch.randn(2, 70, 16, generator=generator)

    def gradients(forward):
        return torch.autograd.grad((forward(x) * weight).sum(), [x, *module.parameters()])

    plain = gradients(module)
    with Calls() as calls:
        checkpointed = gradients(lambda x: checkpoint(module, x, use_reentrant=False, **context))
    assert calls.clusterings == clusterings
    for expected, found in zip(plain, checkpointed, strict=True):
        assert (expected == found).all()


def test_grouped_heads_and_cross_attention_have_the_right_shapes(backend, generator):
    module, x = module_and_input(generator, key_heads=2, backend=backend)
    assert module.key.weight.shape == (8, 16)
    context = torch.randn(2, 30, 16, generator=generator)
    assert module(x).shape == module(x, context).shape == (2, 70, 16)
    assert (module(x, context) != module(x)).any()


def test_one_mask_stands_for_both_in_self_attention(backend, generator):
    module, x = module_and_input(generator, backend=backend)
    mask = torch.arange(70) < torch.tensor([[70], [40]])
    both = module(x, key_mask=mask, query_mask=mask)
    assert (module(x, key_mask=mask) == both).all() and (module(x, query_mask=mask) == both).all()
    torch.testing.assert_close(both[1:, :40], module(x[1:, :40]), rtol=1e-4, atol=1e-5)


def test_the_seed_decides(backend, generator):
    module, x = module_and_input(generator, backend=backend)
    first = module(x)
    assert (module(x) == first).all()
    module.seed = 1
    assert (module(x) != first).any()


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width is a multiple of heads; got 10 and 4"):
        ClusteredAttention(10, 4, clusters=2)
