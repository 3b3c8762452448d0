"""The page of several trainings: outcomes beyond noise, predictions, and a section for each."""

import re

import pytest
from pages import check, headings, written
from test_audit_page import AUDIT

from flopwise.report import settings

MACHINE = {"machine": AUDIT["machine"], "commit": "abc", "time": "2026-01-01T00:00:00+00:00"}


def run(setting: str, method: str, seed: int, loss: float | None, error: float = 0.1, kind: str = "run") -> dict:
    points = [(0.001, 0.0, None), (0.5, 1.0, 0.6), (1.0, 1.0, 0.4)]
    curve = [
        {"share": share, "on": on, "R": R, "tau2": 2.0, "train_loss": 2 - share, "test_error": 0.9 - share / 2}
        for share, on, R in points
    ]
    record = {"experiment": "importance_settings", "kind": kind, "setting": setting, "method": method, "curve": curve}
    record |= {
        "run": {"setting": setting, "seed": seed, "rate": 0.001},
        "batch_size": 16,
        "seconds": 20.0,
        "passes": 3.0,
    }
    return record | {"train_loss": loss, "test_error": error, "share_on": 0.8} | MACHINE


def runs(setting: str, method: str, losses: list[float], kind: str = "run") -> list[dict]:
    return [run(setting, method, seed, loss, 0.1 + 0.01 * seed, kind) for seed, loss in enumerate(losses)]


def audit(setting: str, helps: bool, R: float) -> dict:
    course = {"on": 0.8, "R": R, "needed": 0.7}
    return AUDIT | {"run": {"setting": setting}, "helps": helps, "budget": 900, "course": course}


RECORDS = [
    audit("texts", True, 0.9),
    audit("tiles", True, 0.6),
    *(run(setting, "uniform", 0, 0.9, kind="tune") for setting in ("texts", "tiles")),
    *(
        run("texts", "uniform", seed, loss, kind="tune") | {"run": {"seed": seed, "rate": rate}, "batch_size": size}
        for size, rate, seed, loss in ((8, 0.1, 0, 1.43), (8, 0.2, 0, 1.25), (32, 0.1, 0, 2.0), (32, 0.1, 1, 2.5))
    ),
    *runs("texts", "uniform", [1.0, 1.1, 1.2]),
    *runs("texts", "flopwise", [0.7, 0.8, 0.9]),
    *runs("texts", "infobatch", [1.5, 1.6, 1.7]),
    *runs("texts", "uniform", [1.0, 1.1, 1.2], "timed"),
    *runs("texts", "flopwise", [1.0, 1.1, 1.2], "timed"),
    *runs("tiles", "uniform", [1.0, 1.1, 1.2]),
    *runs("tiles", "flopwise", [1.0, 1.1, 1.3]),
]


def test_seeds_are_compared_one_by_one():
    uniform = runs("texts", "uniform", [1.0, 2.0, 3.0])
    beyond = settings.paired(runs("texts", "flopwise", [0.9, 1.9, 2.86]), uniform, "train_loss")  # 0.113, t = 8.5
    within = settings.paired(runs("texts", "flopwise", [0.9, 1.9, 2.65]), uniform, "train_loss")  # 0.183, t = 2.2
    assert (beyond.outcome, within.outcome) == ("lower", "same") and beyond.uniform == 2.0
    few = settings.paired(runs("texts", "flopwise", [0.9]), uniform, "train_loss")
    assert few.noise == "unknown" and few.uniform == 1.0


def test_better_is_beyond_the_noise():
    results = settings.Results.of(RECORDS)
    assert results.settings == ["texts", "tiles"]
    assert results.counts("flopwise", "run", "train_loss") == {"better": 1, "equal": 1, "worse": 0}
    assert results.counts("infobatch", "run", "train_loss") == {"better": 0, "equal": 0, "worse": 1}
    assert results.counts("flopwise", "timed", "train_loss") == {"better": 0, "equal": 1, "worse": 0}
    assert results.counts("flopwise", "run", "test_error") == {"better": 0, "equal": 2, "worse": 0}
    assert results.against("tiles", "infobatch", "run", "train_loss") is None


def test_one_seed_is_neither_better_nor_worse():
    records = [*RECORDS, *runs("tiles", "infobatch", [0.1])]
    results = settings.Results.of(records)
    assert results.counts("infobatch", "run", "train_loss") == {"better": 0, "equal": 0, "worse": 1}
    _, (_, tiles) = settings.comparison(results, "infobatch")
    assert tiles[0] == "tiles" and tiles[1].endswith("one seed")


def test_a_method_that_diverged_has_no_mean():
    records = [*RECORDS, run("texts", "flopwise", 3, None)]
    assert settings.Results.of(records).against("texts", "flopwise", "run", "train_loss") is None


def test_the_measured_R_counts_1_while_the_gate_is_off():
    def point(share: float, on: float, R: float | None) -> dict[str, float | None]:
        return {"share": share, "on": on, "R": R}

    off = [point(0.0, 0.0, None), point(0.5, 0.0, 1.2), point(1.0, 0.0, 1.1)]
    assert settings.measured_R(off) == pytest.approx(1.0)
    on = [point(0.003, 0.0, None), point(0.5, 1.0, 0.6), point(1.0, 1.0, 0.4)]
    assert settings.measured_R(on) == pytest.approx(0.5 * 0.8 + 0.5 * 0.5)


def test_predictions_are_held_against_what_came():
    results = settings.Results.of(RECORDS)
    _, (texts, tiles) = settings.predictions(results)
    assert texts == ["texts", "70.0 %: yes", "better", "yes", "0.90", "0.65"]
    assert tiles == ["tiles", "70.0 %: yes", "equal", "no", "0.60", "0.65"]
    assert "right in 1 of 2 settings" in settings.audit_summary(results)
    assert settings.audit_summary(results).endswith("of the measured in 1.")


def test_the_page(tmp_path):
    text = written(tmp_path, RECORDS)
    check(text)
    title = "Importance sampling in 2 trainings: lower training loss in 1, equal in 1, higher in 0"
    assert title in headings(text) and {"texts", "tiles"} <= set(headings(text, "3"))
    assert "(0.73 x) better" in text and "InfoBatch" in text and "At equal CPU seconds" in text
    assert (
        "Taken, by all: batches of 16, rate 0.001" in text
        and "best rate, all seeds" in text
        and text.count("along the budget") >= 4
    )


def test_four_lines_have_four_colours():
    methods = {method: runs("texts", method, [0.9, 1.0]) for method in settings.NAMES}
    for chart in settings._curves(methods):
        assert re.findall(r'class="line s(\d)"', chart) == ["0", "1", "2", "3"] * 2  # and in the legend


def test_the_grid_that_uniform_sampling_was_tuned_on():
    text = settings._tuning(settings.Results.of(RECORDS), "texts")
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)</t", row) for row in text.split("<tr")]
    assert [row for row in rows if row][1:] == [
        ["8", "–", "1.43", "1.25", "1.25"],
        ["16", "0.900", "–", "–", "0.900"],
        ["32", "–", "2.00", "–", "2.25 ± 0.35"],
    ]


def test_a_page_of_what_is_done_so_far(tmp_path):
    check(text := written(tmp_path, [r for r in RECORDS if r.get("kind") == "tune"]))
    assert "not finished" in text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"method": "magic"}, "method"),
        ({"setting": None}, "setting"),
        ({"kind": "x"}, "kind"),
        ({"seconds": ""}, "sec"),
        ({"batch_size": None}, "batch_size"),
    ],
)
def test_malformed_records(change: dict, complaint: str, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        written(tmp_path, [RECORDS[2] | change])
