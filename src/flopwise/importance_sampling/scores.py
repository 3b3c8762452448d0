"""How much an example matters: scores that stand for the norm of its gradient."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flopwise.core.batch import Examples

# One loss per example, (b,) or (b, T, ...), unreduced; or that and a mask of its shape, True = the position counts.
Losses = Tensor | tuple[Tensor, Tensor]


def split_losses(losses: Losses, examples: int) -> tuple[Float[Tensor, "b ..."], Bool[Tensor, "b ..."] | None]:
    """Checks what a loss function returned and splits it into losses and mask.

    Raises:
        ValueError: the loss is already reduced, has another number of examples, or a mask of another shape.
    """
    losses, mask = losses if isinstance(losses, tuple) else (losses, None)
    if losses.ndim == 0 or len(losses) != examples:
        raise ValueError(
            f"the loss is per example: {examples} examples need a tensor of shape ({examples},) or ({examples}, T); "
            f"got {tuple(losses.shape)}. Do not reduce it: reduction='none' in torch, no mean() or sum() over examples."
        )
    if mask is None:
        return losses, None
    if mask.shape != losses.shape:
        raise ValueError(
            f"the mask of a loss has its shape, True where a position counts; got mask {tuple(mask.shape)} "
            f"and losses {tuple(losses.shape)}."
        )
    return torch.where(mask.bool(), losses, 0.0), mask.bool()


def upper_bound_score(
    outputs: Float[Tensor, "b ..."], targets: Any, loss: Callable[[Tensor, Any], Losses]
) -> Float[Tensor, " b"]:
    """S_i = ||d loss_i / d z_i||, z_i the outputs: up to a constant, an upper bound of the gradient norm ||G_i||.

    Costs a backward pass through the loss alone, none through the model. For sequences z_i holds every position, so
    S_i is the root of the sum of squares over the unmasked ones. Half-precision outputs are scored in float32.

    Args:
        outputs: the last layer's pre-activations (logits), one row an example; detached here.
        targets: what `loss` takes as its second argument.
        loss: (outputs, targets) -> (b,) or (b, T), unreduced; or that and its mask.

    Returns:
        The scores, not normalised, float32 or float64.

    Raises:
        ValueError: the loss is already reduced.

    Source: Katharopoulos & Fleuret, ICML 2018, section 3.2.
    """
    return score_and_mask(outputs, targets, loss)[0]


def score_and_mask(
    outputs: Float[Tensor, "b ..."], targets: Any, loss: Callable[[Tensor, Any], Losses]
) -> tuple[Float[Tensor, " b"], Bool[Tensor, "b ..."] | None]:
    """`upper_bound_score`, and the mask that `loss` returned on the way."""
    with torch.enable_grad():
        z = _at_least_float32(outputs.detach()).requires_grad_()
        losses, mask = split_losses(loss(z, targets), len(z))
        (gradient,) = torch.autograd.grad(losses.sum(), z)
    return score_from_gradient(gradient), mask


def score_from_gradient(gradient: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """||d loss_i / d z_i|| from the gradient at the outputs."""
    return torch.linalg.vector_norm(_at_least_float32(gradient).reshape(len(gradient), -1), dim=1)


@torch.no_grad()
def cross_entropy_score(
    logits: Float[Tensor, "b ... vocabulary"],
    targets: Int[Tensor, "b ..."],
    *,
    ignore_index: int = -100,
    chunk: int = 8192,
) -> Float[Tensor, " b"]:
    """`upper_bound_score` of softmax cross-entropy in closed form, never holding a second tensor as large as `logits`.

    S^2 = ||p - onehot(y)||^2 = (1 - p_y)^2 + sum_{j != y} p_j^2, with both terms from the log-sum-exps of z and 2z over
    the classes other than y: nothing cancels when p_y is close to 1.

    Args:
        logits: class dimension last; sequences are (b, T, vocabulary).
        targets: class indices; positions equal to `ignore_index` do not count.
        chunk: how many classes are looked at at once.
    """
    ignored = targets == ignore_index
    y = targets.masked_fill(ignored, 0)[..., None]
    z_y = _at_least_float32(logits.gather(-1, y))[..., 0]
    first, second = [], []
    for start in range(0, logits.shape[-1], chunk):
        z = _at_least_float32(logits[..., start : start + chunk])
        columns = torch.arange(start, start + z.shape[-1], device=z.device)
        z = z.masked_fill(columns == y, -torch.inf)
        first.append(z.logsumexp(-1))
        second.append((2 * z).logsumexp(-1))
    others = torch.stack(first).logsumexp(0)
    others_squared = torch.stack(second).logsumexp(0)
    total = torch.logaddexp(others, z_y)
    squared = torch.sigmoid(others - z_y) ** 2 + (others_squared - 2 * total).exp()
    return squared.masked_fill(ignored, 0.0).flatten(1).sum(1).sqrt() if squared.ndim > 1 else squared.sqrt()


def binary_cross_entropy_score(logits: Float[Tensor, "b ..."], targets: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """`upper_bound_score` of binary cross-entropy with logits, |sigmoid(z) - y|; several outputs: their norm."""
    error = _at_least_float32(logits.detach()).sigmoid() - targets
    return error.reshape(len(error), -1).norm(dim=1)


def squared_error_score(outputs: Float[Tensor, "b ..."], targets: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """`upper_bound_score` of the squared error summed over an example's outputs: 2 ||y^ - y||."""
    error = _at_least_float32(outputs.detach()) - targets
    return 2 * error.reshape(len(error), -1).norm(dim=1)


