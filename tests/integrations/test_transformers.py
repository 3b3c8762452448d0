"""Small random models of several architectures: what is clustered, what stays exact, and that both are right."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from small_models import IMAGE, TEXT, WHISPER, build, image_inputs, speech_inputs, text_inputs, tokens  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from flopwise.clustered_attention import clustered_attention  # noqa: E402
from flopwise.integrations import transformers as fw  # noqa: E402

ENCODERS = {
    "bert": (lambda: build(BertConfig(**TEXT)), text_inputs, 2),
    "roberta": (lambda: build(RobertaConfig(**TEXT)), text_inputs, 2),
    "distilbert": (
        lambda: build(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50)),
        text_inputs,
        2,
    ),
    "vit": (lambda: build(ViTConfig(**IMAGE)), image_inputs, 2),
    "whisper": (lambda: build(WhisperConfig(**WHISPER), WhisperForConditionalGeneration), speech_inputs, 2),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_clustered_and_comes_back(name):
    make, inputs, layers = ENCODERS[name]
    model, batch = make(), inputs()
    exact = first(model(**batch))

    fw.use_clustered(model, clusters=6, topk=4)
    ran = [layer for layer in fw.describe(model, batch) if layer.exact_because is None]
    clustered = first(model(**batch))
    assert [layer.number for layer in ran] == list(range(layers))
    assert 1e-6 < relative(clustered, exact) < 0.5

    fw.use_clustered(model, clusters=1000)  # more clusters than queries: exact
    assert relative(first(model(**batch)), exact) < 1e-5
    fw.use_exact(model)
    torch.testing.assert_close(first(model(**batch)), exact, rtol=0, atol=0)
    assert not hasattr(model.config, "flopwise")


def test_the_layer_computes_clustered_attention_of_its_own_query_key_and_value():
    model, batch = build(BertConfig(**TEXT)), text_inputs()
    fw.use_clustered(model, clusters=6, topk=4, layers=[0])
    calls, outputs = [], []
    attention = model.get_submodule(fw.describe(model)[0].name)
    attention.register_forward_hook(lambda module, arguments, output: outputs.append(output[0]))
    with fw.observed(calls.append):
        model(**batch)
    call = calls[0]
    expected = clustered_attention(call.query, call.key, call.value, clusters=6, topk=4)
    torch.testing.assert_close(outputs[0], expected.transpose(1, 2).flatten(2))


def test_a_scale_of_its_own_is_heeded():
    """Whisper scales its queries itself and asks for a scale of 1."""
    query, key, value = torch.randn(3, 1, 2, 30, 8, generator=torch.Generator().manual_seed(0))
    setting = fw.Setting(clusters=5, topk=3)
    scaled = fw.attend(query * 8**-0.5, key, value, None, 1.0, setting)
    torch.testing.assert_close(scaled, fw.attend(query, key, value, None, None, setting))


@pytest.mark.parametrize("clusters", [6, 36], ids=["clustered", "clusters for the others only"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_text_is_the_text_alone(side, clusters):
    model = build(BertConfig(**TEXT))
    fw.use_clustered(model, clusters=clusters, topk=4)
    alone = tokens(1, 33)
    batch = {
        "input_ids": torch.zeros(2, 45, dtype=torch.long),
        "attention_mask": torch.zeros(2, 45, dtype=torch.long),
        "position_ids": torch.arange(45).expand(2, 45).clone(),
    }
    here = slice(0, 33) if side == "right" else slice(12, 45)
    batch["input_ids"][0, here], batch["input_ids"][1] = alone[0], tokens(1, 45)[0]
    batch["attention_mask"][0, here], batch["attention_mask"][1] = 1, 1
    batch["position_ids"][0, here] = torch.arange(33)
    expected = model(input_ids=alone).last_hidden_state
    assert all(layer.exact_because is None for layer in fw.describe(model, batch))
    torch.testing.assert_close(model(**batch).last_hidden_state[:1, here], expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_where_a_layer_stays_exact():
    model = build(BertConfig(**TEXT))
    batch = text_inputs()
    batch["attention_mask"][0, 25:] = 0
    exact = model(**batch).last_hidden_state
    fw.use_clustered(model, layers=[])
    torch.testing.assert_close(model(**batch).last_hidden_state, exact)


def test_layers_are_chosen_by_number_and_the_rest_says_so():
    model, batch = build(BertConfig(**TEXT)), text_inputs()
    fw.use_clustered(model, clusters=6, topk=4, layers=[1])
    first_layer, second = fw.describe(model, batch)
    assert first_layer.exact_because == "it was not selected" and second.exact_because is None
    with pytest.raises(ValueError, match=r"layers are numbered 0 to 1.*got \[2\]"):
        fw.use_clustered(model, layers=[2])


def test_settings_layer_by_layer_from_a_dict_or_a_file(tmp_path):
    config = {"clustered": [{"layer": 1, "clusters": 7, "topk": 0, "min_length": 41}], "tuned": {"tolerance": 0.99}}
    (tmp_path / "tuned.json").write_text(json.dumps(config))
    for source in (config, tmp_path / "tuned.json", str(tmp_path / "tuned.json")):
        model = build(BertConfig(**TEXT))
        fw.use_clustered(model, config=source)
        assert fw.describe(model)[1].setting == fw.Setting(7, 0, 41)
        assert fw.describe(model, text_inputs(40))[1].exact_because == "the input is shorter than min_length, 41"
        assert fw.describe(model, text_inputs(41))[1].exact_because is None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"clustered": [{"layer": 0, "cluster": 8}]}, "settings look like"),
        ({"layers": []}, "settings look like"),
        ({"clustered": [{"layer": 0, "clusters": 0}]}, "clusters is an integer of at least 1; got 0"),
        ("no/such/file.json", "cannot be read"),
    ],
)
def test_a_wrong_config_is_refused(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        fw.use_clustered(build(BertConfig(**TEXT)), config=config)


def test_config_and_uniform_settings_exclude_each_other():
    with pytest.raises(ValueError, match="give either it or"):
        fw.use_clustered(build(BertConfig(**TEXT)), clusters=8, config={"clustered": []})


def test_settings_are_saved_next_to_the_model_and_load_back(tmp_path):
    model, batch = build(BertConfig(**TEXT)), text_inputs()
    fw.use_clustered(model, clusters=6, topk=4, layers=[1])
    expected = model(**batch).last_hidden_state
    model.save_pretrained(tmp_path)

    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.flopwise == model.config.flopwise
    fw.use_clustered(loaded)
    torch.testing.assert_close(loaded(**batch).last_hidden_state, expected)

    by_name = AutoModel.from_pretrained(tmp_path, attn_implementation="flopwise_clustered").eval()
    with pytest.raises(ValueError, match=r"carries clustered attention's settings.*use_clustered"):
        by_name(**batch)


def test_the_name_alone_clusters_every_encoder_layer():
    model, batch = build(BertConfig(**TEXT)), text_inputs(80)
    model.set_attn_implementation("flopwise_clustered")
    by_name = model(**batch).last_hidden_state
    fw.use_clustered(model)
    assert [layer.setting for layer in fw.describe(model)] == [fw.Setting(64, 32)] * 2
    torch.testing.assert_close(by_name, model(**batch).last_hidden_state)


# What must not be clustered


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2), text_inputs),
        (LlamaConfig(**TEXT, num_key_value_heads=2), text_inputs),
        (BertConfig(**TEXT, is_decoder=True), text_inputs),
    ],
    ids=["gpt2", "llama", "bert as a decoder"],
)
def test_a_causal_model_is_refused_and_by_name_stays_exact(config, inputs):
    model, batch = build(config), inputs()
    exact = first(model(**batch))
    with pytest.raises(ValueError, match=r"clustered attention is for encoders.*it is causal"):
        fw.use_clustered(model)
    model.set_attn_implementation("flopwise_clustered")
    torch.testing.assert_close(first(model(**batch)), exact)
    assert {layer.exact_because for layer in fw.describe(model, batch)} == {"it is causal"}


def test_a_decoder_never_sees_its_future_even_when_it_is_as_long_as_the_encoder():
    model = build(WhisperConfig(**WHISPER), WhisperForConditionalGeneration)
    fw.use_clustered(model, clusters=6, topk=4)
    batch = speech_inputs(50)
    reasons = {layer.name: layer.exact_because for layer in fw.describe(model, batch)}
    assert reasons["model.decoder.layers.0.self_attn"] == "it is causal"
    assert reasons["model.decoder.layers.0.encoder_attn"] == "it is part of a decoder"
    before = model(**batch).logits
    batch["decoder_input_ids"] = batch["decoder_input_ids"].clone()
    batch["decoder_input_ids"][:, 30:] = 7
    torch.testing.assert_close(model(**batch).logits[:, :30], before[:, :30], rtol=0, atol=0)


def test_cross_attention_in_a_text_decoder_stays_exact():
    config = BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = build(config)
    model.set_attn_implementation("flopwise_clustered")
    batch = text_inputs() | {"encoder_hidden_states": torch.randn(2, 40, 32)}
    reasons = {layer.name.rsplit(".", 2)[-2]: layer.exact_because for layer in fw.describe(model, batch)}
    assert reasons == {"attention": "it is causal", "crossattention": "it is cross attention"}


def test_a_text_tower_with_a_causal_mask_stays_exact():
    """CLIP's text layers call themselves non-causal; only their mask tells. Its image tower is clustered."""
    text = {**TEXT, "max_position_embeddings": 77}
    model = build(CLIPConfig(text_config=text, vision_config=IMAGE), CLIPModel)
    batch = text_inputs() | image_inputs()
    batch["attention_mask"][0, 30:] = 0
    exact = model(**batch)
    fw.use_clustered(model, clusters=6, topk=4)
    reasons = [layer.exact_because for layer in fw.describe(model, batch)]
    assert reasons == ["it is causal", "it is causal", None, None]
    torch.testing.assert_close(model(**batch).text_embeds, exact.text_embeds)
    assert relative(model(**batch).image_embeds, exact.image_embeds) > 1e-6


