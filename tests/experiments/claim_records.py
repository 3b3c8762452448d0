"""Made-up records of every claim, as its experiment writes them, with numbers that reproduce the claim or do not."""

from typing import Any

Record = dict[str, Any]
MACHINE = {"machine": {"processor": "p", "cores": 2, "torch": "2.13", "python": "3.11", "flopwise": "0.1"}}
MACHINE |= {"commit": "abc", "time": "2026-01-01T00:00:00+00:00"}


def importance(loss: float = 0.8, error: float = 0.9) -> list[Record]:
    """Ours relative to uniform."""
    found = []
    for method, scale in (("uniform", (1.0, 1.0)), ("rate_scale", (loss, error))):
        for seed in range(3):
            record = {"kind": "run", "method": method, "seed": seed, "rate": 0.001, "batch_size": 16, "seconds": 1.0}
            record |= {"budget": {"flops": 1e12}, "flops": {"training": 8e11, "scoring": 1e11, "loading": 0.0}}
            record |= {"train_loss": (0.1 + 0.001 * seed) * scale[0], "test_error": (0.1 + 0.001 * seed) * scale[1]}
            record |= {"curve": [{"share": 0.5, "flops": 5e11, "train_loss": 0.2, "test_error": 0.2}]}
            found.append({"experiment": "importance", **record, **MACHINE})
    return found


def attention(milliseconds: float = 8.0, error: float = 0.3) -> list[Record]:
    """Ours; a step over all pixels takes 800 ms, and the network for an eighth of the resolution misses half."""
    found = []
    for method, ms, mb in (("murthy", milliseconds, 5.0), ("cnn_1", 800.0, 500.0)):
        found.append({"kind": "cost", "method": method, "side": 1504, "milliseconds": ms, "megabytes": mb})
    for method, missed in (("murthy", error), ("lowres_8", 0.5)):
        record = {"kind": "run", "method": method, "seed": 0, "rate": 0.002, "seconds": 90.0, "examples": 1000}
        record |= {"budget": {"seconds": 90.0}, "data": {"side": 1500, "test": 2000}, "flops": 1e12}
        record |= {"curve": [{"seconds": s, "test_error": missed + 1 / s} for s in (10.0, 90.0)]}
        found.append(record | {"test_error": missed, "test_errors": {}})
    picture = [[0, 128], [255, 64]]
    looked = {"kind": "looked", "label": 3, "predicted": 3, "low": picture, "patches": [picture] * 3}
    found.append(looked | {"attention": [[0.1, 0.2], [0.3, 0.4]]})
    return [{"experiment": "attention", **record, **MACHINE} for record in found]


def length(linear: float = 1.0, softmax: float = 2.0) -> list[Record]:
    """The exponents."""
    rows = [{"length": n, "linear": 1e-2 * n**linear, "softmax": 1e-5 * n**softmax} for n in (512, 1024, 2048)]
    exponents = {"linear": linear, "softmax": softmax}
    record = {"experiment": "linear", "kind": "length", "backend": "numba", "lengths": rows, "exponents": exponents}
    return [record | MACHINE]


def decoding(gain: float = 1500.0, difference: float = 1e-5) -> list[Record]:
    """The gain over no cache at 32 sequences, and the largest difference of logits that reach 10."""
    agreement = {"kind": "agreement", "largest_difference": difference, "largest_logit": 10.0, "same_choice": 1.0}
    found: list[Record] = [agreement]
    for batch, anew in ((1, gain / 5), (32, gain)):
        row = {"length": 3072, "tokens_per_second": {"linear": 1e4, "cache": 1e3, "no cache": 1e4 / anew}}
        row |= {"gain over cache": {"linear": 10.0 if batch > 1 else 2.0}, "gain over no cache": {"linear": anew}}
        points = {
            name: [{"position": p, "tokens_per_second": 10.0 * p} for p in (1, 9)] for name in ("linear", "cache")
        }
        found.append({"kind": "speed", "batch": batch, "lengths": [row], "by_position": points, "size": {"dim": 96}})
    return [{"experiment": "linear", **record, **MACHINE} for record in found]


def tradeoff(other: float = 0.5, error: float = 0.08) -> list[Record]:
    """The error of the other method, which takes longer, and of clustered attention."""
    found = []
    for inputs, ours in (("structured", error), ("noise", 0.75)):
        methods = [{"method": "clustered, C=64, top-32", "milliseconds": 20.0, "speedup": 4.0, "error": ours}]
        methods += [{"method": "FAVOR+", "milliseconds": 30.0, "speedup": 2.0, "error": other}]
        record = {"experiment": "clustered", "kind": "frontier", "inputs": inputs, "length": 2048, "methods": methods}
        found.append(record | MACHINE)
    return found


def pretrained(cosine: float = 0.995, words: float = 0.02) -> list[Record]:
    both = {"exact": 2.0, "clustered": 1.5}
    text = {"kind": "text", "length": 512, "examples": 48, "cosine": {"mean": cosine, "min": 0.98}, "seconds": both}
    text |= {"attention_seconds": both, "topic_accuracy": {"exact": 0.96, "clustered": 0.96}, "model": "MiniLM"}
    speech = {"kind": "speech", "length": 1500, "examples": 16, "word_error": words, "same_transcripts": 0.8}
    speech |= {"seconds": both, "attention_seconds": both, "model": "Whisper tiny.en"}
    found = [record | {"clusters": 64, "topk": 64} for record in (text, speech)]
    times = {"exact": 2.0, "clustered": 1.0, "without": 0.8}
    found.append({"kind": "length", "length": 4096, "examples": 1, "seconds": times, "clusters": 32, "topk": 32})
    return [{"experiment": "clustered", **record, **MACHINE} for record in found]
