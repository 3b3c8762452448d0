"""Claim 6: clustered attention approximates pretrained models without fine-tuning."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flopwise.experiments.claims.claim import Claim, Judgement, of_kind
from flopwise.experiments.runner import Record

if TYPE_CHECKING:
    from flopwise.experiments.clustered import Plan

COSINE, WORDS, TOPICS = 0.99, 0.03, 0.01
SETTING = (64, 64)  # clusters, top-k


def plan(full: bool) -> "Plan":
    from flopwise.experiments.clustered import Plan

    if full:
        return Plan(texts=600, clips=64, lengths=(512, 1024, 2048, 4096, 8192))
    return Plan(texts=48, clips=16, settings=(SETTING,), lengths=(512, 2048, 4096))


def run(folder: Path, full: bool) -> None:
    from flopwise.experiments import clustered

    clustered.compare(plan(full), folder)


def missing(full: bool) -> list[str]:
    try:
        from flopwise.experiments.clustered import missing
    except ImportError:
        return ["pip install 'flopwise[hf]'"]
    return missing(plan(full))


def judge(records: Sequence[Record]) -> Judgement:
    """The newest record of the setting in each task."""

    def newest(kind: str) -> Record:
        return [r for r in of_kind(records, "clustered", kind) if (r["clusters"], r["topk"]) == SETTING][-1]

    text, speech = newest("text"), newest("speech")
    longest = max(of_kind(records, "clustered", "length"), key=lambda r: r["length"])
    cosine, topics = text["cosine"]["mean"], text["topic_accuracy"]
    speed = longest["seconds"]["exact"] / longest["seconds"]["clustered"]
    encoder, minilm = (r["seconds"]["clustered"] / r["seconds"]["exact"] for r in (speech, text))
    ours = (
        f"MiniLM: cosine {cosine:.3f}, topics {100 * topics['clustered']:.1f} % (exact {100 * topics['exact']:.1f} %); "
        f"Whisper: {100 * speech['word_error']:.1f} % of words differ; a BERT of {longest['length']} tokens "
        f"{speed:.1f} × as fast"
    )
    one = 1 / text["examples"]
    kept = (
        cosine >= COSINE and topics["clustered"] >= topics["exact"] - max(TOPICS, one) - 1e-9,
        speech["word_error"] < WORDS,
    )
    why = (
        f"answers {'kept' if all(kept) else 'kept in one of two models' if any(kept) else 'lost'}; time of the model "
        f"{minilm:.2f} × exact's at {text['length']} tokens (MiniLM), {encoder:.2f} × at {speech['length']} frames"
    )
    good = all(kept) and speed > 1 and encoder < 1
    return Judgement("reproduced" if good else "in part" if any(kept) else "not reproduced", ours, why)


CLAIM = Claim(
    name="pretrained",
    number=6,
    statement="Clustered attention approximates pretrained transformers without fine-tuning, with little loss.",
    paper="RoBERTa with 25 clusters: SQuAD F1 0.904 exact, 0.876 improved clustered; RTE 0.682 and 0.704 "
    "(NeurIPS 2020)",
    baseline="the same models with exact attention by torch's fused kernel",
    budget=("64 clusters, top-64, not fine-tuned; 48 texts, 16 spoken prompts", "600 texts, 64 prompts, five settings"),
    rule="mean cosine of 0.99 and topics within a point (MiniLM), under 3 % of words changed (Whisper), and faster "
    "at Whisper's 1500 frames and at 4096 tokens",
    limits="Below about a thousand tokens, causal models, and where the single nearest neighbour matters.",
    run=run,
    judge=judge,
    missing=missing,
)
