"""Tokens per second of a linear model against the same model with softmax: with a key-value cache, and without.

Two caches: "cache" is as fast as torch's operations go, "modules" calls the model's own modules as they are.

Alternating in one process, medians of CPU time. What a softmax step costs is smooth in the position, so the mean over
a generation is the mean over Gauss' points.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from flopwise.core.timing import Work, cpu_seconds, take_turns
from flopwise.experiments.linear_baseline import CacheDecoder, ModuleDecoder, SoftmaxCausalLM
from flopwise.models import Decoder, LinearCausalLM

# Gauss-Legendre on [0, 1] with 4 points: exact for costs that are polynomials of degree 7 in the position
GAUSS = ((0.069432, 0.173927), (0.330009, 0.326073), (0.669991, 0.326073), (0.930568, 0.173927))
CACHES = {"cache": CacheDecoder, "modules": ModuleDecoder}
SLICE = 8  # sequences without a cache that go through the model together, so that they stay in the processor's cache


@torch.inference_mode()
def measure(
    linear: LinearCausalLM,
    softmax: SoftmaxCausalLM,
    *,
    batch: int,
    lengths: tuple[int, ...],
    rounds: int,
    burst: int,
    beside: Mapping[str, Work] | None = None,
) -> dict[str, Any]:
    """How fast `batch` sequences are generated, from nothing to each of `lengths` tokens.

    Args:
        rounds: measurements of each, of which the median counts.
        burst: steps in a row in one measurement, as in a generation, where the weights were read a step before.
        beside: what else is timed in the same rounds.

    Returns:
        "step_ms" of the linear decoders (int8 at batch 1 only); "by_position" tokens a second, for a curve; for each
        length "tokens_per_second" and the gains; "beside_ms".
    """
    ids = torch.zeros(batch, dtype=torch.int64)
    decoders: dict[str, Decoder] = {"linear": linear.decoder(batch)}
    if batch == 1:
        decoders["linear, int8"] = linear.decoder(batch, weights="int8")
    places = sorted({position for length in lengths for position in positions(length)})
    caches = {name: kind(softmax, batch, max(lengths)) for name, kind in CACHES.items()}

    works: dict[str, Work] = {}
    for position in places:  # linear steps between those of the cache, so that all see the same machine
        works |= {f"{name} {position}": _step(decoder, ids) for name, decoder in decoders.items()}
        works |= {f"{name} {position}": _step_at(cache, position, ids) for name, cache in caches.items()}
    beside = beside or {}
    times = take_turns({**works, **beside}, rounds, burst=burst, lead=1)

    at = {name: {p: times[f"{name} {p}"] for p in places} for name in (*decoders, *caches)}
    step = {name: median(at[name].values()) for name in decoders}
    anew = {position: _without_cache(softmax, batch, position, 3 if batch == 1 else 1) for position in places}
    result: dict[str, Any] = {
        "batch": batch,
        "backend": decoders["linear"].backend,
        "step_ms": {name: 1e3 * value for name, value in step.items()},
        "beside_ms": {name: 1e3 * times[name] for name in beside},
        "by_position": {
            name: [{"position": p, "tokens_per_second": batch / t} for p, t in values.items()]
            for name, values in (at | {"no cache": anew}).items()
        },
        "lengths": [],
    }
    for length in lengths:
        baselines = {name: mean_over(length, at[name]) for name in caches} | {"no cache": mean_over(length, anew)}
        result["lengths"].append(
            {
                "length": length,
                "tokens_per_second": {name: batch / value for name, value in (step | baselines).items()},
            }
            | {
                f"gain over {baseline}": {name: value / step[name] for name in step}
                for baseline, value in baselines.items()
            }
        )
    return result


def positions(length: int) -> list[int]:
    """Gauss' points in a generation of `length` tokens."""
    return [round(place * length) for place, _ in GAUSS]


def mean_over(length: int, at: Mapping[int, float]) -> float:
    """The mean of a cost over a generation, from the cost at `positions`."""
    return sum(weight * at[position] for position, (_, weight) in zip(positions(length), GAUSS, strict=True))


def _step(decoder: Decoder, ids: torch.Tensor) -> Work:
    return lambda: decoder.step(ids)


def _step_at(cache: CacheDecoder | ModuleDecoder, position: int, ids: torch.Tensor) -> Work:
    def work() -> object:
        cache.position = position
        return cache.step(ids)

    return work


def _without_cache(model: SoftmaxCausalLM, batch: int, position: int, repeats: int) -> float:
    """Seconds for one more token when everything before is computed anew; the logits of the last position only."""
    ids = torch.zeros(min(batch, SLICE), position + 1, dtype=torch.int64)

    def work() -> None:
        model.head(model.hidden(ids)[:, -1])

    return median(cpu_seconds(work) for _ in range(repeats)) * batch / len(ids)
