"""The one operator that `linear_attention` calls, with everything torch wants to know about an operator.

Shape inference, gradients of gradients, `vmap`, and how many FLOPs it costs. It keeps the inputs, the output and its
denominators for the backward pass, and nothing else.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flopwise.linear_attention.kernels import numba as numba_kernels
from flopwise.linear_attention.kernels import torch as torch_kernels
from flopwise.linear_attention.kernels.torch import Gradients, Result

KERNELS = {"torch": torch_kernels, "numba": numba_kernels}


@torch.library.custom_op("flopwise::linear_attention", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    use_elu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Result`, computed by `backend`: see `kernels.torch.forward`."""
    with _no_autocast(query):
        return KERNELS[backend].forward(
            query, key, value, memory, normaliser, decay, cu_seqlens, causal=causal, use_elu=use_elu
        )


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, memory: Tensor, normaliser: Tensor, *_: object) -> Result:
    out = query.new_empty(*query.shape[:3], value.shape[3])
    denominator = memory.new_empty(query.shape[:3])
    return Result(out, denominator, memory.new_empty(memory.shape), normaliser.new_empty(normaliser.shape))


@torch.library.custom_op("flopwise::linear_attention_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor,
    grad_memory: Tensor,
    grad_normaliser: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    denominator: Tensor,
    last_memory: Tensor,
    last_normaliser: Tensor,
    causal: bool,
    use_elu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Gradients`, computed by `backend`: see `kernels.torch.backward`."""
    grads = grad_out, grad_memory, grad_normaliser
    inputs = query, key, value, memory, normaliser, decay, cu_seqlens
    result = Result(out, denominator, last_memory, last_normaliser)
    with _no_autocast(query):
        return KERNELS[backend].backward(*grads, *inputs, result, causal=causal, use_elu=use_elu)


@attend_backward.register_fake
def _(grad_out: Tensor, grad_memory: Tensor, grad_normaliser: Tensor, *inputs: Any) -> Gradients:
    return Gradients(*(x.new_empty(x.shape) for x in inputs[:5]))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, ctx.use_elu, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor, grad_memory: Tensor, grad_normaliser: Tensor) -> tuple:
    query, key, value, memory, normaliser, decay, cu_seqlens, *result = ctx.saved_tensors
    inputs = query, key, value, memory, normaliser, decay, cu_seqlens
    settings = ctx.causal, ctx.use_elu, ctx.backend
    grads = Gradients(*attend_backward(grad_out, grad_memory, grad_normaliser, *inputs, *result, *settings))
    grad_decay = None
    if ctx.needs_input_grad[5]:
        grad_decay = _grad_decay(inputs, Result(*result), grads, grad_memory, grad_normaliser, ctx.use_elu)
    return *grads, grad_decay, None, None, None, None


attend.register_autograd(_backward, setup_context=_save)


def _save_for_second(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, ctx.use_elu, _ = inputs
    ctx.save_for_backward(*tensors[:10])


def _second_backward(ctx: Any, *grads: Tensor) -> tuple:
    """The gradients of the gradients, by differentiating the torch kernel twice.

    `out`, `denominator` and the last state are functions of the inputs: what flows through them is in those gradients.
    """
    saved: tuple[Any, ...] = ctx.saved_tensors
    with torch.enable_grad():  # views, so that what flows on from one input into another is left to the caller's graph
        given: list[Any] = [x if x is None else _variable(x) for x in saved]
    upstream, (query, key, value, memory, normaliser), (decay, cu_seqlens) = given[:3], given[3:8], given[8:]
    inputs = query, key, value, memory, normaliser
    settings = {"causal": ctx.causal, "use_elu": ctx.use_elu}
    with torch.enable_grad():
        result = torch_kernels.forward(query, key, value, memory, normaliser, decay, cu_seqlens, **settings)
        outputs = result.out, result.memory, result.normaliser
        first = torch.autograd.grad(outputs, inputs, upstream, create_graph=True, materialize_grads=True)
    wanted = [x for x in given[:9] if x is not None]
    more = torch.is_grad_enabled()
    second = iter(torch.autograd.grad(first, wanted, grads, create_graph=more, allow_unused=True))
    return *(None if x is None else next(second) for x in given[:9]), *[None] * 8


def _variable(x: Tensor) -> Tensor:
    """x, to differentiate with respect to this use of it."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_(x.is_floating_point())


attend_backward.register_autograd(_second_backward, setup_context=_save_for_second)


def _fold_into_batch(operator: Any, cu_seqlens_at: int) -> None:
    """`vmap` is one more batch dimension; texts packed into one batch are taken one after the other."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size, cu_seqlens = info.batch_size, arguments[cu_seqlens_at]
        every = [
            x if not isinstance(x, Tensor) else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(arguments, in_dims, strict=True)
        ]
        if cu_seqlens is None:
            folded = (x.flatten(0, 1) if isinstance(x, Tensor) else x for x in every)
            results = [x.unflatten(0, (size, -1)) for x in operator(*folded)]
        else:
            each = [operator(*(x[i] if isinstance(x, Tensor) else x for x in every)) for i in range(size)]
            results = [torch.stack(x) for x in zip(*each, strict=True)]
        return tuple(results), (0,) * len(results)

    operator.register_vmap(rule)


_fold_into_batch(attend, 6)
_fold_into_batch(attend_backward, 9)


@register_flop_formula(torch.ops.flopwise.linear_attention)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *arguments: Any, **_: Any) -> int:
    """Keys into the state and queries out of it; causal, also q k^T and its product with v within a chunk."""
    *_states, causal, _use_elu, backend = arguments
    across, within = _products(query, key, value, causal, backend)
    return sum(across) + within


@register_flop_formula(torch.ops.flopwise.linear_attention_backward)
def _backward_flops(*arguments: Any, **_: Any) -> int:
    """The gradients of q, k and v, one product each, R, and S once more if causal; within a chunk six products."""
    _, _, _, query, key, value, *_states, causal, _use_elu, backend = arguments
    (of_keys, of_queries), within = _products(query, key, value, causal, backend)
    return (3 if causal else 2) * of_keys + 2 * of_queries + 3 * within


def _products(
    query: torch.Size, key: torch.Size, value: torch.Size, causal: bool, backend: str
) -> tuple[tuple[int, int], int]:
    """FLOPs of one product of every key, of every query, with a state, and of the two products within chunks."""
    (batch, heads, length, width), (_, groups, source_length, value_width) = query, value
    chunk = min(KERNELS[backend].CHUNK, length) if causal else 0
    across = 2 * batch * groups * source_length * width * value_width, 2 * batch * heads * length * width * value_width
    return across, 2 * batch * heads * length * chunk * (width + value_width)


def _grad_decay(
    inputs: tuple[Any, ...], result: Result, grads: Gradients, grad_memory: Tensor, grad_normaliser: Tensor, elu: bool
) -> Tensor:
    """The gradient of decay, (b, g), from what is known already.

    Position j counts decay^(i - j) at i. phi(k_j) . d phi(k_j) adds up what all its pairs (i, j) do to the loss, and
    likewise of i, where that is 0: the normalised output does not change when phi(q_i) is scaled. What is left, with
    the pairs that involve the first and the last state, S = (S, z):

        decay d decay = S_0 . d S_0 + (n - 1) S_n . d S_n - sum_j j phi(k_j) . d phi(k_j)

    The sum is much larger than the result, whose relative error is up to n decay / (1 - decay) roundings.
    """
    _query, key, _value, memory, normaliser, decay, cu_seqlens = inputs
    position, last = torch.arange(key.shape[2], device=key.device), key.shape[2] - 1
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        position = position - cu_seqlens[:-1].repeat_interleave(lengths, output_size=key.shape[2])
        last = (lengths - 1)[:, None]
    # With elu, d phi is the gradient of x over phi' = min(phi, 1), and phi / phi' = max(x + 1, 1).
    product = ((key + 1).clamp(min=1) if elu else key).double() * grads.key
    of_keys = (product.sum(-1) * position).sum(-1)
    first = (memory.double() * grads.memory).sum((-2, -1)) + (normaliser.double() * grads.normaliser).sum(-1)
    end = (result.memory.double() * grad_memory).sum((-2, -1)) + (result.normaliser.double() * grad_normaliser).sum(-1)
    return (((first + last * end).sum_to_size(decay.shape) - of_keys) / decay).to(decay.dtype)


def _no_autocast(query: Tensor) -> contextlib.AbstractContextManager:
    """Autocast has chosen the inputs' dtype; what is computed from them is not its to lower."""
    device = query.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
