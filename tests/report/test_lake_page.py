"""The page of the lake task says who won, and shows what was looked at."""

import pytest
from pages import check, written

from flopwise.report.lake import markdown_table, verdict

MADE = {
    "machine": {"processor": "P", "cores": 2},
    "commit": "abc",
    "time": "2026-11-24T05:00:00Z",
    "experiment": "lake",
}


def run(method: str, seed: int, error: float) -> dict:
    return MADE | {
        "kind": "run",
        "method": method,
        "seed": seed,
        "rate": 0.002,
        "budget": {"seconds": 45.0},
        "data": {"name": "Blue Marble", "side": 1024, "across": 8, "test": 240},
        "flops": 1e12,
        "seconds": 45.1,
        "examples": 900,
        "test_error": error,
        "test_errors": {"n_64": 0.125} if method == "murthy" else {},
    }


OURS = [run("murthy", 0, 0.2), run("murthy", 1, 0.1)]
COARSE = [run("cnn_8", 0, 0.4), run("cnn_8", 1, 0.5)]
LOOKED = MADE | {"kind": "looked", "labels": ["lake"], "predicted": ["no lake"], "jpeg": "AAAA"}


@pytest.mark.parametrize(
    ("errors", "words"),
    [((0.3, 0.2), "won with every seed"), ((0.1, 0.05), "lost with every seed"), ((0.3, 0.05), "neither won nor lost")],
)
def test_the_verdict_needs_every_seed_and_the_best_of_the_others(errors: tuple[float, float], words: str):
    fine = [run("cnn_4", seed, error) for seed, error in enumerate(errors)]
    assert words in verdict([*COARSE, *OURS, *fine])
    assert "1/4" in verdict([*COARSE, *OURS, *fine])


def test_nothing_is_said_without_both_sides():
    assert verdict(OURS) == verdict(COARSE) == ""


def test_the_table_has_a_line_a_method_and_leaves_out_other_budgets():
    other = run("cnn_1", 0, 0.01) | {"budget": {"seconds": 9.0}}
    lines = markdown_table([other, *COARSE, *OURS]).splitlines()
    assert len(lines) == 4
    assert "attention sampling" in lines[2] and "| 15.0 ± 7.1 | 20.0, 10.0 | 12.5 |" in lines[2]
    assert "the whole crop at 1/8 | 45.0 ± 7.1 | 40.0, 50.0 | –" in lines[3]


def test_the_page_shows_the_picture(tmp_path):
    text = written(tmp_path, [*OURS, *COARSE, LOOKED])
    check(text)
    assert "won with every seed" in text and "data:image/jpeg;base64,AAAA" in text and "lake, it said no lake" in text


@pytest.mark.parametrize("records", [OURS, [LOOKED], [MADE | {"kind": "tune", "method": "cnn_8", "rate": 0.001}]])
def test_any_part_of_the_records_makes_a_page(tmp_path, records: list[dict]):
    check(written(tmp_path, records))


@pytest.mark.parametrize("broken", [{"kind": "other"}, {"kind": "looked"}, {"kind": "run", "method": "murthy"}])
def test_a_record_that_lacks_something_is_named(tmp_path, broken: dict):
    with pytest.raises(ValueError, match="line 1"):
        written(tmp_path, [MADE | broken])
