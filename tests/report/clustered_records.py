"""Records as `experiments/clustered.py` and `flopwise tune` write them, made up."""

from typing import Any

Record = dict[str, Any]

MACHINE = {
    "machine": {"processor": "a CPU", "cores": 2, "torch": "2.13.0", "python": "3.11.7", "flopwise": "0.1.0"},
    "commit": "abc1234",
    "time": "2026-11-24T05:00:00Z",
}


def text(clusters: int = 64, topk: int = 64, cosine: Any = 0.995, ratio: float = 0.8, **other: Any) -> Record:
    """`ratio` is the whole model's, relative to exact; attention takes half of that."""
    return {
        "experiment": "clustered",
        "kind": "text",
        "clusters": clusters,
        "topk": topk,
        "model": "MiniLM",
        "length": 512,
        "examples": 60,
        "cosine": {"mean": cosine, "min": cosine and cosine - 0.01},
        "neighbours_kept": 0.9,
        "topic_accuracy": {"exact": 0.8, "clustered": 0.79},
        "layer_errors": [0.1, 0.2, 0.3],
        "seconds": {"exact": 2.0, "clustered": 2.0 * ratio},
        "attention_seconds": {"exact": 1.0, "clustered": 0.5 * ratio},
        **MACHINE,
    } | other


def speech(clusters: int = 50, topk: int = 32, wrong: Any = 0.02, ratio: float = 0.8, **other: Any) -> Record:
    return {
        "experiment": "clustered",
        "kind": "speech",
        "clusters": clusters,
        "topk": topk,
        "model": "Whisper tiny.en",
        "length": 1500,
        "examples": 16,
        "joined": False,
        "word_error": wrong,
        "words": 500,
        "same_transcripts": 0.9,
        "transcripts": [{"exact": "leave a message", "clustered": "leave the message"}],
        "seconds": {"exact": 2.0, "clustered": 2.0 * ratio},
        "attention_seconds": {"exact": 1.0, "clustered": 0.5 * ratio},
        **MACHINE,
    } | other


def length(tokens: int, clustered: float, **other: Any) -> Record:
    return {
        "experiment": "clustered",
        "kind": "length",
        "clusters": 32,
        "topk": 32,
        "model": "BERT",
        "length": tokens,
        "examples": 1,
        "seconds": {"exact": 10.0, "clustered": clustered, "without": 2.0},
        **MACHINE,
    } | other


def picture() -> Record:
    rows = [[0.9 if i == j else 0.01 for j in range(8)] for i in range(8)]
    pictures = [
        {"layer": layer, "attention": name, "rows": rows} for layer in (0, 5) for name in ("exact", "clustered")
    ]
    common = {"experiment": "clustered", "kind": "picture", "clusters": 64, "topk": 32, "model": "MiniLM"}
    return {**common, "length": 512, "pictures": pictures, **MACHINE}


def search(*, chosen: bool = True, ended: bool = True, started: str = "now") -> list[Record]:
    """All records of one `flopwise tune`, of three layers, in the order in which it writes them."""
    settings = [(16, 16), (64, 32)]
    entries = [{"layer": n, "clusters": 16, "topk": 16, "min_length": 256} for n in (0, 1)]
    careful = [{"layer": n, "clusters": 64, "topk": 32, "min_length": 512} for n in (0, 1, 2)]
    found: list[Record] = []
    for tokens in (64, 256, 512):
        exact = {"clusters": None, "topk": None, "seconds": 1e-6 * tokens * tokens}
        rows = [
            {"clusters": clusters, "topk": topk, "seconds": 1e-6 * tokens * (2 * (clusters + topk) + 100)}
            for clusters, topk in settings
        ]
        found += [{"kind": "timing", "length": tokens, **row} for row in (exact, *rows)]
    for layer in range(3):
        for (clusters, topk), error in zip(settings, (0.3, 0.1), strict=True):
            error = error / (layer + 1)
            row = {"kind": "layer", "layer": layer, "clusters": clusters, "topk": topk, "error": error, "loss": error}
            found.append(row)
    tried = {"search": [(careful, 0.999, 0.5), (entries, 0.995, 0.4)], "check": [(entries, 0.994, 0.4)]}
    for half, candidates in tried.items():
        for candidate, fidelity, time in candidates:
            row = {"half": half, "clustered": candidate, "fidelity": fidelity, "lowest": fidelity - 0.01}
            found.append({"kind": "candidate", **row, "examples": 20, "attention_time": time})
    if ended:
        last: Record = {"kind": "tuned", "clustered": entries if chosen else [], "tolerance": 0.99, "metric": "cosine"}
        last |= {"lengths": [256, 512], "break_even": 256, "fidelity": 0.994, "lowest": 0.984, "examples": 20}
        last |= {"attention_time": 0.4, "model_time": 0.7 if chosen else 1.1}
        last["verdict"] = (
            "Cluster 2 of 3 layers: 0.70 x the time." if chosen else "Stay exact: it takes 1.10 x the time."
        )
        found.append(last)
    run = {"model": "a model", "data": "texts.txt", "tolerance": 0.99, "metric": "cosine", "started": started}
    return [{"experiment": "tune", **record, "run": run, **MACHINE} for record in found]
