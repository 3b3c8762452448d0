"""The report on clustered attention, on made-up records: its words whichever way it went, its numbers, its pages."""

import base64
import json
import math
import re
import struct
import zlib
from itertools import pairwise
from typing import Any

import pytest
from clustered_records import length, picture, search, speech, text
from pages import check, headings, written

from flopwise.report import read_records, write_report
from flopwise.report.charts import LETTER, Axis, Cloud, frontier, scatter
from flopwise.report.clustered import cells, columns, faster_from, goals, markdown_table, select, verdict
from flopwise.report.pictures import heat_map

GRID = [
    text(c, k, cosine, time) for c, k, cosine, time in ((32, 0, 0.9, 0.5), (64, 32, 0.992, 0.7), (64, 64, 0.995, 0.8))
]
LENGTHS = [length(512, 11.0), length(1024, 8.0), length(4096, 3.5)]
ALL = [*GRID, speech(), speech(25, 0, 0.2, 0.6), *LENGTHS, picture()]


# --- the verdict ---


def test_faster():
    title, words = verdict(ALL)
    assert title == "Clustered attention kept the answers in less time"
    assert "Text (MiniLM, 60 texts, 512 tokens each): 2 of 3 settings keep a mean cosine of 0.99." in words
    assert "64 clusters, top-32, has a mean cosine of 0.9920 to the exact embeddings (lowest 0.9820)" in words
    assert "Attention takes 0.35 × its exact time and the whole model 0.70 ×." in words
    assert "50 clusters, top-32, differs from the exact transcripts in 2.0 % of the words" in words
    assert (
        "faster from 1024 tokens on: at 4096 tokens it takes 0.35 × the exact time; were attention free, 0.20 ×"
        in words
    )


@pytest.mark.parametrize(
    ("time", "title", "close"),
    [
        (1.3, "kept the answers, but took longer", "1.30 ×: exact attention is the faster one here"),
        (1.0, "kept the answers, but saved no time", "1.00 ×: no difference to speak of"),
        (0.98, "kept the answers, but saved no time", "0.98 ×: no difference"),
    ],
)
def test_not_faster(time, title, close):
    found, words = verdict([text(ratio=time), speech(ratio=time)])
    assert found == f"Clustered attention {title}"
    assert words.count(close) == 2


def test_answers_not_kept():
    title, words = verdict([text(cosine=0.9, ratio=0.5), text(32, 0, cosine=0.8), speech(wrong=0.5)])
    assert title == "Clustered attention did not keep the answers"
    assert "none of 2 settings keeps a mean cosine of 0.99. The closest, 64 clusters, top-64, has" in words
    assert "none of 1 setting keeps 97 % of the words" in words


def test_mixed():
    assert verdict([text(), speech(wrong=0.5)])[0] == "A mixed result: text faster, speech answers not kept"
    joined = verdict([text(ratio=2.0), speech(), speech(joined=True, ratio=1.0)])[0]
    assert joined == "A mixed result: text slower, speech faster, joined speech no faster"


def test_partial():
    title, words = verdict(GRID[:1])
    assert title == "Clustered attention did not keep the answers (text only)" and "Speech was not measured." in words
    title, words = verdict([speech()])
    assert title.endswith("(speech only)") and "Text was not measured." in words
    title, words = verdict(LENGTHS)
    assert title == "No verdict yet" and "faster from 1024 tokens on" in words
    assert "is not faster than exact at 512 tokens" in verdict([text(), length(512, 11.0)])[1]
    assert verdict([picture()])[0] == "No verdict yet"


@pytest.mark.parametrize("lost", [None, math.nan])
def test_what_gave_no_number_kept_nothing(lost):
    title, words = verdict([text(cosine=lost, ratio=0.5), speech(wrong=lost)])
    assert title == "Clustered attention did not keep the answers" and "none of 1 setting gave a number" in words


def test_goals():
    text_goal, speech_goal, at_4096, at_8192 = goals([*ALL, speech(examples=60)])
    assert text_goal.endswith("within one point of exact: reached.")
    assert speech_goal.endswith("attention time: reached.")
    assert at_4096.endswith("at least 2.7 times faster: 2.86 times, reached.")
    assert at_8192.endswith("not measured.")
    assert goals(ALL)[1].endswith("attention time: reached on 16 clips; the goal asks for 60.")
    missed = goals([text(neighbours_kept=0.85), speech(wrong=0.03), length(4096, 5.0)])
    assert all("not reached" in goal for goal in missed[:3])
    assert "not reached" in goals([text(topic_accuracy={"exact": 0.8, "clustered": 0.78})])[0]
    assert "not reached" in goals([text(topic_accuracy=None)])[0]
    assert all(goal.endswith("not measured.") for goal in goals([text(32, 32)]))


# --- the numbers ---


def test_the_newest_examples_count():
    old = [text(c, 32, examples=8) for c in (16, 32)]
    repeated = text(cosine=0.999)
    selection = select([*old, *GRID, repeated, *LENGTHS, length(512, 9.0), length(512, 1.0, clusters=8), picture()])
    (task,) = selection.tasks
    assert [row.label for row in task.rows] == ["32/0", "64/32", "64/64"] and task.rows[-1].fidelity == 0.999
    assert [record["clusters"] for record in selection.lengths] == [8]
    assert selection.left_out == 2 + 1 + 4


