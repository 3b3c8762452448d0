"""torch.compile and torch.export, in a process of its own without the tests' shape checks, which it cannot trace."""

import os
import subprocess
import sys

import pytest
from needs import numba_installed

PROGRAM = """
import sys, torch
from flopwise.linear_attention import LinearAttention, linear_attention

backend = sys.argv[1]
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
mask = torch.arange(70) < torch.tensor([[70], [40]])

def tensors(length):
    return [torch.randn(2, h, length, 8, generator=generator).requires_grad_() for h in (4, 2, 2)]

def causal(query, key, value, mask, decay):
    out, state = linear_attention(
        query, key, value, causal=True, key_mask=mask, decay=decay, return_state=True, backend=backend
    )
    return out.sum() + state.memory.square().sum(), out

def run(function, given, mask, decay):
    loss, out = function(*given, mask, decay)
    return out, *torch.autograd.grad(loss, (*given, decay))

decay = torch.tensor([0.9, 0.8]).requires_grad_()
compiled = torch.compile(causal, fullgraph=True)
for m in (None, mask):
    given = tensors(70)
    for found, expected in zip(run(compiled, given, m, decay), run(causal, given, m, decay), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

module = LinearAttention(16, 4, causal=True, backend=backend)
x = torch.randn(2, 70, 16, generator=generator)
with torch.autocast("cpu", torch.bfloat16):
    found, expected = torch.compile(module, fullgraph=True)(x), module(x)
torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)

length = torch.export.Dim("length", min=2, max=1000)
exported = torch.export.export(module, (x,), dynamic_shapes={"x": {1: length}}).module()
longer = torch.randn(2, 333, 16, generator=generator)
torch.testing.assert_close(exported(longer), module(longer))
print("compiled and exported")
"""


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=numba_installed)])
def test_one_graph_compiled_and_exported_for_every_length(backend):
    environment = os.environ | {"FLOPWISE_NO_SHAPE_CHECKS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, backend], env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled and exported\n", done.stderr
