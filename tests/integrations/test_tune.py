"""Tuning, with a clock that counts multiplications, so that what is found does not depend on the machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from small_models import TEXT, build, text_inputs
from transformers import BertConfig, BertForSequenceClassification

from flopwise.integrations import transformers as fw
from flopwise.integrations import tune as tuning

OVERHEAD = 100  # what clustering costs a query in this clock, in keys


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact attention takes n n, clustered n (clusters + topk + OVERHEAD)."""
    spent = [0.0]

    def charge(function: Callable[..., Any], cost: Callable[..., float]) -> Callable[..., Any]:
        def charged(*arguments: Any, **keywords: Any) -> Any:
            spent[0] += cost(*arguments)
            return function(*arguments, **keywords)

        return charged

    def exact(*arguments: Any) -> float:
        query = arguments[0].query if isinstance(arguments[0], fw.Call) else arguments[1]
        return query.shape[0] * query.shape[2] ** 2

    def clustered(query: torch.Tensor, *arguments: Any) -> float:
        setting = arguments[-1]
        return query.shape[0] * query.shape[2] * (setting.clusters + setting.topk + OVERHEAD)

    def timed(function: Callable[[], Any]) -> float:
        before = spent[0]
        function()
        return spent[0] - before

    monkeypatch.setattr(tuning, "exact_call", charge(tuning.exact_call, exact))
    monkeypatch.setattr(fw, "sdpa_attention_forward", charge(fw.sdpa_attention_forward, exact))
    attend = charge(fw.attend, clustered)
    for module in (fw, tuning):
        monkeypatch.setattr(module, "attend", attend)
    monkeypatch.setattr(tuning, "timed", timed)


GRID: dict[str, Any] = {"clusters": (4, 8, 16), "topk": (4, 8, 64)}


def attentive() -> Any:
    """A model whose answer depends on its attention: cosines of .98 with the cheapest setting, .999 with the best."""
    return build(BertConfig(**TEXT, initializer_range=0.3), sharp=1.0)


