"""The report on synthetic records: its words in every case, its markup, its behaviour in a browser."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flopwise.report import read_records, write_report
from flopwise.report.charts import Axis, Series, line_chart, linear_ticks, log_ticks, stacked_bars
from flopwise.report.importance import against, goal, markdown_table, select, summary_rows, verdict
from flopwise.report.page import table

BUDGET = 1e12


def make(
    method="uniform",
    seed=0,
    loss: float | None = 0.21,
    error=0.105,
    *,
    kind="run",
    rate=0.05,
    batch=64,
    budget=BUDGET,
    **other,
):
    """A record whose curve falls to its final values."""
    sampled = method != "uniform"
    scoring = 0.1 * budget if sampled else 0.0
    curve = []
    for share in [0.05 * i for i in range(1, 21)]:
        point = {"share": share, "flops": share * budget, "train_loss": (loss or 9.0) / share, "test_error": error}
        if sampled:
            point |= {"tau2": 1 + 3 * share, "on": float(share > 0.3), "rate_scale": 1.0}
        curve.append(point)
    return {
        "experiment": "importance",
        "kind": kind,
        "method": method,
        "seed": seed,
        "rate": rate,
        "batch_size": batch,
        "presample_size": 384,
        "budget": {"flops": budget},
        "flops": {"training": budget - scoring, "scoring": scoring, "loading": 0},
        "seconds": 22.0 if sampled else 20.0,
        "steps": 4000,
        "examples": 256000,
        "train_loss": loss,
        "test_error": error,
        "variance_ratio": {"predicted": 0.71, "measured": 0.74} if sampled else None,
        "share_on": 0.7 if sampled else None,
        "curve": curve,
        "machine": {"processor": "a CPU", "cores": 2, "torch": "2.13.0", "python": "3.11.7", "flopwise": "0.1.0"},
        "commit": "abc1234",
        "time": "2026-11-24T05:00:00Z",
    } | other


def runs(method, losses, errors):
    return [make(method, seed, *pair) for seed, pair in enumerate(zip(losses, errors, strict=True))]


def grid(rates=(0.02, 0.05, 0.1), batches=(32, 64, 128), best=(0.05, 64)):
    return [
        make(kind="tune", rate=rate, batch=batch, loss=0.2 if (rate, batch) == best else 0.3)
        for rate in rates
        for batch in batches
    ]


UNIFORM = runs("uniform", [0.20, 0.21, 0.22], [0.104, 0.105, 0.106])
BETTER = runs("rate_scale", [0.14, 0.15, 0.16], [0.095, 0.096, 0.097])
WORSE = runs("rate_scale", [0.30, 0.31, 0.32], [0.115, 0.116, 0.117])
ALL = (
    grid() + UNIFORM + runs("paper", [0.19, 0.2, 0.21], [0.105] * 3) + runs("same_rate", [0.18] * 3, [0.1] * 3) + BETTER
)


def written(tmp_path: Path, records, tail: str = "") -> str:
    source, target = tmp_path / "records.jsonl", tmp_path / "site" / "index.html"
    source.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    write_report(source, target)
    assert [path.name for path in target.parent.iterdir()] == ["index.html"]  # no temporary file is left
    return target.read_text(encoding="utf-8")


# --- the verdict ---


def test_better():
    title, text = verdict(UNIFORM + BETTER)
    assert title == "Importance sampling did better at the same budget"
    assert "the same budget of 1.00 TFLOP, over 3 seeds" in text
    assert "0.150 against uniform's 0.210: 0.71 ×, beyond the seeds' noise" in text
    assert "9.60 % against 10.50 %: 8.6 % lower, beyond the seeds' noise" in text
    assert "1.10 × uniform's wall-clock time" in text
    assert "Reached by importance sampling, rate scaled (0.71 ×, 8.6 % lower, beyond" in goal(UNIFORM + BETTER)


def test_worse():
    title, text = verdict(UNIFORM + WORSE)
    assert title == "Importance sampling did worse at the same budget"
    assert "1.48 ×, beyond the seeds' noise" in text and "10.5 % higher" in text
    assert goal(UNIFORM + WORSE).endswith("It was not reached.")


def test_equal_within_the_noise():
    title, text = verdict(UNIFORM + runs("rate_scale", [0.19, 0.21, 0.22], [0.103, 0.105, 0.106]))
    assert title == "Importance sampling made no difference beyond the seeds' noise"
    assert text.count("within the seeds' noise") == 2


def test_mixed():
    mixed = runs("rate_scale", [0.14, 0.15, 0.16], [0.115, 0.116, 0.117])
    assert verdict(UNIFORM + mixed)[0] == "A mixed result: training loss lower, test error higher"


def test_one_seed_states_no_noise():
    title, text = verdict(UNIFORM[:1] + BETTER[:1])
    assert title == "Importance sampling did better at the same budget (one seed)"
    assert "One seed: no statement about noise." in text and "seeds' noise" not in text
    assert "on one seed" in goal(UNIFORM[:1] + BETTER[:1])


def test_unequal_seeds_are_named():
    assert "over 2 seeds (uniform: 3)" in verdict(UNIFORM + BETTER[:2])[1]


def test_partial():
    assert verdict(grid())[0] == "Importance sampling: no verdict yet"
    assert "importance sampling has not run" in verdict(UNIFORM)[1]
    assert "uniform baseline has not run" in verdict(BETTER)[1]
    assert goal(UNIFORM).endswith("cannot be said yet.")


def test_another_variant_is_named_where_it_is_best():
    text = verdict(UNIFORM + BETTER + runs("same_rate", [0.10, 0.11, 0.12], [0.2] * 3))[1]
    assert "lowest training loss was importance sampling, same rate: 0.52 × uniform's, beyond" in text
    assert "lowest test error" not in text


@pytest.mark.parametrize("lost", [None, math.nan])
def test_a_diverged_seed_is_never_a_success(lost):
    records = UNIFORM + BETTER[:2] + [make("rate_scale", 2, lost, 0.9)]
    title, text = verdict(records)
    assert title == "Importance sampling diverged in 1 of 3 seeds"
    assert "left out of these means" in text and "over 2 seeds" in text
    assert "Reached" not in goal(records)
    row = summary_rows(records)[1]
    assert (row["diverged"], row["test_error"]) == (1, pytest.approx(0.0955))


def test_everything_diverged():
    lost = [make("rate_scale", seed, None, 0.9) for seed in range(2)]
    title, text = verdict(UNIFORM + lost)
    assert title == "Importance sampling diverged in 2 of 2 seeds" and "no result to compare" in text
    assert "baseline diverged" in verdict([make(loss=None, error=0.9), *BETTER])[0]


def test_unequal_costs_are_pointed_out():
    dear = [record | {"flops": record["flops"] | {"loading": 0.2 * BUDGET}} for record in BETTER]
    assert "1.20 × uniform's FLOPs: the costs are not equal" in verdict(UNIFORM + dear)[1]


def test_noise_is_two_standard_errors():
    uniform = runs("uniform", [1.0, 2.0], [0.1, 0.1])  # variance 1/2, so the standard error of the difference is 0.707
    assert against(runs("paper", [2.4, 3.4], [0.1, 0.1]), uniform, "train_loss").noise == "within"  # 1.40 < 1.414
    assert against(runs("paper", [2.5, 3.5], [0.1, 0.1]), uniform, "train_loss").noise == "beyond"
    assert against(uniform, uniform, "test_error").noise == "within"  # no spread, no difference


# --- the numbers ---


def test_summary_and_markdown():
    row = summary_rows(ALL)[3]
    assert row["method"] == "rate_scale" and row["seeds"] == 3
    assert row["train_loss"] == pytest.approx(0.15) and row["train_loss_std"] == pytest.approx(0.01)
    lines = markdown_table(ALL).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2] == "| uniform (tuned) | 0.210 ± 0.010 | 10.50 ± 0.10 | 0.0 | 1.00 TFLOP | 20.0 | – |"
    assert lines[5].endswith("| 0.150 ± 0.010 | 9.60 ± 0.10 | 10.0 | 1.00 TFLOP | 22.0 | 0.71 / 0.74 |")
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_the_newest_run_of_a_seed_under_the_newest_budget_counts():
    other_budget = [make(seed=seed, budget=1e11, loss=9.0) for seed in range(1, 4)]
    selection = select([*other_budget, make(loss=5.0), *UNIFORM])
    assert [record["train_loss"] for record in selection.methods["uniform"]] == [0.20, 0.21, 0.22]
    assert selection.left_out == 4


def test_ticks():
    assert linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(9.7, 25.2) == [10, 12, 14, 16, 18, 20, 22, 24]
    assert log_ticks(0.09, 2.5) == pytest.approx([0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(0.001, 9) == pytest.approx([0.001, 0.01, 0.1, 1])


def test_charts_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="at least one point"):
        line_chart("empty", [], x=Axis("x"), y=Axis("y"))
    with pytest.raises(ValueError, match="values above 0"):
        line_chart("log", [Series("a", [(0, 0), (1, 1)])], x=Axis("x"), y=Axis("y", log=True))
    with pytest.raises(ValueError, match="longer than 0"):
        stacked_bars("bars", ["a"], [("row", [0.0])], unit="s")
    assert "<svg" in line_chart("one point", [Series("a", [(1, 1)])], x=Axis("x"), y=Axis("y"))


# --- the page ---


class Balance(HTMLParser):
    """Raises on a tag which is closed in the wrong place, or never."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            raise ValueError(f"</{tag}> at {self.getpos()} closes nothing")


