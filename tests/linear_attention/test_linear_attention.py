"""Both kernels, and the function in front of them, against the paper's two forms."""

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import numba_installed

from flopwise.linear_attention import LinearState, linear_attention, reference
from flopwise.linear_attention.feature_maps import elu

# batch, query heads, key heads, queries, keys, width, value width
CASES = {
    "plain": (2, 2, 2, 40, 40, 8, 8),
    "odd sizes": (3, 1, 1, 77, 77, 7, 5),
    "whole vectors": (1, 2, 2, 128, 128, 64, 32),
    "wide": (1, 1, 1, 33, 33, 70, 65),
    "grouped heads": (2, 6, 2, 35, 35, 4, 3),
    "fewer queries": (2, 2, 1, 20, 90, 8, 16),
    "fewer keys": (1, 2, 2, 90, 20, 8, 4),
    "one position": (2, 2, 1, 1, 1, 4, 4),
    "one key": (1, 1, 1, 9, 1, 4, 4),
}
pytestmark = pytest.mark.usefixtures("poisoned")


def settings_for(case, causal, masked, decays, generator) -> dict[str, Any]:
    batch, _, groups, _, source_length, *_ = case
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, source_length, generator=generator) > 0.4
        key_mask[0, :2] = False  # left padding: the first queries see nothing if it is causal
    rate = 1 - torch.rand(groups, generator=generator) / 4 if decays else None
    return {"causal": causal, "key_mask": key_mask, "decay": rate}


def output_and_gradients(function, tensors, weights):
    """What `function` returns, and the gradients of a weighted sum of it."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    outs = function(*tensors)
    gradients = torch.autograd.grad([(o * w).sum() for o, w in zip(outs, weights, strict=True)], tensors)
    return [x.detach().double() for x in (*outs, *gradients)]


def assert_as_good_as_eager(found, eager, exact, dtype, roundings=()):
    """The error is at most twice that of the paper's form computed in the same dtype, and some roundings (16)."""
    precision = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    roundings = (*roundings, *[16] * len(found))
    for ours, theirs, expected, number in zip(found, eager, exact, roundings, strict=False):
        rounding = number * precision * (expected.norm() + 1)
        assert (ours - expected).norm() <= 2 * (theirs - expected).norm() + rounding


