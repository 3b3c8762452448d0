"""Hugging Face's tools on linear attention: generate, save and load, Trainer, encoders from scratch."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("accelerate", reason="the extra `hf` is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.trainer import Trainer
from transformers.training_args import TrainingArguments

from flopwise.integrations.linear_transformers import (
    LinearConfig,
    LinearForCausalLM,
    StateCache,
    use_linear,
)
from flopwise.linear_attention import feature_maps, reference

RECIPES = ("thesis", "modern")
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}


@pytest.fixture(params=RECIPES)
def model(request: pytest.FixtureRequest, generator: torch.Generator) -> Any:
    model = LinearForCausalLM(LinearConfig(**SIZES, recipe=request.param, pad_token_id=0, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def prompts(*lengths: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Prompts, padded on the left."""
    longest = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), longest, dtype=torch.int64).unbind(0)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(1, 50, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"num_beams": 2, "length_penalty": 0.2, "early_stopping": True, "eos_token_id": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(6, 6), (3, 9, 5)])
def test_generate_with_its_cache_is_generate_without(model: Any, options, lengths, generator):
    inputs = prompts(*lengths, generator=generator)
    results = [
        model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=use_cache, **options)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)
    assert results[0].shape[1] > max(lengths)


def test_padding_does_not_change_what_is_generated(model: Any, generator):
    inputs = prompts(3, 9, generator=generator)
    together = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    alone = model.generate(inputs["input_ids"][:1, 6:], max_new_tokens=12, do_sample=False)
    assert torch.equal(together[:1, 6:], alone)


def test_greedy_is_the_library_s_own(model: Any, generator):
    inputs = prompts(6, 6, generator=generator)
    theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(theirs, model.model.generate(inputs["input_ids"], max_new_tokens=12))


def test_sampling_with_its_cache_is_sampling_without(model: Any, generator):
    inputs = prompts(3, 9, 5, generator=generator)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)  # generate draws from the global generator
        results.append(model.generate(**inputs, max_new_tokens=12, do_sample=True, top_k=10, use_cache=use_cache))
    assert torch.equal(*results)
    assert not torch.equal(results[0], model.generate(**inputs, max_new_tokens=12, do_sample=True, top_k=10))


def test_the_cache_does_not_grow(model: Any, generator):
    sizes = []
    for new in (2, 30):
        result = model.generate(
            **prompts(6, 4, generator=generator), max_new_tokens=new, do_sample=False, return_dict_in_generate=True
        )
        cache: Any = result.past_key_values
        assert isinstance(cache, StateCache) and cache.get_seq_length() == 6 + new - 1 and cache.state is not None
        sizes.append([part.shape for part in cache.state])
        assert cache.state.position.tolist() == [6 + new - 1, 4 + new - 1]
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_a_cache_goes_on_where_it_was(model: Any, generator):
    inputs = prompts(3, 9, generator=generator)
    ids, mask = inputs.values()
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    torch.testing.assert_close(first.logits[1], whole[1, :7])
    state = first.past_key_values.state
    second = model(ids[:, 7:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 7:])
    torch.testing.assert_close(
        model(ids[:, 7:], attention_mask=mask, past_key_values=StateCache(state, 7), logits_to_keep=1).logits,
        whole[:, -1:],
    )
    assert model(ids).past_key_values is None
    cache = StateCache(state, 7)
    cache.batch_repeat_interleave(2)
    assert cache.state is not None and torch.equal(cache.state.memory[:, 2], state.memory[:, 1])
    with pytest.raises(ValueError, match="cannot be cropped"):
        second.past_key_values.crop(1)


@torch.no_grad()
def test_saved_is_loaded(model: Any, tmp_path: Path, generator):
    inputs = prompts(3, 9, generator=generator)
    model.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json"} <= {path.name for path in tmp_path.iterdir()}
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LinearConfig) and config.recipe == model.config.recipe
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, LinearForCausalLM)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(narrow(**inputs).logits.float(), model(**inputs).logits, atol=0.2, rtol=0.1)