CASES = {
    "all": ALL,
    "tuning only": grid(),
    "one tuning run": grid()[:1],
    "one run": UNIFORM[:1],
    "no tuning": UNIFORM + BETTER,
    "no baseline": BETTER,
    "diverged": [*UNIFORM, *BETTER[:2], make("rate_scale", 2, None, 0.9), make(kind="tune", loss=None, error=0.9)],
    "all diverged": [make(loss=None, error=0.9), make("paper", 0, math.nan, 0.9)],
    "no curve": [record | {"curve": []} for record in UNIFORM + BETTER],
    "no FLOPs": [record | {"flops": {"training": 0, "scoring": 0, "loading": 0}} for record in UNIFORM],
    "another budget": [record | {"budget": {"seconds": 60}} for record in UNIFORM + BETTER],
    "nulls": [record | {"share_on": None, "variance_ratio": None, "commit": None, "time": None} for record in BETTER],
    "none": [],
}


@pytest.mark.parametrize("records", CASES.values(), ids=CASES)
def test_every_page_is_well_formed_and_self_contained(tmp_path, records):
    text = written(tmp_path, records)
    balance = Balance()
    balance.feed(text)
    balance.close()
    assert balance.open == [] and balance.seen.count("h1") == 1 and '<html lang="en">' in text
    assert balance.seen.count("caption") == balance.seen.count("table")
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert not {"link", "img", "iframe"} & set(balance.seen) and "src=" not in text
    assert "nan" not in text.lower() and "None" not in text


