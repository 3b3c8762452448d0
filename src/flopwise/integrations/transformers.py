"""Hugging Face transformers: clustered attention in place of softmax attention in a pretrained model, no fine-tuning.

    from flopwise.integrations import transformers as fw

    fw.use_clustered(model, clusters=64, topk=32)  # or, for all encoder layers alike, once this module is imported:
    model.set_attn_implementation("flopwise_clustered")

What is clustered is self-attention in encoders that see the whole input. Queries of one cluster share a centroid, so a
causal layer would see its future through it: causal layers, decoders and cross attention stay exact, and `describe`
says which layers those are and why.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flopwise.clustered_attention import clustered_attention
from flopwise.integrations.linear_transformers import LinearConfig as LinearConfig
from flopwise.integrations.linear_transformers import LinearForCausalLM as LinearForCausalLM
from flopwise.integrations.linear_transformers import use_linear as use_linear

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from flopwise.integrations.attention_interface import NEEDS_SOFTMAX, attention_modules, configs, padding_mask
except ImportError as error:
    raise ImportError(
        f"the Hugging Face integration needs transformers 5: pip install 'flopwise[hf]' ({error})."
    ) from error

NAME = "flopwise_clustered"
NOT_SELECTED = "it was not selected"


@dataclass(frozen=True)
class Setting:
    """How one layer attends.

    Args:
        clusters: groups of queries; at most this many rows of attention are computed in full.
        topk: keys with which every query attends exactly; 0 for none.
        min_length: inputs shorter than this, padding included, get exact softmax; where it is faster, `tune` finds.
    """

    clusters: int = 64
    topk: int = 32
    min_length: int = 0

    def __post_init__(self) -> None:
        for name, least in (("clusters", 1), ("topk", 0), ("min_length", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is an integer of at least {least}; got {value!r}.")


@dataclass(frozen=True)
class Layer:
    """What `describe` says of one attention module.

    Args:
        name: its path in the model.
        number: its place among the layers that could be clustered, as in `layers=`; None if it could not.
        setting: how it clusters; None if it stays exact.
        exact_because: why it attends exactly; None if it is clustered.
    """

    name: str
    number: int | None
    setting: Setting | None
    exact_because: str | None


def use_clustered(
    model: PreTrainedModel,
    clusters: int | None = None,
    topk: int | None = None,
    layers: Sequence[int] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
) -> None:
    """Switch `model`'s encoder layers to clustered attention, in place.

    The settings are kept in `model.config.flopwise`, which `save_pretrained` saves. After `from_pretrained`,
    `use_clustered(model)` takes them up again.

    Args:
        clusters, topk: see `Setting`; 64 and 32 unless the model's configuration carries settings already.
        layers: numbers of the layers to switch, counted from 0 over the encoder layers as `describe` does; None: all.
        config: settings layer by layer, in place of the three above: what `tune` returned, or the file it wrote.

    Raises:
        ValueError: the model's attention cannot be replaced, it has no layer that may be clustered, `layers` names one
            that is not there, or `config` does not fit.
    """
    _check_can_be_replaced(model)
    names = [name for name, module in attention_modules(model) if cannot_cluster(module) is None]
    if not names:
        raise ValueError(
            f"clustered attention is for encoders; every attention layer of {type(model).__name__} stays exact: "
            f"{'; '.join(sorted({layer.exact_because or '' for layer in describe(model)}))}."
        )
    uniform = clusters is not None or topk is not None or layers is not None
    if config is not None and uniform:
        raise ValueError("`config` sets every layer; give either it or clusters, topk and layers.")
    if config is None and not uniform:
        config = getattr(model.config, "flopwise", None)
    if config is not None:
        settings = read_settings(config)
    else:
        setting = Setting(
            **{name: value for name, value in (("clusters", clusters), ("topk", topk)) if value is not None}
        )
        settings = dict.fromkeys(range(len(names)) if layers is None else layers, setting)
    if wrong := [layer for layer in settings if not 0 <= layer < len(names)]:
        raise ValueError(
            f"layers are numbered 0 to {len(names) - 1} in this {type(model).__name__}; got {wrong}. "
            "`describe(model)` lists them."
        )

    for _, module in attention_modules(model):
        module.flopwise_setting = None
    for number, name in enumerate(names):
        chosen: Any = model.get_submodule(name)
        chosen.flopwise_setting = settings.get(number)
    model.set_attn_implementation(NAME)
    written = write_settings(settings)
    for owner in configs(model):
        owner.flopwise = written


def use_exact(model: PreTrainedModel) -> None:
    """Back to exact attention, which is SDPA's, and no settings."""
    model.set_attn_implementation("sdpa")
    for _, module in attention_modules(model):
        if hasattr(module, "flopwise_setting"):
            del module.flopwise_setting
    for owner in configs(model):
        if hasattr(owner, "flopwise"):
            del owner.flopwise


