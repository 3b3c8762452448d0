"""The recurrent form, and the module in both forms."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flopwise.linear_attention import (
    Favor,
    Hedgehog,
    LinearAttention,
    LinearState,
    init_state,
    linear_attention,
    reference,
    step,
)

MAPS = {
    "elu": lambda generator: "elu",
    "taylor2": lambda generator: "taylor2",
    "favor": lambda generator: Favor(8, 12, generator=generator),
    "hedgehog": lambda generator: Hedgehog(2, 8),
}


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("feature_map", MAPS.values(), ids=MAPS)
def test_steps_are_the_parallel_form(backend, feature_map, decays, inputs, generator):
    query, key, value = inputs(2, 4, 2, 20, 20, 8, 5)
    feature_map, decay = feature_map(generator), torch.tensor([0.9, 0.5]) if decays else None
    options = {"feature_map": feature_map, "decay": decay}
    out, last = linear_attention(query, key, value, causal=True, return_state=True, backend=backend, **options)
    _, state = linear_attention(
        *(x[:, :, :12] for x in (query, key, value)), causal=True, return_state=True, backend=backend, **options
    )
    for i in range(12, 20):
        state, y = step(state, query[:, :, i], key[:, :, i], value[:, :, i], **options)
        torch.testing.assert_close(y, out[:, :, i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_steps_from_nothing_are_the_papers(inputs):
    query, key, value = inputs(2, 4, 2, 9, 9, 8, 5, dtype=torch.float64)
    expected, last = reference.recurrent(query.abs(), key.abs(), value)
    state = init_state(2, 2, 8, 5, torch.float64)
    for i in range(9):
        state, y = step(state, query[:, :, i].abs(), key[:, :, i].abs(), value[:, :, i], feature_map="identity")
        torch.testing.assert_close(y, expected[:, :, i])
    torch.testing.assert_close(tuple(state), last)


def test_a_step_leaves_its_state_alone_and_gradients_pass_through(inputs):
    query, key, value = (x[:, :, 0].requires_grad_() for x in inputs(2, 4, 2, 1, 1, 8, 5))
    state = LinearState(torch.rand(2, 2, 8, 5), torch.rand(2, 2, 8))
    before = [x.clone() for x in state]
    new, out = step(state, query, key, value)
    assert all((x == y).all() for x, y in zip(state, before, strict=True))
    assert all((x != y).any() for x, y in zip(new, before, strict=True))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (query, key, value)))


def test_reorder_takes_the_states_of_beams(inputs):
    query, key, value = inputs(3, 2, 2, 5, 5, 4, 4)
    _, state = linear_attention(query, key, value, causal=True, return_state=True)
    beams = torch.tensor([2, 0, 0, 1])
    _, expected = linear_attention(query[beams], key[beams], value[beams], causal=True, return_state=True)
    torch.testing.assert_close(state.reorder(beams), expected)


def test_a_low_precision_step_keeps_a_float32_state(inputs):
    query, key, value = (x[:, :, 0] for x in inputs(2, 4, 2, 1, 1, 8, 5, dtype=torch.bfloat16))
    state, out = step(init_state(2, 2, 8, 5), query, key, value)
    assert out.dtype == torch.bfloat16 and state.memory.dtype == state.normaliser.dtype == torch.float32
    torch.testing.assert_close(out[:, ::2], value)  # the first position sees only itself
    nothing = step(init_state(2, 2, 8, 5), query, torch.full_like(key, -torch.inf), value)[1]
    assert (nothing == 0).all()


@pytest.mark.parametrize("feature_map", MAPS.values(), ids=MAPS)
def test_a_module_steps_as_it_attends(feature_map, generator):
    module = LinearAttention(32, 4, key_heads=2, causal=True, feature_map=feature_map(generator))
    x = torch.randn(2, 15, 32, generator=generator)
    out = module(x)
    state, start = module.prefill(x[:, :7])
    outs = [start]
    for i in range(7, 15):
        state, y = module.step(state, x[:, i])
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.prefill(x, module.init_state(2))[1], out)


def test_a_module_attends_to_a_context_with_padding(generator):
    module = LinearAttention(16, 2)
    x, context = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 9, 16, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    out = module(x, context, key_mask=mask)
    torch.testing.assert_close(out[1:], module(x[1:], context[1:, :4]))
    packed = module(torch.cat([context[:1], context[1:, :4]], 1), cu_seqlens=torch.tensor([0, 9, 13]))
    torch.testing.assert_close(packed[:, 9:], module(context[1:, :4]))


def test_checkpointing_changes_nothing(generator):
    module = LinearAttention(16, 2, causal=True)
    x = torch.randn(2, 30, 16, generator=generator, requires_grad=True)

    def gradients(forward):
        return torch.autograd.grad(forward(x).square().sum(), (x, *module.parameters()))

    again = gradients(lambda x: checkpoint(module, x, use_reentrant=False))
    torch.testing.assert_close(again, gradients(module), rtol=0, atol=0)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width is a multiple of heads; got 30 and 4"):
        LinearAttention(30, 4)