def test_the_whole_page_has_its_sections_in_order(tmp_path):
    text = written(tmp_path, ALL)
    assert "<h2>Importance sampling did better at the same budget</h2>" in text and text.count("<h2>") == 1
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", text)
    assert headings == [
        "Importance sampling did better at the same budget",
        "Results",
        "Along the budget",
        "The gate",
        "What scoring cost",
        "How the baseline was tuned",
        "When not to use importance sampling",
        "How it was measured",
    ]
    assert text.count("data-series=") == 4
    assert text.count('class="band ') == 2 * 4 + 2 * 3  # loss, error; both of the gate, without uniform
    assert "0.200 (chosen)" in text and "It lies inside the grid." in text
    assert "abc1234" in text and "importance sampling, rate scaled: 0, 1, 2" in text


def test_partial_pages_say_what_is_missing(tmp_path):
    assert "records.jsonl holds no finished run" in written(tmp_path, [])
    one = written(tmp_path, UNIFORM[:1])
    assert "Not run yet: importance sampling, the paper&#x27;s draw;" in one
    assert "One seed per method: no bands." in one and 'class="band ' not in one
    assert "no tuning run" in one
    assert "1 of 3 seeds diverged" in written(tmp_path, CASES["diverged"])
    assert "Diverged runs are not drawn" in written(tmp_path, CASES["diverged"])
    lost = written(tmp_path, CASES["all diverged"])
    assert "No run which converged has recorded a curve" in lost and "data-series" not in lost