@torch.no_grad()
def loss_score(
    outputs: Float[Tensor, "b ..."], targets: Any, loss: Callable[[Tensor, Any], Losses]
) -> Float[Tensor, " b"]:
    """The loss itself, summed over an example's positions: the common heuristic, for comparison.

    It keeps 65-80 % of the variance reduction and overstates it (its own tau^2 claimed 11.5 where 4.7 was real), so it
    must not decide when to sample.
    """
    losses, _ = split_losses(loss(_at_least_float32(outputs), targets), len(outputs))
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def last_layer_gradient_norm(score: Float[Tensor, " b"], hidden: Float[Tensor, "b width"]) -> Float[Tensor, " b"]:
    """S_i sqrt(||h_i||^2 + 1): the exact norm of the gradient of the last layer's weight and bias.

    Exact when the last layer is applied once an example (no sequence), with h its input and S the upper-bound score.
    """
    return score * (hidden.detach().pow(2).sum(1) + 1).sqrt()


def gradient_norm_score(
    model: nn.Module, inputs: Any, targets: Any, loss: Callable[[Tensor, Any], Losses], *, chunk: int = 64
) -> Float[Tensor, " b"]:
    """||G_i||, the exact norm of each example's gradient over all trainable parameters: the oracle, not for training.

    Costs a forward and backward pass and holds `chunk` copies of the gradient.

    Args:
        model: called as `model(inputs)`. Put batch normalisation and dropout in `eval()` mode: with batch statistics an
            example has no gradient of its own.
        inputs, targets: pytrees, dimension 0 is the example.
        loss: (outputs, targets) -> unreduced losses, or those and their mask.
        chunk: examples at a time.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def example_loss(parameters: dict[str, Tensor], example: Any) -> Tensor:
        x, y = pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, example)
        losses, _ = split_losses(loss(torch.func.functional_call(model, parameters, (x,)), y), 1)
        return losses.sum()

    def squared_norm(example: Any) -> Tensor:
        gradients = torch.func.grad(example_loss)(parameters, example)
        return torch.stack([g.pow(2).sum() for g in gradients.values()]).sum()

    examples = Examples((inputs, targets))
    return torch.cat(
        [
            torch.func.vmap(squared_norm)(examples[start : start + chunk].data)
            for start in range(0, len(examples), chunk)
        ]
    ).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