@pytest.mark.parametrize(
    ("causal", "masked", "decays"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, False), (True, True, True)],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_output_and_gradients_are_the_quadratic_forms(backend, case, causal, masked, decays, dtype, inputs, generator):
    if backend == "numba" and dtype == torch.float64:
        pytest.skip("the numba kernels compute in float32")
    tensors = inputs(*case, dtype=dtype)
    options = settings_for(case, causal, masked, decays, generator)
    weight = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], generator=generator)

    def ours(query, key, value):
        if options["key_mask"] is not None:
            hole = ~options["key_mask"][:, None, :, None]
            key, value = key.masked_fill(hole, torch.nan), value.masked_fill(hole, torch.nan)
        return [linear_attention(query, key, value, backend=backend, **options)]

    def paper(query, key, value):
        rate = None if options["decay"] is None else options["decay"].to(query.dtype)
        given: dict[str, Any] = options | {"decay": rate}
        return [reference.quadratic(elu(query), elu(key), value, **given)]

    exact = output_and_gradients(paper, [t.double() for t in tensors], [weight.double()])
    eager = output_and_gradients(paper, tensors, [weight.to(dtype)])
    found = output_and_gradients(ours, tensors, [weight.to(dtype)])
    assert_as_good_as_eager(found, eager, exact, dtype)


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "identity"])
@pytest.mark.parametrize("case", [CASES[x] for x in ("odd sizes", "grouped heads", "fewer queries", "fewer keys")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_states_and_their_gradients_are_the_recurrences(backend, case, feature_map, decays, dtype, inputs, generator):
    if backend == "numba" and dtype == torch.float64:
        pytest.skip("the numba kernels compute in float32")
    batch, _, groups, _, _, width, value_width = case
    query, key, value = inputs(*case, dtype=dtype)
    if feature_map == "identity":
        query, key = query.abs(), key.abs()
    memory = torch.randn(batch, groups, width, value_width, generator=generator).to(dtype)
    normaliser = torch.rand(batch, groups, width, generator=generator).to(dtype)
    rate = [1 - torch.rand(groups, generator=generator).to(dtype) / 4] if decays else []
    tensors = [query, key, value, memory, normaliser, *rate]
    weights = [torch.randn(x, generator=generator) for x in ((*query.shape[:3], value_width), memory.shape)]
    weights.append(torch.randn(normaliser.shape, generator=generator))

    def ours(query, key, value, memory, normaliser, decay=None):
        state = LinearState(memory, normaliser)
        out, last = linear_attention(
            query, key, value, causal=True, feature_map=feature_map, decay=decay, state=state, return_state=True,
            backend=backend,
        )  # fmt: skip
        return out, *last

    def paper(query, key, value, memory, normaliser, decay=None):
        phi = elu if feature_map == "elu" else lambda x: x
        out, last = reference.recurrent(phi(query), phi(key), value, decay=decay, state=(memory, normaliser))
        return out, *last

    exact = output_and_gradients(paper, [t.double() for t in tensors], [w.double() for w in weights])
    eager = output_and_gradients(paper, tensors, [w.to(dtype) for w in weights])
    found = output_and_gradients(ours, tensors, [w.to(dtype) for w in weights])
    of_decay = [16] * (len(found) - 1) + [16 * max(case[3:5])] if decays else ()  # a difference of sums
    assert_as_good_as_eager(found, eager, exact, dtype, of_decay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_decay_is_right_over_thousands_of_positions(backend, dtype, inputs):
    tensors = inputs(1, 2, 2, 4096, 4096, 8, 8, dtype=dtype)
    weight = inputs(1, 2, 2, 4096, 4096, 8, 8, dtype=dtype)[0]

    def gradient(dtype, backend):
        decay = torch.tensor([0.9, 0.99], dtype=torch.float64, requires_grad=True)
        out = linear_attention(*(t.to(dtype) for t in tensors), causal=True, decay=decay, backend=backend)
        return torch.autograd.grad(out, decay, weight.to(dtype))[0]

    torch.testing.assert_close(gradient(dtype, backend), gradient(torch.float64, "torch"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_texts_are_those_alone(backend, causal, inputs, generator):
    lengths = [5, 0, 1, 70, 33]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    query, key, value = (x.requires_grad_() for x in inputs(1, 4, 2, sum(lengths), sum(lengths), 8, 5))
    decay = torch.tensor([0.9, 0.7]).requires_grad_() if causal else None
    tensors = [query, key, value, *([decay] if decay is not None else [])]
    options = {"causal": causal, "decay": decay, "return_state": True, "backend": backend}
    out, state = linear_attention(query, key, value, cu_seqlens=bounds, **options)
    alone = [
        linear_attention(*(x[:, :, start:stop] for x in (query, key, value)), **options)
        for start, stop in pairwise(bounds.tolist())
    ]
    expected = torch.cat([x for x, _ in alone], 2), *(torch.cat(x) for x in zip(*(s for _, s in alone), strict=True))
    torch.testing.assert_close((out, *state), expected, rtol=1e-5, atol=1e-5)
    weights = [torch.randn(x.shape, generator=generator) for x in expected]
    found = torch.autograd.grad((out, *state), tensors, weights)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "identity"])
def test_finite_differences_agree_twice(causal, feature_map, inputs):
    query, key, value = inputs(2, 2, 1, 5, 5, 3, 2, dtype=torch.float64)
    memory, normaliser = torch.ones(2, 1, 3, 2).double(), torch.ones(2, 1, 3).double()
    decay = [torch.tensor([0.8], dtype=torch.float64)] if causal else []
    mask = torch.tensor([[True] * 5, [False, True, True, False, True]])

    def attend(query, key, value, memory, normaliser, decay=None):
        state = LinearState(memory, normaliser)
        out, last = linear_attention(
            query, key, value, causal=causal, feature_map=feature_map, key_mask=mask, decay=decay, state=state,
            return_state=True,
        )  # fmt: skip
        return out, *last

    if feature_map == "identity":
        query, key = query.abs() + 0.1, key.abs() + 0.1
    tensors = [x.requires_grad_() for x in (query, key, value, memory, normaliser, *decay)]
    assert torch.autograd.gradcheck(attend, tensors)
    assert torch.autograd.gradgradcheck(attend, tensors)


@numba_installed
@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives_behind_the_numba_kernels(causal, inputs):
    tensors = inputs(1, 4, 2, 40, 40, 5, 6)

    def curvature(dtype, backend):
        x = [t.to(dtype).requires_grad_() for t in tensors]
        first = torch.autograd.grad(
            linear_attention(*x, causal=causal, backend=backend).square().sum(), x, create_graph=True
        )
        return [g.double() for g in torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), x)]

    torch.testing.assert_close(
        curvature(torch.float32, "numba"), curvature(torch.float64, "torch"), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("causal", [False, True])
def test_no_stride_matters(backend, causal, inputs):
    """Transposed heads, steps within a tensor, one value for all positions, and a gradient of one number."""
    query, key, value = inputs(2, 4, 4, 50, 50, 6, 6)
    ways = {
        "transposed": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)],
        "steps": [x.repeat_interleave(2, -1)[..., ::2] for x in (query, key, value)],
        "stride 0": [query[:, :, :1].expand_as(query), key[:, :1].expand_as(key), value[:1].expand_as(value)],
    }
    for tensors in ways.values():
        copies = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in tensors]
        views = [x.detach().requires_grad_() for x in tensors]
        out, expected = (linear_attention(*x, causal=causal, backend=backend) for x in (views, copies))
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        one = torch.ones(()).expand_as(out)
        found = torch.autograd.grad(out, views, one)
        torch.testing.assert_close(found, torch.autograd.grad(expected, copies, one.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_where_nothing_is_attended_to_there_is_zero_and_no_gradient(backend, causal, inputs):
    query, key, value = (x.requires_grad_() for x in inputs(2, 2, 2, 20, 20, 4, 4))
    mask = torch.stack([torch.zeros(20, dtype=torch.bool), torch.arange(20) > 2])
    out = linear_attention(query, key, value, causal=causal, key_mask=mask, backend=backend)
    assert (out[0] == 0).all() and (not causal or (out[1, :, :3] == 0).all()) and (out[1, :, 3:] != 0).all()
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(g.isfinite().all() and (g[0] == 0).all() for g in grads)
    empty = linear_attention(query, key[:, :, :0], value[:, :, :0], causal=causal, backend=backend)
    assert (empty == 0).all()
    assert linear_attention(query[:, :, :0], key, value, causal=causal, backend=backend).shape == (2, 2, 0, 4)


def test_nan_and_infinity_show(backend, inputs):
    query, key, value = inputs(1, 1, 1, 40, 40, 16, 16)
    key[0, 0, 20, 3] = torch.nan
    assert linear_attention(query, key, value, causal=True, backend=backend)[0, 0, 20:].isnan().all()
    key[0, 0, 20, 3] = torch.inf
    assert linear_attention(query, key, value, causal=True, backend=backend)[0, 0, 20:].isnan().all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 70),
    cut=st.integers(0, 70),
    decays=st.booleans(),
    backend=st.sampled_from(["torch", pytest.param("numba", marks=numba_installed).values[0]]),
)
def test_a_text_in_two_parts_is_the_whole(seed, length, cut, decays, backend):
    generator, cut = torch.Generator().manual_seed(seed), min(cut, length)
    query, key, value = (torch.randn(1, 2, length, 5, generator=generator) for _ in range(3))
    decay = torch.tensor([0.9, 0.6]) if decays else None

    def attend(part, state):
        tensors = (x[:, :, part] for x in (query, key, value))
        return linear_attention(*tensors, causal=True, decay=decay, state=state, return_state=True, backend=backend)

    whole, last = attend(slice(0, length), None)
    first, state = attend(slice(0, cut), None)
    second, state = attend(slice(cut, length), state)
    parts = [first, second]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_convex_and_full_attention_ignores_the_order(backend, causal, inputs, generator):
    query, key, value = inputs(1, 2, 2, 40, 40, 8, 8)
    ones = linear_attention(query, key, torch.ones_like(value), causal=causal, backend=backend)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    if not causal:
        order = torch.randperm(40, generator=generator)
        shuffled = linear_attention(query, key[:, :, order], value[:, :, order], backend=backend)
        torch.testing.assert_close(shuffled, linear_attention(query, key, value, backend=backend))


