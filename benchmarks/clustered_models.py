"""What clustered attention keeps and saves in pretrained models; the figures of the README's table come from here.

    python benchmarks/clustered_models.py text speech length tune

Each record is appended to results/clustered_models.jsonl: the figures, the goal beside them, and the settings. One
thread; seconds are the processor's, exact and clustered taking turns, medians.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from parts import run_parts
from torch import Tensor

from flopwise.experiments import clustered
from flopwise.experiments.clustered import Run, answers, measure, spoken_prompts, stretch, wikipedia
from flopwise.integrations.transformers import use_clustered, use_exact
from flopwise.integrations.tune import Answer, Batch, tune

RESULTS = Path(__file__).parent / "results" / "clustered_models.jsonl"
Record = dict[str, Any]


def text() -> Iterator[Record]:
    """MiniLM on texts of 512 tokens: cosine, nearest neighbours, topics."""
    goal = {"cosine": {"mean": 0.992, "min": 0.98}, "neighbours_kept": 0.86, "topic_points": 1.0}
    for clusters, topk in ((64, 64), (64, 32), (32, 32), (100, 64), (64, 0)):
        yield measured(Run("text", clusters, topk, 512, 600), goal if (clusters, topk) == (64, 64) else None)


def speech() -> Iterator[Record]:
    """Whisper tiny.en: words that change, and the time of the encoder's attention."""
    goal = {"word_error": 0.03, "attention_time": 0.7}
    required = [(clusters, topk) for clusters in (25, 50, 100) for topk in (32, 0)]
    for clusters, topk in (*required, (50, 96), (64, 64), (100, 64)):
        yield measured(Run("speech", clusters, topk, 1500, 64), goal if topk else None)
    for clusters, topk in ((100, 32), (64, 64), (100, 64)):
        yield measured(Run("speech", clusters, topk, 1500, 24, joined=True), None)


def length() -> Iterator[Record]:
    """A BERT-shaped model end to end, with the ceiling: attention that costs nothing."""
    goals = {4096: 2.7, 8192: 4.2}
    for tokens in (512, 1024, 2048, 4096, 8192):
        record = measured(Run("length", 32, 32, tokens, 1), {"speedup": goals[tokens]} if tokens in goals else None)
        seconds = record["seconds"]
        record["speedup"] = seconds["exact"] / seconds["clustered"]
        record["ceiling"] = seconds["exact"] / seconds["without"]
        yield record


def tuned() -> Iterator[Record]:
    """`tune` at 0.99: on inputs it never saw, for two models, and at lengths where nothing can be saved."""
    model, tokenizer = clustered.minilm()
    yield tuned_on("MiniLM, 128 tokens", model, wikipedia(tokenizer, texts=96, length=128).batches(), goal="stay exact")
    yield tuned_on("MiniLM, 512 tokens", model, wikipedia(tokenizer, texts=96, length=512).batches(), goal=None)
    stretch(model, 2048)
    batches = wikipedia(tokenizer, texts=48, length=2048).batches(2)
    yield tuned_on("MiniLM stretched, 2048 tokens", model, batches, goal="holds")
    whisper, tokenizer = clustered.whisper()
    clips = [{"input_features": mel} for mel in spoken_prompts(72).split(4)]
    record = tuned_on("Whisper tiny.en encoder", whisper.model.encoder, clips, goal="holds", answer=states)
    said, heard = [], []
    for batch in clips[::3]:
        use_exact(whisper)
        said += clustered.transcribe(whisper, tokenizer, batch["input_features"])
        use_clustered(whisper, config=record["config"])
        heard += clustered.transcribe(whisper, tokenizer, batch["input_features"])
    errors, words = (sum(column) for column in zip(*map(clustered.word_errors, said, heard), strict=True))
    yield record | {"word_error": errors / words, "words": words}


def states(model: Any, batch: Batch) -> Tensor:
    """Every frame's state: the decoder reads them all, so their mean would be too lenient an answer."""
    return model(**batch).last_hidden_state.flatten(1)


def tuned_on(
    name: str, model: Any, batches: list[dict[str, Tensor]], *, goal: str | None, answer: Answer = answers
) -> Record:
    """Tune on every batch but each third; those are for the proof, with the settings that came out."""
    unseen = batches[::3]
    start = time.process_time()
    found = tune(model, [batch for i, batch in enumerate(batches) if i % 3], tolerance=0.99, answer=answer)
    seconds = time.process_time() - start

    with torch.no_grad():
        exact = torch.cat([answer(model, batch) for batch in unseen])
        use_clustered(model, config=found.config)
        cosine = torch.cosine_similarity(exact, torch.cat([answer(model, batch) for batch in unseen]))
    use_exact(model)
    return {
        "kind": "tune",
        "model": name,
        "tolerance": 0.99,
        "goal": goal,
        "config": found.config,
        "verdict": found.verdict,
        "unseen": {"examples": len(cosine), "mean": float(cosine.mean()), "min": float(cosine.min())},
        "tuning_seconds": seconds,
        "timings": [record for record in found.records if record["kind"] == "timing"],
        "layers": [record for record in found.records if record["kind"] == "layer"],
        "candidates": [record for record in found.records if record["kind"] == "candidate"],
    }


def measured(run: Run, goal: dict[str, Any] | None) -> Record:
    return measure(run, Path()) | {"goal": goal}


PARTS = {"text": text, "speech": speech, "length": length, "tune": tuned}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, RESULTS, unshown=("transcripts", "timings", "layers", "candidates"))