def test_initial_weights_are_the_library_s(generator):
    torch.manual_seed(1)
    config = LinearConfig(**SIZES, recipe="modern", seed=3)
    first: Any = AutoModelForCausalLM.from_config(config)
    second = LinearForCausalLM(config)
    for name, parameter in second.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], parameter), name
    assert first.model.embedding.weight.std() > 0.4


def test_the_loss_is_that_of_the_next_token(model: Any, generator):
    """Labels of -100 count for nothing; padding in training may be on the right."""
    ids = torch.randint(1, 50, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    per_token = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    torch.testing.assert_close(out.loss, per_token.sum() / (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(out.logits[0, :5], model(ids[:1, :5]).logits[0])


def test_trainer_trains_and_resumes_what_it_saved(tmp_path: Path):
    model = LinearForCausalLM(LinearConfig(**SIZES, recipe="modern"))
    ids = torch.arange(24) * 7 % 50
    data = [{"input_ids": ids, "labels": ids}] * 64
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=20,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    assert torch.equal(loaded(ids[None]).logits, model(ids[None]).logits)


def small_encoder() -> Any:
    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("feature_map", ["elu", "squared_relu"])
def test_an_encoder_s_attention_is_the_reference(feature_map, generator):
    model = small_encoder()
    use_linear(model, feature_map)
    inputs = prompts(3, 9, generator=generator)
    seen = {}

    def look(module, arguments, output):
        seen["x"], seen["y"] = arguments[0], output[0]

    layer = model.encoder.layer[0].attention.self
    layer.register_forward_hook(look)
    model(**inputs)
    query, key, value = (
        linear(seen["x"]).unflatten(-1, (3, 8)).transpose(1, 2) for linear in (layer.query, layer.key, layer.value)
    )
    phi = feature_maps.BY_NAME[feature_map]
    keep = inputs["attention_mask"].bool()
    wanted = reference.quadratic(phi(query), phi(key), value, key_mask=keep)
    torch.testing.assert_close(seen["y"], wanted.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_encoder_does_not_see_padding_and_is_saved(tmp_path: Path, generator):
    model = small_encoder()
    before = model(**prompts(9, generator=generator)).last_hidden_state
    use_linear(model, "relu")
    inputs = prompts(3, 9, generator=generator)
    out = model(**inputs).last_hidden_state
    assert out.shape == (2, *before.shape[1:])
    position_ids = torch.arange(6, 9)[None]
    alone = model(inputs["input_ids"][:1, 6:], position_ids=position_ids).last_hidden_state
    torch.testing.assert_close(out[:1, 6:], alone)

    model.save_pretrained(tmp_path)
    loaded: Any = BertModel.from_pretrained(tmp_path).eval()
    assert not torch.allclose(loaded(**inputs).last_hidden_state, out, atol=1e-3)  # softmax, until it is asked
    use_linear(loaded)
    assert torch.equal(loaded(**inputs).last_hidden_state, out)


def test_an_encoder_trains(generator):
    model = small_encoder()
    use_linear(model)
    model.train()
    model(**prompts(3, 9, generator=generator)).last_hidden_state.square().mean().backward()
    weights = [layer.attention.self.key.weight for layer in model.encoder.layer]
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)


def test_what_linear_attention_cannot_do_is_explained(generator):
    with pytest.raises(ValueError, match=r"LlamaModel has causal attention.*LinearForCausalLM"):
        use_linear(LlamaModel(LlamaConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)))
    model = small_encoder()
    with pytest.raises(ValueError, match=r"feature_map is one of elu.*got 'softmax'"):
        use_linear(model, "softmax")
    use_linear(model)
    ids = torch.ones(2, 5, dtype=torch.int64)
    own_keys = torch.ones(2, 1, 5, 5).tril().bool()
    with pytest.raises(ValueError, match="BertSelfAttention: its mask is more than padding"):
        model(ids, attention_mask=own_keys)
    with pytest.raises(ValueError, match="attention matrices"):
        model(ids, output_attentions=True)
    dropping = small_encoder()
    for layer in dropping.encoder.layer:
        layer.attention.self.dropout.p = 0.1
    use_linear(dropping)
    with pytest.raises(ValueError, match=r"wants 0\.1.*attention_probs_dropout_prob=0\.0"):
        dropping.train()(ids)