@numba_installed
def test_threads_change_nothing(inputs):
    tensors = [x.requires_grad_() for x in inputs(2, 3, 3, 50, 50, 8, 8)]

    def run():
        out = linear_attention(*tensors, causal=True, backend="numba")
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    alone = run()
    torch.set_num_threads(2)
    try:
        together = run()
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_lowers_the_inputs_and_not_what_is_computed(backend, causal, inputs):
    query, key, value = (x.requires_grad_() for x in inputs(1, 2, 2, 60, 60, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, state = linear_attention(query, key.bfloat16(), value, causal=causal, return_state=True, backend=backend)
        grads = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    lowered = [x.detach().bfloat16().requires_grad_() for x in (query, key, value)]
    expected = linear_attention(*lowered, causal=causal, backend=backend)
    assert out.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    same = torch.autograd.grad(expected.float().square().sum(), lowered)
    torch.testing.assert_close([g.float() for g in grads], [g.float() for g in same], rtol=0, atol=0)


unchecked = inspect.unwrap(linear_attention)  # without the tests' shape checks, which would speak first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 60, 8)}, r"query is \(batch, heads, length, width\); got \(2, 60, 8\)"),
        ({"key": torch.ones(2, 2, 60, 8).double()}, "share one floating-point dtype; got torch.float32, torch.float64"),
        ({"key": torch.ones(2, 2, 60, 7)}, r"share the letters.*\(2, 2, 60, 7\)"),
        ({"value": torch.ones(2, 2, 59, 8)}, r"share the letters.*\(2, 2, 59, 8\)"),
        ({"query": torch.ones(2, 3, 60, 8)}, "multiple of the key heads; got 3 and 2"),
        ({"key_mask": torch.ones(2, 59).bool()}, r"key_mask is boolean, True = keep, of shape \(2, 60\); got .*59"),
        ({"key_mask": torch.ones(2, 60)}, "key_mask is boolean.* got torch.float32.*mask == 0"),
        ({"decay": torch.ones(2)}, "without an order of the positions nothing decays; got .* causal=False"),
        ({"decay": torch.ones(3), "causal": True}, r"one number a key head, shape \(2,\).*got shape \(3,\)"),
        ({"cu_seqlens": torch.tensor([0, 60])}, r"cuts one packed text into c: batch 1.*query \(2, 2, 60, 8\)"),
        (
            {"state": LinearState(torch.ones(2, 2, 9, 8), torch.ones(2, 2, 8))},
            r"memory .* of shape \(2, 2, 8, 8\) .* got \(2, 2, 9, 8\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(change, message):
    arguments = {"query": torch.ones(2, 2, 60, 8), "key": torch.ones(2, 2, 60, 8), "value": torch.ones(2, 2, 60, 8)}
    with pytest.raises(ValueError, match=message):
        unchecked(**arguments | change)
