"""Both kernels, and the function in front of them, against the paper's loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from flopwise.clustered_attention import chosen_backend, clustered_attention, kmeans, reference
from flopwise.clustered_attention.kernels import torch as torch_kernels

# batch, query heads, key heads, queries, keys, width, value width, clusters, topk
CASES = {
    "plain": (2, 2, 2, 40, 40, 8, 8, 5, 0),
    "improved": (2, 2, 2, 40, 40, 8, 8, 5, 4),
    "odd sizes": (3, 1, 1, 77, 131, 7, 5, 9, 13),
    "grouped heads": (2, 6, 2, 33, 33, 4, 3, 4, 5),
    "cross attention": (1, 2, 1, 150, 20, 8, 16, 7, 3),
    "one cluster": (1, 1, 1, 70, 30, 4, 4, 1, 6),
    "one key": (1, 1, 1, 9, 1, 4, 4, 2, 0),
    "many members": (1, 1, 1, 400, 50, 5, 6, 2, 17),
    "one query": (1, 1, 1, 1, 9, 4, 4, 1, 2),
}
MASKS = ("no masks", "masks")


def masks_for(case, masks, generator):
    batch, _, _, length, source_length, *_ = case
    if masks == "no masks" or source_length == 1:
        return None, None
    key_mask = torch.rand(batch, source_length, generator=generator) > 0.4
    key_mask[0] = False  # the first text has fewer keys than `topk`
    key_mask[0, 1:3] = True
    query_mask = torch.rand(batch, length, generator=generator) > 0.3
    query_mask[:, 0] = True
    return key_mask, query_mask


def prepared(case, masks, inputs, generator, dtype):
    batch, heads, groups, length, source_length, width, value_width, clusters, _topk = case
    shape, key_shape = (batch, heads, length, width), (batch, groups, source_length, width)
    tensors = inputs(shape, key_shape, value_width, dtype)
    key_mask, query_mask = masks_for(case, masks, generator)
    assignment = kmeans(tensors[0], clusters=clusters, generator=generator, query_mask=query_mask)
    return tensors, key_mask, query_mask, assignment


def by_reference(query, key, value, assignment, clusters, topk, key_mask):
    if topk == 0:
        return reference.clustered(query, key, value, assignment, clusters, key_mask)
    return reference.improved(query, key, value, assignment, clusters, topk, key_mask)


def output_and_gradients(function, tensors, weight):
    """What `function` returns, and the gradients of a weighted sum of it."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), tensors)
    return [x.detach().double() for x in (out * (weight != 0), *gradients)]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_output_and_gradients_are_the_papers(kernels, case, masks, dtype, inputs, generator):
    *_, clusters, topk = case
    tensors, key_mask, _, assignment = prepared(case, masks, inputs, generator, dtype)
    weight = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], generator=generator)
    weight[assignment < 0] = 0

    def fast(query, key, value):
        scale = query.shape[-1] ** -0.5
        return kernels.attend(query, key, value, key_mask, assignment, clusters=clusters, topk=topk, scale=scale)

    def paper(query, key, value):
        return by_reference(query, key, value, assignment, clusters, topk, key_mask)

    exact = output_and_gradients(paper, [t.double() for t in tensors], weight)
    eager = output_and_gradients(paper, tensors, weight)
    ours = output_and_gradients(fast, tensors, weight)
    precision = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    rounding = 16 * precision * max(x.norm() for x in exact)
    for expected, plain, found in zip(exact, eager, ours, strict=True):
        assert (found - expected).norm() <= 2 * (plain - expected).norm() + rounding


@pytest.mark.parametrize("topk", [0, 3])
@pytest.mark.parametrize("masks", MASKS)
def test_finite_differences_agree_with_clusters_held_fixed(kernels, topk, masks, inputs, generator):
    case = (2, 2, 1, 9, 7, 3, 2, 3, topk)
    tensors, key_mask, _, assignment = prepared(case, masks, inputs, generator, torch.float64)

    def attend(query, key, value):
        out = kernels.attend(query, key, value, key_mask, assignment, clusters=3, topk=topk, scale=0.6)
        return out.masked_fill(assignment[..., None] < 0, 0.0)

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in tensors])


