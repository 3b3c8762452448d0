"""Which kernels run, what is refused, and that the operators keep their promises to torch."""

import inspect

import needs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flopwise.clustered_attention import chosen_backend, clustered_attention
from flopwise.clustered_attention.clustering import cluster
from flopwise.clustered_attention.kernels import numba as numba_kernels

# Without the tests' shape checks, which would speak first.
unchecked, unchecked_backend = inspect.unwrap(clustered_attention), inspect.unwrap(chosen_backend)


def test_auto_tells_what_it_chose_and_why(monkeypatch, inputs):
    query, key, _ = inputs((1, 2, 60, 8))
    monkeypatch.setattr(numba_kernels, "AVAILABLE", True)
    assert chosen_backend(query, key, clusters=5) == ("numba", "on the CPU, the fastest")
    assert chosen_backend(query, key, clusters=5, backend="torch") == ("torch", "asked for")
    name, reason = chosen_backend(query.to("meta"), key.to("meta"), clusters=5)
    assert name == "torch" and "numba runs on the CPU and the query is on meta" in reason
    monkeypatch.setattr(numba_kernels, "AVAILABLE", False)
    name, reason = chosen_backend(query, key, clusters=5)
    assert name == "torch" and "pip install 'flopwise[cpu]'" in reason
    name, reason = chosen_backend(query, key, clusters=60)
    assert name == "exact" and "clusters >= number of queries" in reason
    name, reason = chosen_backend(query, key, clusters=5, topk=60)
    assert name == "exact" and "topk >= number of keys" in reason


def test_an_explicit_backend_that_cannot_run_raises(monkeypatch, inputs):
    query, key, value = inputs((1, 2, 60, 8))
    monkeypatch.setattr(numba_kernels, "AVAILABLE", False)
    with pytest.raises(RuntimeError, match="numba is not installed; pip install 'flopwise"):
        clustered_attention(query, key, value, clusters=5, backend="numba")
    monkeypatch.setattr(numba_kernels, "AVAILABLE", True)
    with pytest.raises(RuntimeError, match="the query is on meta"):
        chosen_backend(query.to("meta"), key.to("meta"), clusters=5, backend="numba")
    with pytest.raises(ValueError, match="backend is one of auto, torch, numba; got 'cuda'"):
        unchecked_backend(query, key, clusters=5, backend="cuda")


def test_without_numba_everything_runs_in_torch(monkeypatch, inputs):
    tensors = inputs((1, 2, 60, 8))
    expected = clustered_attention(*tensors, clusters=5, topk=4, backend="torch")
    monkeypatch.setattr(numba_kernels, "AVAILABLE", False)
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    assert (clustered_attention(*tensors, clusters=5, topk=4) == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 60, 8)}, r"query is \(batch, heads, length, width\); got \(2, 60, 8\)"),
        ({"key": torch.ones(2, 2, 60, 8).double()}, "share one floating-point dtype; got torch.float32, torch.float64"),
        ({"key": torch.ones(2, 2, 60, 7)}, r"share the letters.*\(2, 2, 60, 7\)"),
        ({"value": torch.ones(2, 2, 59, 8)}, r"share the letters.*\(2, 2, 59, 8\)"),
        ({"query": torch.ones(2, 3, 60, 8)}, "multiple of the key heads; got 3 and 2"),
        ({"key_mask": torch.ones(2, 59).bool()}, r"key_mask is boolean, True = keep, of shape \(2, 60\); got .*59"),
        ({"query_mask": torch.ones(2, 60)}, "query_mask is boolean.* got torch.float32.*mask == 0"),
        ({"clusters": 0}, "clusters is at least 1; got 0"),
        ({"topk": -1}, "topk is at least 0, which is the plain form; got -1"),
        ({"clustering": "lsh"}, "clustering is one of kmeans, hamming; got 'lsh'"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(change, message):
    arguments = {"query": torch.ones(2, 2, 60, 8), "key": torch.ones(2, 2, 60, 8), "value": torch.ones(2, 2, 60, 8)}
    arguments |= {"clusters": 5} | change
    with pytest.raises(ValueError, match=message):
        unchecked(**arguments)


@needs.numba_installed
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_attention_operator_keeps_torchs_rules(masked, dtype, inputs, generator):
    query, key, value = (t.requires_grad_() for t in inputs((2, 4, 30, 4), (2, 2, 25, 4), 3, dtype=dtype))
    mask = torch.rand(2, 25, generator=generator) > 0.5 if masked else None
    assignment = torch.randint(3, (2, 4, 30), generator=generator)
    arguments = (query, key, value, mask, assignment, 3, 5, 0.5)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flopwise.clustered_attend.default, arguments, test_utils=checks)


@pytest.mark.parametrize("clustering", ["kmeans", "hamming"])
def test_the_clustering_operator_keeps_torchs_rules(backend, clustering, inputs):
    query, *_ = inputs((2, 4, 30, 4))
    mask = torch.arange(30) < torch.tensor([[30], [20]])
    checks = ("test_schema", "test_faketensor")
    for query_mask in (None, mask):
        arguments = (query, query_mask, 3, clustering, 0, backend)
        torch.library.opcheck(torch.ops.flopwise.cluster.default, arguments, test_utils=checks)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@needs.numba_installed
def test_flops_are_those_of_the_products(inputs):
    """Counted by hand: b h (C s + n topk) pairs of vectors, two products each forward and five backward."""
    batch, heads, groups, length, source_length, width, value_width, clusters, topk = 2, 4, 2, 300, 200, 8, 16, 5, 7
    shape, key_shape = (batch, heads, length, width), (batch, groups, source_length, width)
    tensors = [t.requires_grad_() for t in inputs(shape, key_shape, value_width)]
    settings = {"clusters": clusters, "topk": topk, "backend": "numba"}
    pairs = batch * heads * (clusters * source_length + length * topk)
    found = flops(lambda: cluster(tensors[0].detach(), None, clusters, "kmeans", 0, "numba"))
    sample = 8 * clusters  # each with 4 candidates a seed, and twice with every centroid
    assert found == 2 * batch * heads * clusters * width * (length + sample * (4 + 2))
    forward = flops(lambda: clustered_attention(*tensors, **settings))
    assert forward == found + 2 * pairs * (width + value_width)
    both = flops(lambda: clustered_attention(*tensors, **settings).sum().backward())
    assert both == forward + 2 * pairs * (3 * width + 2 * value_width)


def test_torch_counts_the_same_but_for_its_tiles_and_its_centroids(inputs):
    tensors = inputs((2, 4, 300, 8))
    in_torch = flops(lambda: clustered_attention(*tensors, clusters=5, topk=7, backend="torch"))
    pairs = 2 * 4 * (5 * 300 + 300 * 7)
    products = 2 * pairs * 16 + flops(lambda: cluster(tensors[0], None, 5, "kmeans", 0, "torch"))
    assert products <= in_torch < 2 * products
