"""The cheapest clustered attention, layer by layer, that keeps a pretrained model within a fidelity the user names.

1. Time: one layer's attention, exact and with every setting of a small grid, at the user's lengths and shorter ones.
   A setting's `min_length` is where it begins to be faster, and stays so.
2. Error: every layer's attention with every setting against softmax, on some of the inputs; and how much a layer's
   error moves the model's answer, measured by clustering that layer alone.
3. Choice: layers disturb the answer nearly independently, so their contributions to 1 - cosine add up. For a price p,
   the best setting of each layer is then argmin(seconds + p * contribution), and p = 0 .. infinity runs through the
   whole-model settings worth having, from the fastest to exact softmax.
4. Proof: bisection for the cheapest of them that keeps the fidelity, with the whole model, on half of the inputs;
   then the other half decides, and a more careful one is taken until it agrees. What is not faster end to end is
   thrown away.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from flopwise.integrations.transformers import (
    NOT_SELECTED,
    Call,
    Setting,
    attend,
    describe,
    observed,
    use_clustered,
    use_exact,
    write_settings,
)

Batch = Mapping[str, Any]
Answer = Callable[[nn.Module, Batch], Float[Tensor, "examples width"]]
Fidelity = Callable[[Float[Tensor, "examples width"], Float[Tensor, "examples width"]], Float[Tensor, " examples"]]
Progress = Callable[[float, str], None]
Note = Callable[[dict[str, Any]], None]

FASTER = 0.97  # what takes more than this share of the exact time is not called faster: it may be noise
SHORTEST = 64  # positions; nobody needs clusters below
PRICES = 48  # candidates to choose from, before equal ones are dropped
TINY = 1e-9  # a layer that changes nothing still has an order of settings
ONE_SIDED = 1.645  # standard errors: 95 % sure


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Args:
        config: for `use_clustered(model, config=...)`; its "clustered" is empty if the model is to stay exact.
        verdict: the finding in words.
        records: every measurement, for the page: timings, errors by layer, candidates tried, and the one chosen.
    """

    config: dict[str, Any]
    verdict: str
    records: list[dict[str, Any]] = field(repr=False)

    def write(self, path: Path) -> None:
        """The configuration as the JSON file that `use_clustered(model, config=path)` reads."""
        path.write_text(json.dumps(self.config, indent=2) + "\n")


def tune(
    model: Any,
    inputs: Sequence[Batch],
    *,
    tolerance: float = 0.99,
    metric: str | Fidelity = "cosine",
    clusters: Sequence[int] = (16, 32, 64, 128),
    topk: Sequence[int] = (16, 32, 64),
    answer: Answer | None = None,
    progress: Progress = lambda share, doing: None,
    note: Note = lambda record: None,
) -> Tuned:
    """The cheapest settings with which `model` still gives the answers it gives with exact attention.

    The model is left as `use_exact` leaves it. Seconds are measured here, so the result holds for this machine, its
    number of threads and the lengths of `inputs`.

    Args:
        inputs: batches, each the arguments of one forward pass; padded and batched as in use. Every second one is for
            the search, the others for the check.
        tolerance: the fidelity to keep, on average over the examples. In the search 95 % confidence is asked of it.
        metric: "cosine" of the answers; "task", the share of examples with the same decision (the largest of the
            logits, or for a model without logits the nearest neighbour among the inputs); or a function of exact and
            clustered answers that gives one number an example.
        clusters, topk: the grid.
        answer: the model's answers to a batch, (examples, width); None is `answers`.
        progress: called with the share of the work that is done, and what is being done.
        note: called with each record as it is made, so that an interrupted search leaves what it saw.

    Raises:
        ValueError: fewer than two batches, a tolerance outside (0, 1], an unknown metric, or a model without a layer
            that can be clustered.
    """
    if len(inputs) < 2:
        raise ValueError(f"tune searches with one half of the batches and checks on the other; got {len(inputs)}.")
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance is a fidelity above 0 and at most 1; got {tolerance}.")
    search = _Search(model, inputs, tolerance, metric, answer or answers, progress, note)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return search.run([Setting(c, k) for c in clusters for k in topk])
    finally:
        use_exact(model)
        model.train(was_training)