def test_the_whole_function_is_differentiated_right(backend, inputs):
    """The directional derivative, with clusters found anew at both ends of a step too short to change them."""
    tensors = inputs((1, 2, 60, 8), dtype=torch.float64)
    directions = inputs((1, 2, 60, 8), dtype=torch.float64)

    def loss(step):
        moved = [t + step * d for t, d in zip(tensors, directions, strict=True)]
        return clustered_attention(*moved, clusters=5, topk=4, backend=backend).square().sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(step), step)
    difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(2, 24),
    keys=st.integers(2, 24),
    clusters=st.integers(1, 5),
    share=st.floats(0.05, 0.95),
    sharpness=st.floats(0.1, 6.0),
)
def test_improved_is_never_further_from_softmax_than_plain(seed, length, keys, clusters, share, sharpness):
    generator = torch.Generator().manual_seed(seed)
    query = sharpness * torch.randn(1, 1, length, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 1, keys, 4, generator=generator, dtype=torch.float64)
    each_key = torch.eye(keys, dtype=torch.float64)[None, None]  # as values: the output is the attention
    assignment = torch.randint(clusters, (1, 1, length), generator=generator)

    def attention(topk):
        return torch_kernels.attend(query, key, each_key, None, assignment, clusters=clusters, topk=topk, scale=0.5)

    exact = reference.softmax_attention(query, key, each_key)
    plain, improved = attention(0), attention(max(1, round(share * keys)))
    torch.testing.assert_close(improved.sum(-1), torch.ones(1, 1, length, dtype=torch.float64))
    assert ((improved - exact).abs().sum(-1) <= (plain - exact).abs().sum(-1) + 1e-12).all()


@pytest.mark.parametrize("topk", [30, 100])
def test_all_keys_at_the_top_is_softmax_to_rounding(kernels, topk, inputs, generator):
    """In the kernels themselves, not only by the shortcut in front of them."""
    query, key, value = inputs((2, 2, 50, 8), (2, 2, 30, 8), dtype=torch.float64)
    assignment = torch.randint(4, (2, 2, 50), generator=generator)
    out = kernels.attend(query, key, value, None, assignment, clusters=4, topk=min(topk, 30), scale=8**-0.5)
    torch.testing.assert_close(out, reference.softmax_attention(query, key, value), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"clusters": 50}, {"clusters": 64}, {"clusters": 4, "topk": 30}])
@pytest.mark.parametrize("masks", MASKS)
def test_nothing_left_to_approximate_is_softmax_and_says_so(backend, settings, masks, inputs, generator):
    query, key, value = inputs((2, 4, 50, 8), (2, 2, 30, 8))
    assert chosen_backend(query, key, backend=backend, **settings).name == "exact"
    key_mask, query_mask = masks_for((2, 4, 2, 50, 30), masks, generator)
    out = clustered_attention(query, key, value, key_mask=key_mask, query_mask=query_mask, backend=backend, **settings)
    expected = reference.softmax_attention(query, key, value, key_mask)
    if query_mask is not None:
        expected = expected.masked_fill(~query_mask[:, None, :, None], 0.0)
    else:
        torch.testing.assert_close(
            expected, scaled_dot_product_attention(query, key, value, enable_gqa=True), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


LENGTHS = (
    100,
    61,
    17,
    6,
    5,
    1,
)  # of queries and keys: more than clusters * 8, fewer, fewer than topk and than clusters


@pytest.mark.parametrize("clustering", ["kmeans", "hamming"])
@pytest.mark.parametrize("topk", [0, 10])
def test_a_text_gives_the_same_alone_and_padded_with_anything(backend, clustering, topk, inputs):
    tensors = [t.requires_grad_() for t in inputs((len(LENGTHS), 2, 112, 8), dtype=torch.float64)]
    mask = torch.arange(112) < torch.tensor(LENGTHS)[:, None]
    poisoned = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in tensors]
    settings = {"clusters": 6, "topk": topk, "clustering": clustering, "backend": backend}
    padded = clustered_attention(*poisoned, key_mask=mask, query_mask=mask, **settings)
    gradients = torch.autograd.grad(padded.square().sum(), tensors)
    assert (padded[~mask[:, None].expand(-1, 2, -1)] == 0).all()
    for i, length in enumerate(LENGTHS):
        own = [t[i : i + 1, :, :length].detach().requires_grad_() for t in tensors]
        alone = clustered_attention(*own, **settings)
        torch.testing.assert_close(padded[i : i + 1, :, :length], alone, rtol=1e-9, atol=1e-10)
        own_gradients = torch.autograd.grad(alone.square().sum(), own)
        for among, single in zip(gradients, own_gradients, strict=True):
            torch.testing.assert_close(among[i : i + 1, :, :length], single, rtol=1e-9, atol=1e-10)
            assert (among[i, :, length:] == 0).all()