def test_a_best_setting_on_an_edge_is_called_under_tuned(tmp_path):
    text = written(tmp_path, grid(best=(0.1, 64)))
    assert "its learning rate is the largest tried): the baseline may be under-tuned" in text
    assert "the batch size was not varied" in written(tmp_path, grid(batches=(64,)))
    assert "did not use the grid&#x27;s best setting, but rate 0.05, batch 64" in written(
        tmp_path, grid(best=(0.02, 32)) + UNIFORM
    )
    assert "Every setting of the grid diverged" in written(tmp_path, [make(kind="tune", loss=None, error=0.9)])


def test_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    text = written(tmp_path, [make(commit=evil, machine={"processor": evil, "cores": 2})])
    assert "alert('x')" not in text and "&lt;script&gt;alert(" in text
    assert "<b>" not in table("<b>", ["<b>", "<b>"], [["<b>", "<b>"]])


# --- reading ---


def test_a_torn_last_line_is_left_out(tmp_path):
    torn = json.dumps(make(seed=9) | {"commit": "é"}, ensure_ascii=False)
    assert written(tmp_path, ALL, tail=torn[: len(torn) // 2]) == written(tmp_path, ALL)
    path = tmp_path / "cut.jsonl"
    path.write_bytes(json.dumps(make()).encode() + b"\n" + '{"commit": "é'.encode()[:-1])  # in the middle of a letter
    assert len(read_records(path)) == 1
    path.write_text(json.dumps(make()), encoding="utf-8")  # whole, but without its newline
    assert len(read_records(path)) == 1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"experiment": ', "not JSON"),
        ("[1]", "not an object but list"),
        (json.dumps(make(kind="guess")), "kind 'guess', not one of tune, run"),
        (json.dumps(make(method="magic")), "method 'magic'"),
        (json.dumps(make(experiment="other")), "experiment 'other'"),
        (json.dumps(make(flops={"training": 1})), "without flops.scoring"),
        (json.dumps(make(curve=None)), "without curve"),
        (json.dumps(make(seconds="long")), "without seconds"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path, line, what):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(make())}\n{line}\n{json.dumps(make())}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2") as caught:
        write_report(path, tmp_path / "index.html")
    assert what in str(caught.value)
    assert not (tmp_path / "index.html").exists()


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    old = written(tmp_path, UNIFORM)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        written(tmp_path, ALL)
    assert [path.read_text(encoding="utf-8") for path in (tmp_path / "site").iterdir()] == [old]


# --- in a browser ---

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Headless Chromium's window is at least 500 pixels wide, so the page is looked at through frames. Then the tooltips.
PROBE = """<!doctype html><body style="margin:0"><pre id="found"></pre><script>
const found = [], frames = [400, 760, 1030, 1400].map((width) => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.srcdoc = PAGE;
  frame.onload = () => {
    const inside = frame.contentWindow, root = inside.document.documentElement;
    inside.document.querySelectorAll(".plot").forEach((plot) => {
      plot.focus();
      plot.dispatchEvent(new inside.KeyboardEvent("keydown", { key: "ArrowLeft" }));
      const tip = plot.querySelector(".tip").getBoundingClientRect();
      const fits = tip.width > 0 && tip.left >= 0 && tip.right <= inside.innerWidth;
      found.push(`tip ${plot.querySelectorAll(".tip b").length} ${fits}`);
    });
    found.push(`width ${width} ${inside.innerWidth} ${root.scrollWidth <= inside.innerWidth}`);
    document.querySelector("#found").textContent = found.join("\\n");
  };
  document.body.append(frame);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_a_browser(tmp_path):
    page = json.dumps(written(tmp_path, ALL)).replace("</", "<\\/")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("PAGE", page), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command += ["--virtual-time-budget=3000", "--window-size=1500,4000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = done.stdout.split('<pre id="found">')[1].split("</pre>")[0].splitlines()
    widths = [f"width {width} {width} true" for width in (400, 760, 1030, 1400)]
    assert sorted(found) == sorted(widths + 4 * ["tip 4 true"] * 2 + 4 * ["tip 3 true"] * 2), found


def test_the_data_are_those_of_the_records(tmp_path):
    text = written(tmp_path, [make(data={"name": "Fashion-MNIST", "train": 60_000, "test": 10_000})])
    assert "60,000 augmented images of Fashion-MNIST, tested on 10,000 others" in text
    assert "10,000 augmented images" not in text.replace("60,000", "")
