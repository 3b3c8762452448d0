"""Hugging Face transformers: a linear causal language model with its Auto classes, and linear attention in encoders.

    from flopwise.integrations.linear_transformers import LinearConfig, LinearForCausalLM, use_linear

    model = LinearForCausalLM(LinearConfig(vocab_size=50_000))          # trains with `Trainer`
    model.generate(**inputs, max_new_tokens=100, num_beams=4)           # the cache has a constant size
    model = AutoModelForCausalLM.from_pretrained(folder)                # once this module is imported

    encoder = BertModel(config)
    use_linear(encoder)                                                 # before it is trained, not after

`generate` here is Hugging Face's, with its processors, beams and criteria. `model.model` is the `LinearCausalLM`
inside, whose own `generate` decodes some four times as fast on a CPU.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flopwise.linear_attention import linear_attention
from flopwise.linear_attention.feature_maps import BY_NAME
from flopwise.models import LinearCausalLM, ModelState

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from flopwise.integrations.attention_interface import NEEDS_SOFTMAX, attention_modules, configs, padding_mask
except ImportError as error:
    raise ImportError(
        f"the Hugging Face integration needs transformers 5: pip install 'flopwise[hf]' ({error})."
    ) from error

NAME = "flopwise_linear"


class LinearConfig(PreTrainedConfig):
    """The configuration of `LinearForCausalLM`, in Hugging Face's names.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, recipe: `LinearCausalLM`'s
            vocab_size, dim, depth, heads, ff and recipe.
        max_position_embeddings: its max_length; None for no limit.
        seed: of the initial weights.
    """

    model_type = NAME

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 256,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        intermediate_size: int = 1024,
        recipe: str = "thesis",
        max_position_embeddings: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.recipe = recipe
        self.max_position_embeddings = max_position_embeddings
        self.seed = seed
        super().__init__(**kwargs)


class StateCache(Cache):
    """What `generate` carries from token to token: one `ModelState`, whose size does not depend on how many there were.

    Args:
        state: of tokens seen already; None before the first.
        seen: how many positions those take in the attention mask, padding included.
    """

    def __init__(self, state: ModelState | None = None, seen: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.seen = state, seen

    is_compileable = False  # type: ignore[assignment]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " n"]) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.fork(repeats)

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a recurrent state cannot forget its last tokens, so it cannot be cropped. Keep a state from before: it "
            "is a value, `cache.state`."
        )


class LinearForCausalLM(PreTrainedModel, GenerationMixin):
    """`LinearCausalLM` as Hugging Face's tools expect a model.

    Prompts of different lengths are padded on the left for `generate`; in training, on either side.
    """

    config_class = LinearConfig
    base_model_prefix = "model"
    _is_stateful = True  # no assisted generation: it needs to take tokens back
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.model = LinearCausalLM(
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            config.recipe,  # type: ignore[arg-type]
            max_length=config.max_position_embeddings,
            seed=config.seed,
        )
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = not parameter.is_meta  # type: ignore[attr-defined]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Int[Tensor, "b n"],
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The logits, the loss if there are `labels` (-100 counts for nothing), and the cache if it is used.

        Args:
            attention_mask: (b, at least n), 1 for tokens and 0 for padding; the last n columns count.
            logits_to_keep: of the last positions only; 0 for all.

        Raises:
            ValueError: with a cache, the padding is not on the left.
        """
        length = input_ids.shape[1]
        keep = None if attention_mask is None else attention_mask[:, -length:].bool()
        if keep is not None and keep.all():
            keep = None
        if past_key_values is None and use_cache:
            past_key_values = StateCache()
        if past_key_values is None:
            x = self.model.hidden(input_ids, key_mask=keep)
        else:
            past_key_values.state, x = self.model.advance(input_ids, key_mask=keep, state=past_key_values.state)
            past_key_values.seen += length
        logits = self.model.head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss_function: Any = self.loss_function
            loss = loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StateCache()


def use_linear(model: PreTrainedModel, feature_map: str | None = None) -> None:
    """Switch the attention of an encoder that is yet to be trained to linear attention, in place.

    A model trained with softmax attention computes something else with it: fine-tune, or use clustered attention. The
    softmax's scale 1 / sqrt(width of a head) has no part in it.

    The choice is kept in `model.config.flopwise`, which `save_pretrained` saves. After `from_pretrained`,
    `use_linear(model)` takes it up again.

    Args:
        feature_map: see `flopwise.linear_attention.feature_maps`; "elu" unless the configuration says otherwise.

    Raises:
        ValueError: the model's attention cannot be replaced, part of it is causal, or there is no such feature map.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not look its attention function up by name, so it cannot be replaced."
        )
    if any(module.is_causal is not False for _, module in attention_modules(model)):
        raise ValueError(
            f"`use_linear` is for encoders, and {type(model).__name__} has causal attention, whose cache would grow as "
            "before. For a causal language model with a state of constant size, take `LinearForCausalLM`."
        )
    saved = getattr(model.config, "flopwise", None) or {}
    feature_map = feature_map or saved.get("linear", {}).get("feature_map", "elu")
    if feature_map not in BY_NAME:
        raise ValueError(f"feature_map is one of {', '.join(BY_NAME)}; got {feature_map!r}.")
    model.set_attn_implementation(NAME)
    for owner in configs(model):
        owner.flopwise = {"linear": {"feature_map": feature_map}}


def linear_forward(
    module: nn.Module,
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b hkv s e"],
    value: Float[Tensor, "b hkv s m"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b n h m"], None]:
    """The attention function that a model calls; registered as "flopwise_linear".

    Raises:
        ValueError: the layer asks for what linear attention does not have.
    """
    reason = _obstacle(module, attention_mask, dropout, kwargs)
    if reason:
        raise ValueError(f"linear attention cannot stand in for this {type(module).__name__}: {reason}")
    keep = None if attention_mask is None else attention_mask[:, 0, 0]
    settings: Any = getattr(module.config, "flopwise", None) or {}
    feature_map = settings.get("linear", {}).get("feature_map", "elu")
    out = linear_attention(query, key, value, key_mask=keep, feature_map=feature_map)
    return out.transpose(1, 2).contiguous(), None


def _obstacle(module: Any, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> str:
    """Why this call cannot be linear, with the remedy; empty when it can."""
    if kwargs.get("is_causal", module.is_causal) is not False:
        return "it is causal; take `LinearForCausalLM`."
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1:3] != (1, 1)):
        return "its mask is more than padding: each query may see other keys. Give it a 2-dimensional attention_mask."
    if kwargs.get("output_attentions"):
        return "it was asked for attention matrices, which are never formed; leave output_attentions out."
    for name in NEEDS_SOFTMAX:
        if kwargs.get(name) is not None:
            return f"it changes the softmax ({name}), and there is none."
    if dropout:
        return (
            f"there are no attention probabilities to drop, and it wants {dropout}. Set the attention dropout of the "
            "configuration to 0 (in BERT: attention_probs_dropout_prob=0.0)."
        )
    return ""


AttentionInterface.register(NAME, linear_forward)
AttentionMaskInterface.register(NAME, padding_mask)
AutoConfig.register(NAME, LinearConfig)
AutoModelForCausalLM.register(LinearConfig, LinearForCausalLM)
