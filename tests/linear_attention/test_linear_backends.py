"""Which kernels run, what is refused, and that the operators keep their promises to torch."""

import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from needs import numba_installed
from torch.utils.flop_counter import FlopCounterMode

from flopwise import Ledger
from flopwise.core import threads
from flopwise.linear_attention import chosen_backend, linear_attention
from flopwise.linear_attention.kernels import numba as numba_kernels

unchecked_backend = inspect.unwrap(chosen_backend)  # without the tests' shape checks, which would speak first
CHUNK = {"torch": 64, "numba": 16}


def test_auto_tells_what_it_chose_and_why(monkeypatch, inputs):
    query, *_ = inputs(1, 2, 2, 60, 60, 8, 8)
    monkeypatch.setattr(numba_kernels, "AVAILABLE", True)
    assert chosen_backend(query) == ("numba", "on the CPU, the fastest")
    assert chosen_backend(query, backend="torch") == ("torch", "asked for")
    for other, why in ((query.to("meta"), "the query is on meta"), (query.double(), "the query is float64")):
        name, reason = chosen_backend(other)
        assert name == "torch" and why in reason
    monkeypatch.setattr(numba_kernels, "AVAILABLE", False)
    name, reason = chosen_backend(query)
    assert name == "torch" and "pip install 'flopwise[cpu]'" in reason


def test_an_explicit_backend_that_cannot_run_raises(monkeypatch, inputs):
    tensors = inputs(1, 2, 2, 60, 60, 8, 8)
    monkeypatch.setattr(numba_kernels, "AVAILABLE", True)
    with pytest.raises(RuntimeError, match=r"backend='numba' cannot run here.*float64; convert it with .float\(\)"):
        linear_attention(*(x.double() for x in tensors), backend="numba")
    monkeypatch.setattr(numba_kernels, "AVAILABLE", False)
    with pytest.raises(RuntimeError, match="numba is not installed; pip install 'flopwise"):
        linear_attention(*tensors, backend="numba")
    with pytest.raises(ValueError, match="backend is one of auto, torch, numba; got 'cuda'"):
        unchecked_backend(tensors[0], backend="cuda")


def test_without_numba_everything_runs_and_import_never_needs_it():
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from flopwise.linear_attention import linear_attention\n"
        "from flopwise.linear_attention.kernels import numba; numba.AVAILABLE = False\n"
        "print(linear_attention(*torch.ones(3, 1, 2, 20, 4), causal=True).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "160.0\n", done.stderr


def arguments(inputs, backend, causal=True, decays=True, packed=False, dtype=torch.float32):
    query, key, value = (x.requires_grad_() for x in inputs(1 if packed else 2, 4, 2, 30, 30, 4, 3, dtype=dtype))
    texts = 2
    memory, normaliser = torch.ones(texts, 2, 4, 3, requires_grad=True), torch.ones(texts, 2, 4, requires_grad=True)
    decay = torch.full((len(query), 2), 0.9, requires_grad=True) if decays else None
    bounds = torch.tensor([0, 10, 30]) if packed else None
    return query, key, value, memory, normaliser, decay, bounds, causal, True, backend


@pytest.mark.parametrize(
    "options", [{}, {"causal": False, "decays": False}, {"packed": True}, {"decays": False, "dtype": torch.bfloat16}]
)
def test_the_operators_keep_torchs_rules(backend, options, inputs):
    given = arguments(inputs, backend, **options)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flopwise.linear_attention.default, given, test_utils=checks)
    result = torch.ops.flopwise.linear_attention(*given)
    of_results = [torch.ones_like(x) for x in (result[0], *result[2:])]
    backward = *of_results, *given[:7], *(x.detach() for x in result), *given[7:]
    torch.library.opcheck(torch.ops.flopwise.linear_attention_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("packed", [False, True])
def test_vmap_is_a_loop(backend, packed, inputs):
    tensors = [torch.stack(x) for x in zip(*(inputs(1, 4, 2, 30, 30, 4, 3) for _ in range(3)), strict=True)]
    options = {"causal": True, "backend": backend, "cu_seqlens": torch.tensor([0, 10, 30]) if packed else None}

    def attend(query, key, value):
        return linear_attention(query, key, value, return_state=True, **options)

    def loop(*tensors):
        each = [attend(*x) for x in zip(*tensors, strict=True)]
        return torch.stack([x for x, _ in each]), *(torch.stack(x) for x in zip(*(s for _, s in each), strict=True))

    out, state = torch.func.vmap(attend)(*tensors)
    torch.testing.assert_close((out, *state), loop(*tensors))
    out, state = torch.func.vmap(attend, in_dims=(0, None, None))(tensors[0], tensors[1][0], tensors[2][0])
    expected = loop(tensors[0], *(x[:1].expand_as(x) for x in tensors[1:]))
    torch.testing.assert_close((out, *state), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_flops_are_those_of_the_products(backend, causal, inputs):
    """Counted by hand: state products of every query and key, and q k^T, A v within chunks if causal."""
    batch, heads, groups, length, source_length, width, value_width = 2, 4, 2, 300, 300 if causal else 200, 8, 16
    tensors = [x.requires_grad_() for x in inputs(batch, heads, groups, length, source_length, width, value_width)]

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    state = 2 * batch * width * value_width
    within = 2 * batch * heads * length * CHUNK[backend] * (width + value_width) if causal else 0
    forward = state * (groups * source_length + heads * length) + within
    assert flops(lambda: linear_attention(*tensors, causal=causal, backend=backend)) == forward
    keys = 3 if causal else 2
    both = forward + state * (keys * groups * source_length + 2 * heads * length) + 3 * within

    def train():
        linear_attention(*tensors, causal=causal, backend=backend).sum().backward()

    assert flops(train) == both
    with Ledger() as ledger:
        train()
    assert ledger.flops == both


@numba_installed
def test_numba_follows_torchs_number_of_threads(monkeypatch, inputs):
    used = []

    def pool(count):
        used.append(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", pool)
    tensors = inputs(1, 3, 3, 20, 20, 4, 4)
    linear_attention(*tensors, backend="numba")
    torch.set_num_threads(2)
    try:
        linear_attention(*tensors, backend="numba")
    finally:
        torch.set_num_threads(1)
    assert used == [2]


@numba_installed
@pytest.mark.parametrize(("width", "stride"), [(64, 64), (64, 512), (32, 32), (24, 100), (128, 200), (40, 40)])
def test_every_cache_line_of_the_next_chunk_is_queued_and_nothing_is_written_beyond_the_queue(width, stride):
    import numpy as np

    from flopwise.linear_attention.kernels import numba_loops

    x, room = np.zeros(16, np.float32), len(numba_loops.new_queue(width, width))
    memory = np.full(room + 2, -1, np.int64)
    queue, guard = memory[:room], memory[room:]
    queue[:2] = 1
    for count in range(1, 30):  # the tensors of a chunk, and more than there is room for
        numba_loops.fetch(queue, (x, 0, 0, stride), 0, width)
        assert (guard == -1).all() and 1 < queue[1] <= room // 2
        if count == 1:
            entries = queue[2 : 2 * queue[1]].reshape(-1, 2)
            queued = {p + d * i + 64 * n for p, d in entries.tolist() for i in range(4) for n in range(4)}
            first = x.ctypes.data
            needed = {first + 4 * (i * stride + e) for i in range(16) for e in range(0, width, 16)}
            assert all(any(place < line + 64 and place + 64 > line for line in queued) for place in needed)
    before = queue[1] - queue[0]
    numba_loops.fetch_next(queue)
    assert queue[1] - queue[0] == before - 1
