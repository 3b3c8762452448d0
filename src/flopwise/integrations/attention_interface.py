"""What clustered and linear attention share in Hugging Face models: which modules, which mask, what rules them out."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

NEEDS_SOFTMAX = ("position_bias", "softcap", "s_aux")  # arguments of a layer that change its softmax


def attention_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that look their attention function up by name, in order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "is_causal") and hasattr(module, "config")
    ]


def configs(model: PreTrainedModel) -> list[Any]:
    """The model's configuration and those of its attention modules, which may be parts of it; each once."""
    found = {id(model.config): model.config}
    for _, module in attention_modules(model):
        found.setdefault(id(module.config), module.config)
    return list(found.values())


def padding_mask(*, mask_function: Any, allow_is_bidirectional_skip: bool = False, **kwargs: Any) -> Tensor | None:
    """The mask of `sdpa`, but one row where all queries have the same.

    One row, (batch, 1, 1, length), marks padding and nothing else: that is what can be clustered or made linear. A full
    matrix means that each query has keys of its own (causal, sliding window, packed texts).
    """
    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
        kwargs["q_length"] = 1
    return sdpa_mask(mask_function=mask_function, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs)