def describe(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> list[Layer]:
    """Every attention module of `model`, in order, and whether it is clustered.

    Args:
        inputs: arguments of one forward pass. With them the answer is what happened in that pass, for masks and
            lengths decide too; without them, it is what can be said beforehand.
    """
    found, number = [], 0
    for name, module in attention_modules(model):
        reason = cannot_cluster(module)
        place = number if reason is None else None
        number += reason is None
        setting = None
        if reason is None and module.config._attn_implementation != NAME:
            reason = f"its attention implementation is {module.config._attn_implementation!r}"
        elif reason is None:
            setting = _setting(module)
            reason = NOT_SELECTED if setting is None else None
        found.append(Layer(name, place, setting, reason))
    if inputs is None:
        return found

    ran: dict[nn.Module, str | None] = {}
    with observed(lambda call: ran.update({call.module: call.exact_because})), torch.no_grad():
        model(**inputs)
    return [
        replace(layer, exact_because=ran.get(model.get_submodule(layer.name), layer.exact_because)) for layer in found
    ]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention module: its arguments, and why it was answered exactly (None: it was clustered)."""

    module: nn.Module
    query: Float[Tensor, "b h n e"]
    key: Float[Tensor, "b hkv s e"]
    value: Float[Tensor, "b hkv s m"]
    attention_mask: Tensor | None
    scaling: float | None
    exact_because: str | None


@contextmanager
def observed(watch: Callable[[Call], None]) -> Iterator[None]:
    """Inside, every call of `clustered_forward` is shown to `watch` first. One at a time; not for compiled models."""
    global _watch
    if _watch is not None:
        raise RuntimeError("the attention calls are being observed already; one observer at a time.")
    _watch = watch
    try:
        yield
    finally:
        _watch = None


def read_settings(config: Mapping[str, Any] | str | Path) -> dict[int, Setting]:
    """Layer number -> setting, from what `tune` returned or wrote: {"clustered": [{"layer": 0, "clusters": 64, ...}]}.

    Raises:
        ValueError: it is not that.
    """
    loaded: Any = config
    if isinstance(config, str | Path):
        try:
            loaded = json.loads(Path(config).read_text())
        except OSError as error:
            raise ValueError(f"`config` is a dict or a JSON file; {config} cannot be read: {error}.") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"`config` is a dict or a JSON file; {config} is no JSON: {error}.") from error
    try:
        entries = [dict(entry) for entry in loaded["clustered"]]
        return {entry.pop("layer"): Setting(**entry) for entry in entries}
    except (KeyError, TypeError) as error:
        wanted = '{"clustered": [{"layer": 0, "clusters": 64, "topk": 32, "min_length": 0}, ...]}'
        raise ValueError(f"settings look like {wanted}; got {loaded!r} ({error!r}).") from error


def write_settings(settings: Mapping[int, Setting]) -> dict[str, Any]:
    """What `read_settings` reads, ready for JSON; layers that are left out stay exact."""
    return {"clustered": [{"layer": layer, **asdict(settings[layer])} for layer in sorted(settings)]}


def cannot_cluster(module: nn.Module) -> str | None:
    """Why this attention module must stay exact, whatever its input; None if it may be clustered.

    What a module does not say counts against it: a layer that was taken for an encoder's by mistake would leak.
    """
    config: Any = module.config
    if getattr(module, "is_causal", None) is None:
        return "it does not say whether it is causal"
    if module.is_causal:
        return "it is causal"
    if "cross" in type(module).__name__.lower() or getattr(module, "is_cross_attention", False):
        return "it is cross attention"
    if getattr(module, "is_decoder", False) or getattr(config, "is_decoder", False):
        return "it is part of a decoder"
    if getattr(config, "add_cross_attention", False):
        return "it may be the cross attention of a decoder"
    if getattr(config, "is_encoder_decoder", False) and not hasattr(module, "is_decoder"):
        return "it does not say whether it is part of the encoder or the decoder"
    return None


def clustered_forward(
    module: nn.Module,
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b hkv s e"],
    value: Float[Tensor, "b hkv s m"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b n h m"], None]:
    """The attention function that a model calls; registered as "flopwise_clustered".

    Raises:
        ValueError: the model was asked for its attention matrices, which are never formed, or for attention dropout.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "clustered attention forms no attention matrices, so output_attentions=True cannot be served. "
            'Look at them in the exact model: `use_exact(model)`, then `model.set_attn_implementation("eager")`.'
        )
    setting = None if cannot_cluster(module) else _setting(module)
    reason = _exact_because(module, setting, query, key, attention_mask, kwargs)
    if _watch is not None:
        _watch(Call(module, query, key, value, attention_mask, scaling, reason))
    if reason is not None or setting is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"clustered attention has no dropout on attention probabilities; this layer wants {dropout}. Load the "
            "model with its attention dropout set to 0 (in BERT: attention_probs_dropout_prob=0.0), or call "
            "`model.eval()`."
        )
    out = attend(query, key, value, attention_mask, scaling, setting)
    return out.transpose(1, 2).contiguous(), None