def test_sliding_windows_stay_exact():
    windows: dict[str, Any] = {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    model = build(ModernBertConfig(**TEXT, **windows))
    fw.use_clustered(model, clusters=6, topk=4)
    assert [layer.exact_because for layer in fw.describe(model, text_inputs())] == [
        None,
        "its mask is more than padding",
    ]


def test_a_position_bias_stays_exact():
    model = build(T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64, vocab_size=50))
    batch = text_inputs() | {"decoder_input_ids": tokens(2, 40)}
    exact = first(model(**batch))
    model.set_attn_implementation("flopwise_clustered")
    torch.testing.assert_close(first(model(**batch)), exact)
    encoder = [layer for layer in fw.describe(model, batch) if layer.name.startswith("encoder")]
    assert {layer.exact_because for layer in encoder} == {"it changes the softmax (position_bias)"}


def test_short_inputs_are_exact():
    model = build(BertConfig(**TEXT))
    fw.use_clustered(model, clusters=40)
    assert fw.describe(model, text_inputs(40))[0].exact_because == "the input is no longer than its 40 clusters"
    assert fw.describe(model, text_inputs(41))[0].exact_because is None
    fw.use_clustered(model, clusters=8, topk=50)
    assert fw.describe(model, text_inputs(50))[0].exact_because == "the input is no longer than its top 50"