def test_the_table():
    (task,) = select(GRID).tasks
    assert len(columns(task)) == len(cells(task.rows[0])) == 7
    lines = markdown_table(task).splitlines()
    assert lines[2] == "| 32 clusters, plain | 0.9000 | 0.8900 | 90.0 % | 79.0 % (80.0 %) | 0.25 × | 0.50 × |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_faster_from_is_where_it_stays_faster():
    assert faster_from(LENGTHS) == 1024
    assert faster_from([length(512, 5.0), length(1024, 11.0), length(2048, 5.0)]) == 2048
    assert faster_from([length(512, 5.0), length(1024, 9.9)]) is None


def test_frontier():
    points = [(1.0, 1.0), (0.5, 0.9), (0.6, 0.8), (0.5, 0.7), (0.4, 0.2), (1.1, 1.0)]
    assert frontier(points) == [(0.4, 0.2), (0.5, 0.9), (1.0, 1.0)]
    assert frontier([]) == []


def test_labels_never_cover_one_another():
    points = [(0.5 + 0.01 * (i % 5), 0.9 + 0.001 * (i // 5), f"{i}/32") for i in range(30)]
    drawn = scatter("many", [Cloud("a", points)], x=Axis("x"), y=Axis("y"))
    found = re.findall(r'<text class="mark" x="([\d.]+)" y="([\d.]+)">(\d+/32)</text>', drawn)
    assert 5 < len(found) <= 30 and drawn.count("<circle") == 30 + 1
    boxes = sorted((float(y), float(x), float(x) + LETTER * len(label)) for x, y, label in found)
    for one, other in pairwise(boxes):
        assert other[0] - one[0] >= 14 or other[1] >= one[2] or one[1] >= other[2]


def test_charts_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="at least one point"):
        scatter("empty", [Cloud("a", [])], x=Axis("x"), y=Axis("y"))
    for rows, top in (([], 1.0), ([[1.0], [1.0, 2.0]], 1.0), ([[1.0]], 0.0)):
        with pytest.raises(ValueError, match="rows of one length"):
            heat_map("bad", rows, top=top)


def test_a_picture_is_a_png_of_its_matrix():
    drawn = heat_map("a", [[0.0, 0.25, 1.0], [4.0, -1.0, 0.0]], top=1.0)
    data = base64.b64decode(drawn.partition("base64,")[2].partition('"')[0])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        name, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size) == (zlib.crc32(name + content),)
        chunks[name] = content
        place += 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2) and len(chunks[b"PLTE"]) == 3 * 256
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0, 128, 255, 0, 255, 0, 0])


# --- the pages ---

BARE: dict[str, Any] = {
    "neighbours_kept": None,
    "topic_accuracy": None,
    "layer_errors": None,
    "commit": None,
    "time": None,
}
CASES = {
    "all": ALL,
    "one text": GRID[:1],
    "one speech": [speech()],
    "unchanged transcripts": [speech(wrong=0.0, transcripts=[])],
    "one length": LENGTHS[:1],
    "picture only": [picture()],
    "empty pictures": [picture() | {"pictures": []}],
    "bare": [text(**BARE)],
    "no number": [text(cosine=None), speech(wrong=None)],
    "joined": [speech(), speech(joined=True)],
    "uneven layers": [text(), text(32, layer_errors=[None])],
    "tune": search(),
    "tune, exact": search(chosen=False),
    "tune, not ended": search(ended=False),
    "tune, timings only": search(ended=False)[:9],
    "tune, verdict only": search(chosen=False)[-1:],
    "everything": [*ALL, *search()],
}


@pytest.mark.parametrize("records", CASES.values(), ids=CASES)
def test_every_page_is_well_formed_and_self_contained(tmp_path, records):
    page = written(tmp_path, records)
    balance = check(page)
    assert balance.seen.count("img") == 4 * any(r["kind"] == "picture" and r["pictures"] for r in records)


def test_the_whole_page_has_its_sections_in_order(tmp_path):
    page = written(tmp_path, ALL)
    assert headings(page) == ["Clustered attention kept the answers in less time"]
    assert headings(page, "23") == [
        "Clustered attention kept the answers in less time",
        "Text: fidelity against time",
        "Speech: fidelity against time",
        "End to end, at longer inputs",
        "Attention itself",
        "When not to use clustered attention",
        "How it was measured",
    ]
    assert page.count('class="scatter"') == 4 and page.count('class="plot"') == 2
    assert "leave the message" in page and "abc1234" in page
    assert "Of 512 to 4096 tokens, measured here, it was faster from 1024 tokens on." in page


def test_experiments_in_one_file_follow_one_another(tmp_path):
    page = written(tmp_path, [*search(), *ALL])
    found = headings(page)
    assert found.index("Clustered attention kept the answers in less time") < found.index("Cluster 2 of 3 layers")
    assert headings(page, "23").count("How it was measured") == 2
    assert '<a href="#s0">Clustered attention kept the answers in less time</a>' in page


