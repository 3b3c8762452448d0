"""The page of the claims: its table, a section each, and what a browser makes of it."""

import itertools
import sys
from pathlib import Path

import browser
import pytest
from pages import check, headings, written

from flopwise.report import claims

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import claim_records  # pyright: ignore[reportMissingImports]

NAMES = ("importance", "attention", "length", "decoding", "tradeoff", "pretrained")
VERDICTS = itertools.cycle(("reproduced", "in part", "not reproduced"))
OPERATORS = "Clustered attention beside other replacements of softmax that need no training"


def verdict(number: int, name: str, said: str = "reproduced") -> dict:
    texts = {
        "statement": f"Statement of {name}.",
        "paper": "317 × as many images a second & more (ICML)",
        "ours": "<12> × as fast",
        "baseline": "the same model with softmax",
        "budget": "1 TFLOP",
        "why": "an_identifier_that_is_rather_long_and_cannot_be_broken_anywhere",
        "rule": "the error is lower",
        "limits": "Short texts.",
    }
    record = {"experiment": "claims", "kind": "verdict", "claim": name, "number": number, "verdict": said}
    return record | texts | claim_records.MACHINE


def everything() -> list[dict]:
    records = [record for name in NAMES for record in getattr(claim_records, name)()]
    return records + [verdict(i, name, next(VERDICTS)) for i, name in enumerate(NAMES, start=1)]


def test_a_table_and_a_section_for_each_claim(tmp_path: Path):
    text = written(tmp_path, everything())
    check(text)
    (first, *others) = headings(text)
    assert first == "2 of 6 claims reproduced, 2 in part, 2 not reproduced"
    assert others == [f"{i}. Statement of {name}" for i, name in enumerate(NAMES, start=1)]
    assert text.count("When not to use this: Short texts.") == 6 and "&lt;12&gt;" in text
    for subject in ("Cost against length", "Speed", OPERATORS, "The gate"):
        assert text.count(f"<h3>{subject}</h3>") == (subject != "The gate")
    for technique in ("importance sampling", "attention sampling", "linear attention", "clustered attention"):
        assert f"<h3>When not to use {technique}</h3>" in text


def test_the_last_verdict_counts_and_a_claim_may_lack_records(tmp_path: Path):
    records = [verdict(6, "pretrained", "not run"), verdict(3, "length"), verdict(6, "pretrained", "in part")]
    text = written(tmp_path, records)
    check(text)
    assert headings(text)[0] == "1 of 2 claims reproduced, 1 in part" and "<h3>" not in text
    assert claims.markdown_table(records).count("\n") == 4 and "◐ in part" in claims.markdown_table(records)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"paper": None}, "without paper"),
        ({"claim": "speed"}, "with claim 'speed'"),
        ({"verdict": "yes"}, "with verdict 'yes'"),
        ({"number": "one"}, "without number"),
        ({"machine": None}, "without machine"),
    ],
)
def test_malformed_verdicts(change: dict, complaint: str, tmp_path: Path):
    with pytest.raises(ValueError, match=complaint):
        written(tmp_path, [verdict(1, "importance") | change])


@pytest.mark.skipif(browser.BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(width: int, tmp_path: Path):
    text = written(tmp_path, everything())
    page = browser.seen(text, tmp_path, width=width)
    assert page["width"] == width and page["scroll"] <= width and page["wide"] == [] and page["empty"] == 0
    names = [f"H2 {i}. Statement of {name}" for i, name in enumerate(NAMES, start=1)]
    assert [h for h in page["headings"] if h.startswith("H2")][1:] == names


@pytest.mark.skipif(browser.BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_the_browser_test_sees_what_is_wrong(tmp_path: Path):
    text = written(tmp_path, everything())
    wide = text.replace("<main>", '<main><p style="width: 900px">wide</p>')
    assert browser.seen(wide, tmp_path, width=400)["wide"] == ["P wide"]
    with pytest.raises(AssertionError):
        browser.seen(text.replace("<script>", "<script>undefined.name;"), tmp_path, width=400)