def test_grouped_keys_and_values():
    """A Llama whose layers are told that they are not causal: the bidirectional encoders made of decoders."""
    model = build(LlamaConfig(**TEXT, num_key_value_heads=2))
    for layer in model.layers:
        layer.self_attn.is_causal = False
    query = torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(2))
    key, value = torch.randn(2, 1, 2, 40, 8, generator=torch.Generator().manual_seed(3))
    module = model.layers[0].self_attn
    module.flopwise_setting = fw.Setting(clusters=6, topk=4)
    out, _ = fw.clustered_forward(module, query, key, value, None, scaling=8**-0.5)
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    expected = clustered_attention(query, *repeated, clusters=6, topk=4).transpose(1, 2)
    torch.testing.assert_close(out, expected)


# Around it


@pytest.mark.parametrize("name", ENCODERS)
def test_attention_matrices_cannot_be_had(name):
    make, inputs, _ = ENCODERS[name]
    model = make()
    fw.use_clustered(model, clusters=6)
    with pytest.raises(ValueError, match="output_attentions=True cannot be served"):
        model(**inputs(), output_attentions=True)


def test_attention_dropout_is_refused_in_training():
    model = build(BertConfig(**TEXT)).train()
    fw.use_clustered(model, clusters=6)
    with pytest.raises(ValueError, match=r"no dropout on attention.*0\.1"):
        model(**text_inputs())


def test_gradients_are_those_of_a_checkpointed_model():
    no_dropout: dict[str, Any] = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    model = build(BertConfig(**TEXT, **no_dropout), BertForSequenceClassification).train()
    fw.use_clustered(model, clusters=6, topk=4)
    batch = text_inputs() | {"labels": torch.tensor([0, 1])}

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradient()
    model.activation_checkpointing_enable()
    assert plain.abs().sum() > 0
    torch.testing.assert_close(gradient(), plain)


def test_a_model_compiles_into_one_graph():
    """In a process of its own: shape checks cannot be traced."""
    code = """
import torch, transformers
from flopwise.integrations import transformers as fw
small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
config = transformers.BertConfig(**small, vocab_size=50)
model = transformers.BertModel(config).eval()
fw.use_clustered(model, clusters=6, topk=4)
batch = {"input_ids": torch.arange(80).view(2, 40) % 50, "attention_mask": torch.ones(2, 40, dtype=torch.long)}
batch["attention_mask"][0, 30:] = 0
with torch.no_grad():
    expected = model(**batch).last_hidden_state
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).last_hidden_state
torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
torch.testing.assert_close(found[0, :30], expected[0, :30], rtol=1e-4, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers_one_line_names_the_extra():
    code = """
import sys
sys.modules["transformers"] = None
import flopwise
try:
    from flopwise.integrations import transformers
except ImportError as error:
    assert "pip install 'flopwise[hf]'" in str(error) and "\\n" not in str(error), error
else:
    raise SystemExit("nothing was raised")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_flopwise_registers_nothing():
    code = """
import flopwise, sys
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_whose_attention_cannot_be_replaced_is_refused():
    config = transformers.DebertaV2Config(
        **{k: v for k, v in TEXT.items() if k not in ("bos_token_id", "eos_token_id")}
    )
    with pytest.raises(ValueError, match="does not look its attention function up by name"):
        fw.use_clustered(build(config))


def first(output: Any) -> torch.Tensor:
    return output.logits if "logits" in output else output[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())