def test_padding_may_lie_anywhere(backend, inputs, generator):
    tensors = [t.requires_grad_() for t in inputs((1, 2, 90, 8))]
    mask = torch.rand(1, 90, generator=generator) > 0.3
    mask[0, 0] = False
    poisoned = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in tensors]
    settings = {"clusters": 5, "topk": 6, "backend": backend}
    among = clustered_attention(*poisoned, key_mask=mask, query_mask=mask, **settings)
    alone = clustered_attention(*(t[:, :, mask[0]] for t in tensors), **settings)
    torch.testing.assert_close(among[:, :, mask[0]], alone, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(alone.square().sum(), tensors)
    for found, single in zip(torch.autograd.grad(among.square().sum(), tensors), expected, strict=True):
        torch.testing.assert_close(found, single, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clusters", [4, 64])
def test_a_text_without_keys_gives_zero_and_no_gradient(backend, clusters, inputs):
    tensors = [t.requires_grad_() for t in inputs((2, 2, 40, 8))]
    key_mask = torch.ones(2, 40, dtype=torch.bool)
    key_mask[0] = False
    out = clustered_attention(*tensors, clusters=clusters, topk=8, key_mask=key_mask, backend=backend)
    assert (out[0] == 0).all() and (out[1] != 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), tensors):
        assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


@pytest.mark.parametrize(("length", "source_length"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_no_queries_and_no_keys_are_defined(backend, length, source_length):
    query, key = torch.ones(2, 2, length, 4, requires_grad=True), torch.ones(2, 2, source_length, 4)
    out = clustered_attention(query, key, key, clusters=2, topk=3, backend=backend)
    assert out.shape == (2, 2, length, 4)
    assert (out == (source_length > 0)).all()
    out.sum().backward()
    mask = torch.ones(2, source_length, dtype=torch.bool)
    assert (clustered_attention(query, key, key, clusters=2, topk=3, key_mask=mask, backend=backend) == out).all()


def test_an_empty_batch_stays_empty(backend):
    empty = torch.ones(0, 2, 50, 4, requires_grad=True)
    out = clustered_attention(empty, empty, empty, clusters=2, topk=3, backend=backend)
    assert out.shape == (0, 2, 50, 4)
    out.sum().backward()


def test_scale_replaces_the_root_of_the_width(backend, inputs):
    query, key, value = inputs((1, 2, 60, 8))
    settings = {"clusters": 4, "topk": 5, "backend": backend}
    scaled = clustered_attention(query, key, value, scale=8**-0.5 / 2, **settings)
    torch.testing.assert_close(scaled, clustered_attention(query / 2, key, value, **settings), rtol=1e-5, atol=1e-6)


def test_tensors_need_not_be_contiguous(backend, inputs):
    """(batch, length, heads, width) in memory, as a projection leaves them."""
    tensors = inputs((2, 3, 60, 8))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    settings = {"clusters": 4, "topk": 5, "backend": backend}
    torch.testing.assert_close(clustered_attention(*strided, **settings), clustered_attention(*tensors, **settings))


def test_a_value_that_is_not_a_number_shows(backend, inputs):
    """Only padding may hold nan: a model that diverged must not look well."""
    query, key, value = inputs((1, 1, 60, 8))
    key[0, 0, 3, 2] = torch.nan
    assert clustered_attention(query, key, value, clusters=4, topk=5, backend=backend).isnan().all()
    query, key, value = inputs((1, 1, 60, 8))
    query[0, 0, 3, 2] = torch.nan
    assert clustered_attention(query, key, value, clusters=4, topk=5, backend=backend)[0, 0, 3].isnan().all()