def attend(
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b hkv n e"],
    value: Float[Tensor, "b hkv n m"],
    attention_mask: Bool[Tensor, "b 1 1 n"] | None,
    scaling: float | None,
    setting: Setting,
) -> Float[Tensor, "b h n m"]:
    """Clustered attention with what a model passes: a mask of one row, and a scale of its own."""
    keep = None if attention_mask is None else attention_mask[:, 0, 0]
    return clustered_attention(
        query,
        key,
        value,
        clusters=setting.clusters,
        topk=setting.topk,
        key_mask=keep,
        query_mask=keep,
        scale=scaling,
    )


_watch: Callable[[Call], None] | None = None  # see `observed`


def _exact_because(
    module: nn.Module,
    setting: Setting | None,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> str | None:
    """Why this call must be exact; None if it may be clustered. What the user can change comes last."""
    if (reason := cannot_cluster(module)) is not None:
        return reason
    if kwargs.get("is_causal"):
        return "it is causal"
    for name in NEEDS_SOFTMAX:
        if kwargs.get(name) is not None:
            return f"it changes the softmax ({name})"
    length = query.shape[2]
    if length != key.shape[2]:
        return "its queries and keys are not the same positions"
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1:3] != (1, 1)):
        return "its mask is more than padding"
    if setting is None:
        return NOT_SELECTED
    if length < setting.min_length:
        return f"the input is shorter than min_length, {setting.min_length}"
    if length <= setting.clusters:
        return f"the input is no longer than its {setting.clusters} clusters"
    if length <= setting.topk:
        return f"the input is no longer than its top {setting.topk}"
    return None


def _setting(module: Any) -> Setting | None:
    """How this module clusters: what `use_clustered` gave it, or else the same for all."""
    if hasattr(module, "flopwise_setting"):
        return module.flopwise_setting
    if getattr(module.config, "flopwise", None) is not None:
        raise ValueError(
            "this model's configuration carries clustered attention's settings, layer by layer. To take them up, call "
            "`flopwise.integrations.transformers.use_clustered(model)` in place of `set_attn_implementation`."
        )
    return Setting()


def _check_can_be_replaced(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation() or not model._supports_sdpa:
        raise ValueError(
            f"{type(model).__name__} does not look its attention function up by name (or has no exact SDPA form to "
            "fall back on), so it cannot be replaced."
        )


AttentionInterface.register(NAME, clustered_forward)
AttentionMaskInterface.register(NAME, padding_mask)