def inputs(lengths: list[int], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    return [text_inputs(length, examples=4, seed=seed + i) for i, length in enumerate(lengths)]


@pytest.mark.usefixtures("clock")
def test_it_finds_settings_that_are_faster_and_hold_on_inputs_it_never_saw(tmp_path):
    model = attentive()
    found = tuning.tune(model, inputs([256] * 6), tolerance=0.99, **GRID)
    assert found.verdict.startswith("Cluster 2 of 2 layers")
    assert found.config["tuned"]["model_time"] < 0.8

    unseen = inputs([256] * 4, seed=100)
    exact = torch.cat([tuning.answers(model, batch) for batch in unseen])
    assert [record["half"] for record in found.records if record["kind"] == "candidate"].count("check") <= 2
    found.write(tmp_path / "tuned.json")
    fw.use_clustered(model, config=tmp_path / "tuned.json")
    kept = torch.cosine_similarity(exact, torch.cat([tuning.answers(model, batch) for batch in unseen]))
    assert kept.mean() >= 0.99
    assert all(layer.exact_because is None for layer in fw.describe(model, unseen[0]))


@pytest.mark.usefixtures("clock")
def test_a_higher_tolerance_costs_more_time():
    model, batches, times = attentive(), inputs([256] * 6), []
    for tolerance in (0.9, 0.99, 1.0):
        found = tuning.tune(model, batches, tolerance=tolerance, **GRID)
        times.append(found.config["tuned"].get("model_time", 1.0))
    assert times[0] < times[1] <= times[2] == 1.0


@pytest.mark.usefixtures("clock")
def test_a_layer_whose_queries_are_all_alike_is_clustered_the_cheapest_way():
    model: Any = attentive()
    query = model.encoder.layer[1].attention.self.query
    torch.nn.init.zeros_(query.weight)
    found = tuning.tune(model, inputs([256] * 6), tolerance=0.999, **GRID)
    settings = fw.read_settings(found.config)
    assert (settings[1].clusters, settings[1].topk) == (4, 4)
    assert settings[0].clusters > 4 or settings[0].topk > 4


@pytest.mark.usefixtures("clock")
def test_it_says_below_which_length_to_stay_exact():
    """With 4 clusters, 4 keys and the overhead, 108 n < n n from n = 108 on; the grid below 256 has 128 and 96."""
    found = tuning.tune(attentive(), inputs([256] * 6), tolerance=0.5, **GRID)
    assert [entry["min_length"] for entry in found.config["clustered"]] == [128, 128]
    assert "Stay exact below 128 tokens" in found.verdict
    assert found.config["tuned"]["break_even"] == 128


@pytest.mark.usefixtures("clock")
def test_it_refuses_to_slow_a_model_down():
    model = attentive()
    found = tuning.tune(model, inputs([64, 80, 96, 100]), tolerance=0.5, **GRID)
    assert found.config["clustered"] == []
    assert found.verdict == "Stay exact: up to 96 tokens, no setting is faster than exact attention here."


def test_it_refuses_when_the_whole_model_is_not_faster(clock, monkeypatch):
    slow = iter([1.0, 1.01] * 3)
    timings = tuning.time_settings

    def then_slow(*arguments: Any) -> Any:
        result = timings(*arguments)
        monkeypatch.setattr(tuning, "timed", lambda function: next(slow))
        return result

    monkeypatch.setattr(tuning, "time_settings", then_slow)
    found = tuning.tune(attentive(), inputs([256] * 4), tolerance=0.5, **GRID)
    assert found.config["clustered"] == [] and "takes 1.01 x the time" in found.verdict


@pytest.mark.usefixtures("clock")
def test_what_held_in_the_search_must_hold_on_the_other_half():
    """A metric that is hard on the second half only."""
    batches = inputs([256] * 4)
    seen = []

    def metric(exact: torch.Tensor, clustered: torch.Tensor) -> torch.Tensor:
        seen.append(len(exact))
        return torch.full((len(exact),), 1.0 if len(exact) == 12 else 0.5)

    found = tuning.tune(attentive(), [*batches, batches[0]], tolerance=0.9, metric=metric, **GRID)
    assert found.config["clustered"] == [] and "no faster setting keeps" in found.verdict
    assert 8 in seen


@pytest.mark.usefixtures("clock")
def test_the_search_asks_for_confidence():
    """A mean of .95 is above .9, but eight examples that scatter by .15 do not show it."""

    def metric(exact: torch.Tensor, clustered: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.8, 1.1]).repeat(len(exact) // 2)

    found = tuning.tune(attentive(), inputs([256] * 4), tolerance=0.9, metric=metric, **GRID)
    assert found.config["clustered"] == []


def test_time_is_interpolated_and_a_setting_is_exact_below_its_length():
    setting = fw.Setting(4, 4)
    timings = tuning.Timings([100, 200, 400], {None: [1.0, 4.0, 16.0], setting: [2.0, 4.0, 8.0]})
    assert timings.faster_from(setting) == 400
    assert timings.seconds(None, 300) == pytest.approx(9.0)
    assert timings.seconds(setting, 300) == pytest.approx(6.0)
    assert timings.seconds(fw.Setting(4, 4, min_length=400), 300) == pytest.approx(9.0)
    assert timings.seconds(fw.Setting(4, 4, min_length=400), 400) == 8.0


@torch.no_grad()
def test_errors_leave_padding_out():
    model, (batch,) = attentive(), inputs([60])
    fw.use_clustered(model, layers=())
    alone = tuning.layer_errors(model, [batch], [fw.Setting(4, 4)])
    padded = {name: torch.nn.functional.pad(values, (0, 40)) for name, values in batch.items()}
    assert tuning.layer_errors(model, [padded], [fw.Setting(4, 4)]) == pytest.approx(alone, rel=1e-4)


@pytest.mark.usefixtures("clock")
def test_padding_and_mixed_lengths():
    batches = inputs([64, 200, 256, 240, 128, 256])
    for batch in batches:
        batch["attention_mask"][1:, -20:] = 0
    found = tuning.tune(attentive(), batches, tolerance=0.5, **GRID)
    assert found.config["tuned"]["lengths"] == [64, 128, 256]
    assert found.config["clustered"]


@pytest.mark.usefixtures("clock")
def test_the_task_of_a_classifier_is_its_decision(monkeypatch):
    monkeypatch.delattr(tuning, "same_neighbour")
    model = build(BertConfig(**TEXT, initializer_range=0.3), BertForSequenceClassification, sharp=1.0)
    found = tuning.tune(model, inputs([256] * 6), tolerance=0.9, metric="task", **GRID)
    fidelities = [r["fidelity"] * r["examples"] for r in found.records if r["kind"] == "candidate"]
    assert fidelities and all(f == pytest.approx(round(f), abs=1e-4) for f in fidelities)


def test_the_task_of_an_embedding_model_is_its_nearest_neighbours():
    exact = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    moved = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.9, 0.2]])
    assert tuning.same_neighbour(exact, exact).tolist() == [1, 1, 1, 1]
    assert tuning.same_neighbour(exact, moved).tolist() == [1, 0, 1, 0]


@pytest.mark.usefixtures("clock")
def test_the_model_comes_back_as_it_was():
    model = attentive().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tuning.tune(model, inputs([256] * 4), tolerance=0.5, **GRID)
    assert model.training and not hasattr(model.config, "flopwise")
    assert {layer.exact_because for layer in fw.describe(model)} == {"its attention implementation is 'sdpa'"}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.usefixtures("clock")
def test_every_measurement_is_on_record():
    shares: list[float] = []
    found = tuning.tune(
        attentive(),
        inputs([256] * 4),
        tolerance=0.99,
        progress=lambda share, doing: shares.append(share),
        **GRID,
    )
    kinds = {record["kind"] for record in found.records}
    assert kinds == {"timing", "layer", "candidate", "tuned"}
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    json.dumps(found.records)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"inputs": inputs([64])}, "one half of the batches"),
        ({"tolerance": 0.0}, "above 0 and at most 1"),
        ({"metric": "accuracy"}, "metric is 'cosine', 'task' or a function"),
    ],
)
def test_what_cannot_be_tuned_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        tuning.tune(attentive(), **{"inputs": inputs([64, 64]), **arguments})


def test_texts_are_read_line_by_line(tmp_path: Path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\n two\n")
    lines.write_text('{"text": "one"}\n{"text": " two", "label": 1}\n')
    assert tuning.read_texts(plain) == tuning.read_texts(lines) == ["one", " two"]
    lines.write_text('{"text": "one"}\nno json\n')
    with pytest.raises(ValueError, match="line 2 is not"):
        tuning.read_texts(lines)
    plain.write_text("one\n")
    with pytest.raises(ValueError, match="has 1"):
        tuning.read_texts(plain)
