"""torch.compile, in a process of its own without the tests' shape checks, which it cannot trace."""

import os
import subprocess
import sys

import needs
import pytest

PROGRAM = """
import sys, torch
from flopwise.clustered_attention import ClusteredAttention, clustered_attention, kmeans

backend = sys.argv[1]
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
mask = torch.arange(70) < torch.tensor([[70], [40]])

def function(query, key, value, mask):
    return clustered_attention(
        query, key, value, clusters=5, topk=4, key_mask=mask, query_mask=mask, backend=backend
    )

def run(function, mask):
    generator.manual_seed(1)
    tensors = [torch.randn(2, h, 70, 8, generator=generator).requires_grad_() for h in (4, 2, 2)]
    out = function(*tensors, mask)
    return out, *torch.autograd.grad(out.square().sum(), tensors)

compiled = torch.compile(function, fullgraph=True)
for m in (None, mask):
    for found, expected in zip(run(compiled, m), run(function, m), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

module = ClusteredAttention(16, 4, clusters=5, topk=4, backend=backend)
x = torch.randn(2, 70, 16, generator=generator)
torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-4, atol=1e-5)
print("compiled")
"""


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=needs.numba_installed)])
def test_forward_and_backward_compile_into_one_graph(backend):
    environment = os.environ | {"FLOPWISE_NO_SHAPE_CHECKS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, backend], env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr
