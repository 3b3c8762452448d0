"""One decoding step of a layer in torch, in place."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import elu, layer_norm, rms_norm, silu

EPS = 1e-5  # of every norm


def normalise(modern: bool, x: Float[Tensor, "b dim"], out: Float[Tensor, "b dim"]) -> None:
    width = (x.shape[1],)
    out.copy_(rms_norm(x, width, eps=EPS) if modern else layer_norm(x, width, eps=EPS))


def attend(
    modern: bool,
    layer: int,
    projected: Float[Tensor, "b p"],
    taps: Float[Tensor, "layers all_taps qkv"],
    decay: Float[Tensor, " h"],
    memory: Float[Tensor, "layers b h e m"],
    normaliser: Float[Tensor, "layers b h e"],
    recent: Float[Tensor, "layers b taps qkv"],
    out: Float[Tensor, "b dim"],
) -> None:
    """From the projections of x to what the output matrix is applied to; the layer's state moves on by one token."""
    (batch, dim), (heads, width) = out.shape, normaliser.shape[2:]
    qkv = projected[:, : 3 * dim]
    if modern:
        window = torch.cat([recent[layer], qkv[:, None]], 1)
        qkv = (window * taps[layer]).sum(1)
        recent[layer] = window[:, 1:]
    query, key, value = qkv.view(batch, 3, heads, width).unbind(1)
    if modern:
        query, key = rms_norm(query, (width,), eps=EPS), rms_norm(key, (width,), eps=EPS)
    query, key = elu(query) + 1, elu(key) + 1
    s, z = memory[layer], normaliser[layer]
    s.mul_(decay[:, None, None]).add_(key[..., None] * value[..., None, :])
    z.mul_(decay[:, None]).add_(key)
    y = (query[..., None, :] @ s)[..., 0, :] / (query * z).sum(-1, keepdim=True)
    if modern:
        y = rms_norm(y, (width,), eps=EPS) * silu(projected[:, 3 * dim :]).view_as(y)
    out.copy_(y.flatten(1))


def activate(modern: bool, hidden: Float[Tensor, "b ff"]) -> None:
    hidden.relu_()
    if modern:
        hidden.mul_(hidden)
