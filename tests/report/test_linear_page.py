"""The page of linear attention: from made-up records, as `flopwise demo linear` writes them."""

import json

import pytest
from pages import check, written

from flopwise.report import read_records

MADE = {
    "machine": {"processor": "P", "cores": 2},
    "commit": "abc",
    "time": "2026-11-24T05:00:00Z",
    "experiment": "linear",
}
DIGIT = [[0, 255], [128, 3]]


def speed(batch: int, gain: float) -> dict:
    rates = {"linear": 100.0 * gain, "cache": 100.0, "modules": 80.0, "no cache": 2.0}
    row = {
        "length": 784,
        "tokens_per_second": rates,
        "images_per_second": {name: rate / 784 for name, rate in rates.items()},
        "gain over cache": {"linear": gain},
        "gain over no cache": {"linear": 50 * gain},
    }
    curve = {name: [{"position": p, "tokens_per_second": r} for p in (54, 400, 730)] for name, r in rates.items()}
    return {"kind": "speed", "batch": batch, "lengths": [row], "by_position": curve, "size": {"dim": 96}}


RECORDS = [
    {"kind": "painted", "digits": [0, 0, 1, 1], "pictures": [DIGIT] * 4},
    {"kind": "completed", "digits": [3], "given_rows": 1, "originals": [DIGIT], "completions": [[DIGIT, DIGIT]]},
    speed(1, 3.5),
    speed(32, 4.0),
    {"kind": "play", "prompt": "MACBETH.\n", "text": "Is this a <dagger>", "parameters": 900000},
    {"kind": "run", "method": "softmax", "bits_per_dim": 0.7, "parameters": 5000, "rate": 0.004, "examples": 10},
    {"kind": "run", "method": "linear", "bits_per_dim": 0.71, "parameters": 5000, "rate": 0.004, "examples": 12},
]


def page_of(tmp_path, records) -> str:
    text = written(tmp_path, [MADE | record for record in records])
    check(text)
    return text


def test_the_page_shows_pictures_speed_play_and_likelihood(tmp_path):
    text = page_of(tmp_path, RECORDS)
    assert text.count('class="heat"') == 2
    assert "up to 4.00 times as fast as softmax with a cache" in text
    assert "<strong>3.50 ×" in text and "<strong>4.00 ×" in text and "175 times as fast as without" in text
    assert "Is this a &lt;dagger&gt;" in text and "0.7100" in text
    assert text.count("one sequence, softmax, cache in torch&#x27;s modules<") == 1  # a row, and a line in each chart
    assert text.count(">softmax, cache in torch&#x27;s modules<") >= 2 and ", modules<" not in text
    assert "When not to use linear attention" in text


@pytest.mark.parametrize("count", range(len(RECORDS)))
def test_any_part_of_the_records_makes_a_page(tmp_path, count):
    page_of(tmp_path, RECORDS[:count] + RECORDS[count + 1 :])
    page_of(tmp_path, [RECORDS[count]])


def test_a_slower_model_is_called_slower(tmp_path):
    assert "not always faster" in page_of(tmp_path, [speed(1, 0.8), speed(32, 4.0)])


@pytest.mark.parametrize(
    "wrong", [{"kind": "painted"}, {"kind": "speed", "lengths": []}, {"kind": "hm"}, {"kind": "play"}]
)
def test_a_line_that_is_no_record_is_named(tmp_path, wrong):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(MADE | wrong) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read_records(path)