def test_operators_alone_are_compared_in_one_table(tmp_path):
    methods = [
        {"method": "clustered, C=32, top-32", "milliseconds": 10.0, "speedup": 6.0, "error": 0.3},
        {"method": "clustered, C=200, top-64", "milliseconds": 90.0, "speedup": 0.7, "error": 0.04},
        {"method": "FAVOR+, 128 features", "milliseconds": 30.0, "speedup": 2.0, "error": 0.69},
    ]
    made = {key: value for key, value in text().items() if key in ("experiment", "machine", "commit", "time")}
    made |= {"kind": "frontier", "length": 2048}
    noise = [method | {"error": 0.76} for method in methods[:2]]
    page = written(
        tmp_path, [made | {"inputs": "structured", "methods": methods}, made | {"inputs": "noise", "methods": noise}]
    )
    check(page)
    assert "clustered attention 0.300 (C=32, top-32, 6.00 × softmax" in page
    assert "the others 0.690 (FAVOR+, 128 features, 2.00 × softmax" in page
    assert page.count('scope="row"') == 3 and page.count('data-column="error, noise inputs">0.760<') == 2
    assert page.count('data-column="error, noise inputs">–<') == 1
    assert headings(page, "3") == ["When not to use clustered attention"]
    slow = [method | {"speedup": 0.5} for method in methods]
    assert "nothing is faster than softmax" in written(tmp_path, [made | {"inputs": "structured", "methods": slow}])


def test_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    said = [{"exact": evil, "clustered": evil}]
    tuned = [record | {"run": {**record["run"], "model": evil}, "verdict": evil} for record in search()]
    page = written(tmp_path, [text(model=evil), speech(transcripts=said), *tuned])
    check(page)
    assert "alert('x')" not in page and page.count("&lt;script&gt;") >= 4


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (text(kind="guess"), "kind 'guess', not one of text, speech, length, picture"),
        (text(seconds={"exact": 1.0}), "without seconds.clustered"),
        (text(cosine=None) | {"cosine": 1.0}, "without cosine"),
        (text(machine=None), "without machine"),
        (length(512, 1.0, seconds={"exact": 1.0, "clustered": 1.0}), "without seconds.without"),
        (picture() | {"pictures": None}, "without pictures"),
        (search()[-1] | {"clustered": None}, "without clustered"),
        (search()[-1] | {"kind": "guess"}, "kind 'guess', not one of timing, layer, candidate, tuned"),
        (search()[0] | {"seconds": None}, "without seconds"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path, record, what):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(text())}\n{json.dumps(record)}\n{json.dumps(text())}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2") as caught:
        write_report(path, tmp_path / "index.html")
    assert what in str(caught.value)
    with pytest.raises(ValueError):
        read_records(path)


# --- the page of tune ---


def test_what_tune_chose(tmp_path):
    page = written(tmp_path, search())
    assert headings(page) == [
        "Cluster 2 of 3 layers",
        "What the search saw",
        "Layer by layer",
        "From which length it pays",
        "Use it",
        "When not to use clustered attention",
        "How it was measured",
    ]
    assert "Cluster 2 of 3 layers: 0.70 x the time." in page and "mean over 20 examples, lowest 0.9840" in page
    assert "asked for: 0.99" in page and "3 × 64/32" in page and "2 × 16/16" in page
    assert '<td role="cell" data-column="chosen" class="marked">16 clusters, top-16</td>' in page
    assert page.count('data-column="chosen">exact</td>') == 1  # the third layer
    assert "from 256 tokens on. Below that length the model stays exact" in page


def test_tune_that_stays_exact_says_so_and_gives_nothing_to_use(tmp_path):
    page = written(tmp_path, search(chosen=False))
    assert headings(page)[0] == "Stay exact" and "Use it" not in headings(page)
    assert "1.10 ×" in page and "not faster" in page
    never = [record | {"break_even": None} for record in search(chosen=False)]
    assert "is any setting faster than exact attention: stay exact." in written(tmp_path, never)


def test_the_newest_search_counts(tmp_path):
    page = written(tmp_path, [*search(chosen=False, started="earlier"), *search()])
    assert headings(page)[0] == "Cluster 2 of 3 layers" and "Left out: 19 records of earlier searches." in page


def test_a_reversed_axis_has_its_small_values_at_the_top():
    drawn = scatter("a", [Cloud("a", [(0, 0.1, ""), (1, 0.001, "")])], x=Axis("x"), y=Axis("y", log=True, reverse=True))
    heights = [float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)" r="4.5"', drawn)]
    assert heights[1] < heights[0]
    assert all(f">{tick}</text>" in drawn for tick in ("0.1", "0.01", "0.001"))


def test_what_is_kept_is_marked(tmp_path):
    page = written(tmp_path, [text(32, 0, cosine=0.9, ratio=0.5), text(ratio=0.8), text(100, ratio=1.2)])
    assert re.findall(r'data-column="([a-z ]+)" class="marked">([\d.]+)', page) == [
        ("mean cosine", "0.9950"),
        ("whole model time", "0.80"),
        ("mean cosine", "0.9950"),
    ]