def tune_texts(
    model: str | Path,
    data: Path,
    *,
    tolerance: float = 0.99,
    metric: str = "cosine",
    batch_size: int = 8,
    progress: Progress = lambda share, doing: None,
    note: Note = lambda record: None,
) -> Tuned:
    """`tune` for a text encoder, on the user's own texts: what the command `flopwise tune MODEL --data FILE` calls.

    Texts are cut at the model's longest input and padded to the longest of their batch, short ones with short ones.

    Args:
        model: name or folder of a Hugging Face model; a classifier answers with its logits, any other with the mean
            of its last states.
        data: one text a line, or JSON lines with a field "text".
        tolerance, metric, progress, note: see `tune`.

    Raises:
        ValueError: fewer than two texts, or a line that is no text; and whatever `tune` refuses.
    """
    texts = read_texts(data)
    config = AutoConfig.from_pretrained(model)
    classifies = any("ForSequenceClassification" in name for name in config.architectures or ())
    kind = AutoModelForSequenceClassification if classifies else AutoModel
    loaded = kind.from_pretrained(model, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    texts.sort(key=len)
    size = min(batch_size, len(texts) // 2)
    batches = [
        dict(tokenizer(texts[i : i + size], padding=True, truncation=True, max_length=limit, return_tensors="pt"))
        for i in range(0, len(texts), size)
    ]
    return tune(loaded, batches, tolerance=tolerance, metric=metric, progress=progress, note=note)


def read_texts(data: Path) -> list[str]:
    """One text a line, or, in a file named .jsonl, the field "text" of every line; empty lines are left out."""
    texts = []
    for number, line in enumerate(data.read_text().splitlines(), 1):
        if not line.strip():
            continue
        if data.suffix == ".jsonl":
            try:
                line = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f'a line of {data} is a JSON object with a "text"; line {number} is not.') from error
        texts.append(line)
    if len(texts) < 2:
        raise ValueError(f"tune searches with some texts and checks on others; {data} has {len(texts)}.")
    return texts


def answers(model: nn.Module, batch: Batch) -> Float[Tensor, "examples width"]:
    """One logit vector an example if the model has such, otherwise the mean of the last hidden states.

    Padding is left out where the batch has an `attention_mask` of that length.
    """
    output = model(**batch)
    if (logits := _logits(output)) is not None:
        return logits.float()
    states = output[0].float()
    if states.ndim != 3:
        raise ValueError(
            "the answer of a model is (examples, width) logits or (examples, length, width) states; this one's first "
            f"output is {tuple(states.shape)}. Give `answer=`, a function of model and batch."
        )
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    keep = mask[..., None].to(states.dtype)
    return (states * keep).sum(1) / keep.sum(1).clamp(min=1)


def same_decision(exact: Float[Tensor, "n width"], clustered: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
    """1 where the largest of the logits is the same one."""
    return (exact.argmax(1) == clustered.argmax(1)).float()


def same_neighbour(exact: Float[Tensor, "n width"], clustered: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
    """1 where the nearest other example, by cosine, is the same one."""

    def nearest(x: Tensor) -> Tensor:
        x = x / x.norm(dim=1, keepdim=True)
        return (x @ x.T).fill_diagonal_(-2.0).argmax(1)

    return (nearest(exact) == nearest(clustered)).float()


Choice = dict[int, Setting]  # layer number -> setting; layers that are left out are exact


class _Search:
    """The four steps of the file's first lines, and what they found on the way."""

    def __init__(
        self,
        model: Any,
        inputs: Sequence[Batch],
        tolerance: float,
        metric: str | Fidelity,
        answer: Answer,
        progress: Progress,
        note: Note,
    ) -> None:
        self.model, self.answer, self.tolerance = model, answer, tolerance
        self.progress, self.note = progress, note
        self.fidelity = self._metric(metric, inputs[0])
        self.halves = {"search": list(inputs[::2]), "check": list(inputs[1::2])}
        self.records: list[dict[str, Any]] = []
        self.evidence: dict[str, Any] = {
            "tolerance": tolerance,
            "metric": metric if isinstance(metric, str) else getattr(metric, "__name__", "function"),
        }

    def run(self, settings: list[Setting]) -> Tuned:
        self.progress(0.0, "exact answers")
        self.exact = {name: self._answers({}, batches) for name, batches in self.halves.items()}
        calls = _calls(self.model, self.halves["search"], self.answer)
        lengths = [call.query.shape[2] for call in calls]
        self.evidence["lengths"] = sorted(set(lengths))

        timings = time_settings(
            max(calls, key=lambda call: call.query.shape[2]),
            settings,
            _grid(lengths),
            lambda share: self.progress(0.1 + 0.3 * share, "timing attention"),
        )
        for row in timings.rows:
            self._record({"kind": "timing", **row})
        starts = {s: timings.faster_from(s) for s in settings}
        settings = [replace(s, min_length=start) for s, start in starts.items() if start is not None]
        self.evidence["break_even"] = min((s.min_length for s in settings), default=None)
        if not settings:
            return self._stay_exact(f"up to {max(lengths)} tokens, no setting is faster than exact attention here.")

        self.progress(0.4, "errors layer by layer")
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        some = [self.halves["search"][i] for i in dict.fromkeys((order[len(order) // 2], order[-1]))]
        use_clustered(self.model, layers=())
        errors = layer_errors(self.model, some, settings, self.answer)
        losses = self._losses(some, errors)
        for (layer, s), e in errors.items():
            setting = {"layer": layer, "clusters": s.clusters, "topk": s.topk}
            self._record({"kind": "layer", **setting, "error": e, "loss": losses[layer, s]})

        def seconds(setting: Setting | None) -> float:
            return sum(
                len(call.query) * timings.seconds(setting, length) for call, length in zip(calls, lengths, strict=True)
            )

        self.shares = {s: seconds(s) / seconds(None) for s in settings}
        self.layers = sorted({layer for layer, _ in losses})
        candidates = self._candidates(losses)
        place = _first(candidates, lambda choice: self._keeps(choice, "search"))
        for choice in candidates[place:-1]:
            if self._keeps(choice, "check"):
                return self._prove(choice)
        return self._stay_exact(f"no faster setting keeps a fidelity of {self.tolerance:g}.")

    def _losses(
        self, batches: Sequence[Batch], errors: Mapping[tuple[int, Setting], float]
    ) -> dict[tuple[int, Setting], float]:
        """What each layer and setting adds to 1 - cosine of the answer: measured for a layer's middling setting alone,
        for the others in proportion to the squared error. (With the worst setting the cosine may be near its end.)"""
        exact = self._answers({}, batches)
        found = {}
        for layer in sorted({layer for layer, _ in errors}):
            mine = {s: e for (n, s), e in errors.items() if n == layer}
            middle = sorted(mine, key=lambda s: mine[s])[len(mine) // 2]
            moved = self._answers({layer: middle}, batches)
            loss = float(1 - cosine_similarity(exact, moved, dim=1).mean())
            found |= {(layer, s): max(loss, TINY) * (e / max(mine[middle], TINY)) ** 2 for s, e in mine.items()}
        return found

    def _candidates(self, losses: Mapping[tuple[int, Setting], float]) -> list[Choice]:
        """Whole-model settings for rising prices of fidelity, so from the fastest to exact attention; each once."""
        found: list[Choice] = []
        for price in (0.0, *(10 ** (8 * i / PRICES) for i in range(PRICES))):
            choice: Choice = {}
            for layer in self.layers:
                costs = {s: share + price * losses[layer, s] for s, share in self.shares.items()}
                best = min(costs, key=lambda s: costs[s])
                if costs[best] < 1.0:
                    choice[layer] = best
            if choice not in found:
                found.append(choice)
        return found if {} in found else [*found, {}]

    def _keeps(self, choice: Choice, half: str) -> bool:
        """Whether the whole model keeps the tolerance on this half of the inputs; in the search, with confidence."""
        self.progress(min(0.9, 0.6 + 0.02 * len(self._tried)), f"trying settings on the {half} half")
        values = self.fidelity(self.exact[half], self._answers(choice, self.halves[half]))
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        self._record(
            {
                "kind": "candidate",
                "half": half,
                **write_settings(choice),
                "fidelity": float(values.mean()),
                "lowest": float(values.min()),
                "examples": len(values),
                "attention_time": 1 + sum(self.shares[s] - 1 for s in choice.values()) / len(self.layers),
            }
        )
        return float(values.mean()) - (ONE_SIDED * error if half == "search" else 0.0) >= self.tolerance

    @property
    def _tried(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "candidate"]

    def _prove(self, choice: Choice) -> Tuned:
        """Time the whole model, exact and clustered in turn, and refuse if that is not faster."""
        self.progress(0.9, "timing the whole model")
        samples: dict[str, list[float]] = {"exact": [], "clustered": []}
        for _ in range(3):
            for name, used in (("exact", {}), ("clustered", choice)):
                samples[name].append(timed(lambda used=used: self._answers(used, self.halves["check"])))
        ratio = statistics.median(samples["clustered"]) / statistics.median(samples["exact"])
        last = self._tried[-1]
        self.evidence |= {name: last[name] for name in ("fidelity", "lowest", "examples", "attention_time")}
        self.evidence["model_time"] = ratio
        if ratio > FASTER:
            return self._stay_exact(f"the fastest setting that keeps {self.tolerance:g} takes {ratio:.2f} x the time.")
        self.progress(1.0, "done")
        return self._tuned(
            choice,
            f"Cluster {len(choice)} of {len(self.layers)} layers: {ratio:.2f} x the time, fidelity "
            f"{last['fidelity']:.4f} on {last['examples']} examples it had not seen (lowest {last['lowest']:.4f}). "
            f"Stay exact below {min(s.min_length for s in choice.values())} tokens: these settings do so themselves.",
        )

    def _stay_exact(self, why: str) -> Tuned:
        return self._tuned({}, f"Stay exact: {why}")

    def _tuned(self, choice: Choice, verdict: str) -> Tuned:
        self._record({"kind": "tuned", **write_settings(choice), **self.evidence, "verdict": verdict})
        config = {**write_settings(choice), "tuned": {**self.evidence, "verdict": verdict}}
        return Tuned(config, verdict, self.records)

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.note(record)

    def _answers(self, choice: Choice, batches: Sequence[Batch]) -> Tensor:
        use_clustered(self.model, config=write_settings(choice))
        return torch.cat([self.answer(self.model, batch) for batch in batches])

    def _metric(self, metric: str | Fidelity, batch: Batch) -> Fidelity:
        if callable(metric):
            return metric
        if metric == "cosine":
            return lambda exact, clustered: cosine_similarity(exact, clustered, dim=1)
        if metric == "task":
            with torch.no_grad():
                return same_neighbour if _logits(self.model(**batch)) is None else same_decision
        raise ValueError(f"metric is 'cosine', 'task' or a function of exact and clustered answers; got {metric!r}.")


def _logits(output: Any) -> Tensor | None:
    """The logits of a model that gives one vector of them an example."""
    logits = getattr(output, "logits", None)
    return logits if logits is not None and logits.ndim == 2 else None


def _calls(model: Any, batches: Sequence[Batch], answer: Answer) -> list[Call]:
    """One attention call of each batch: that of the first layer which could be clustered."""
    calls: list[Call] = []
    use_clustered(model, layers=())
    for count, batch in enumerate(batches, 1):

        def watch(call: Call, count: int = count) -> None:
            if call.exact_because == NOT_SELECTED and len(calls) < count:
                calls.append(call)

        with observed(watch):
            answer(model, batch)
        if len(calls) < count:
            raise ValueError(
                "tune needs inputs of which some layer's attention can be clustered; in this model: "
                f"{sorted({str(layer.exact_because) for layer in describe(model, batch)})}."
            )
    return calls


def _grid(lengths: Sequence[int]) -> list[int]:
    """Lengths to time at: the user's shortest, middle and longest, and steps of 3/4 and 1/2 below the longest."""
    ordered = sorted(lengths)
    grid = {ordered[0], ordered[len(ordered) // 2], ordered[-1]}
    length = ordered[-1]
    while length > SHORTEST:
        grid |= {length, max(SHORTEST, length * 3 // 4)}
        length //= 2
    return sorted(grid)


def _first(candidates: Sequence[Choice], good_enough: Callable[[Choice], bool]) -> int:
    """The place of the first that is good enough, by bisection; the last, exact attention, always is."""
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if good_enough(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return low


class Timings:
    """Seconds of one layer's attention at some lengths; None is exact attention."""

    def __init__(self, lengths: list[int], seconds: dict[Setting | None, list[float]]) -> None:
        self.lengths, self._seconds = lengths, seconds

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [
            {"clusters": s and s.clusters, "topk": s and s.topk, "length": length, "seconds": seconds}
            for s, column in self._seconds.items()
            for length, seconds in zip(self.lengths, column, strict=True)
        ]

    def faster_from(self, setting: Setting) -> int | None:
        """The shortest length from which on the setting is faster than exact attention at all lengths measured."""
        found = None
        pairs = list(zip(self.lengths, self._seconds[setting], self._seconds[None], strict=True))
        for length, clustered, exact in reversed(pairs):
            if clustered > FASTER * exact:
                break
            found = length
        return found

    def seconds(self, setting: Setting | None, length: int) -> float:
        """Interpolated along powers of the length; a setting's `min_length` is heeded."""
        if setting is not None and length < setting.min_length:
            setting = None
        column = self._seconds[None if setting is None else replace(setting, min_length=0)]
        if length <= self.lengths[0]:
            return column[0]
        for i, (low, high) in enumerate(zip(self.lengths, self.lengths[1:], strict=False)):
            if length <= high:
                share = math.log(length / low) / math.log(high / low)
                return column[i] ** (1 - share) * column[i + 1] ** share
        return column[-1]


def time_settings(
    call: Call, settings: Sequence[Setting], lengths: list[int], progress: Callable[[float], None] = lambda share: None
) -> Timings:
    """Exact and clustered attention on the first positions of one call of a real layer, taking turns, the median."""
    seconds: dict[Setting | None, list[float]] = {s: [] for s in (None, *settings)}
    for done, length in enumerate(lengths):
        progress(done / len(lengths))
        short = _shortened(call, length)
        samples: dict[Setting | None, list[float]] = {s: [] for s in seconds}
        for _ in range(4):
            for s, taken in samples.items():
                taken.append(timed(partial(exact_call, short) if s is None else partial(clustered_call, short, s)))
        for s, column in seconds.items():
            column.append(statistics.median(samples[s][1:]))  # the first is warm-up
    return Timings(lengths, seconds)


def layer_errors(
    model: Any, batches: Sequence[Batch], settings: Sequence[Setting], answer: Answer = answers
) -> dict[tuple[int, Setting], float]:
    """Relative L2 error of every layer's attention against softmax, on the inputs that exact attention gives it.

    `model` is one on which `use_clustered(model, layers=())` was called: all layers exact, but observed.
    """
    numbers = {model.get_submodule(layer.name): layer.number for layer in describe(model) if layer.number is not None}
    squares: dict[tuple[int, Setting], list[float]] = {}

    def watch(call: Call) -> None:
        if call.exact_because != NOT_SELECTED:
            return
        exact = exact_call(call)
        keep = 1.0 if call.attention_mask is None else call.attention_mask[:, :, 0, :, None].to(exact.dtype)
        total = float((exact * keep).square().sum())
        for s in settings:
            if call.query.shape[2] >= s.min_length:
                off = float(((clustered_call(call, s) - exact) * keep).square().sum())
                squares.setdefault((numbers[call.module], s), []).append(off / total)

    with observed(watch):
        for batch in batches:
            answer(model, batch)
    return {key: math.sqrt(statistics.fmean(values)) for key, values in squares.items()}


def _shortened(call: Call, length: int) -> Call:
    mask = None if call.attention_mask is None else call.attention_mask[..., :length]
    query, key, value = (x[:, :, :length].contiguous() for x in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, attention_mask=mask)


def exact_call(call: Call) -> Float[Tensor, "b h n m"]:
    """The answer of exact attention to a call."""
    return scaled_dot_product_attention(
        call.query, call.key, call.value, call.attention_mask, scale=call.scaling, enable_gqa=True
    )


def clustered_call(call: Call, setting: Setting) -> Float[Tensor, "b h n m"]:
    """The answer of clustered attention to a call."""
    return attend(call.query, call.key, call.value, call.attention_mask, call.scaling, setting)


def timed(function: Callable[[], Any]) -> float:
    """Seconds: of the processor with one thread, which what else runs here does not disturb; else of the clock."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start
