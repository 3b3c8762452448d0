"""Attention sampling on digits hidden in megapixel images: records -> the sections of the page."""

from collections.abc import Sequence
from statistics import mean, stdev

from flopwise.report.charts import Axis, Series, line_chart
from flopwise.report.page import Section, bullets, cards, paragraph, side_by_side, table, under
from flopwise.report.pictures import heat_map, mosaic
from flopwise.report.records import Record, by_method_of, finite, of_no_kind, where_measured, without_number
from flopwise.report.words import flops_text, mean_std, number, percent, plural

NEEDS = {
    "run": ("seed", "seconds", "examples", "test_error"),
    "tune": ("rate",),
    "cost": ("side",),
    "looked": ("label",),
    "shipped": ("test_error", "tested", "side", "n_patches", "patch_size"),
}
NAMES = {
    "murthy": "attention sampling (Murthy)",
    "des_raj": "attention sampling (Des Raj)",
    "replacement": "attention sampling, with replacement (the paper)",
    "replacement_loo": "attention sampling, with replacement and baseline",
    "lowres_8": "a network made for the image at 1/8",
    "lowres_4": "a network made for the image at 1/4",
    "cnn_1": "the whole image",
    "cnn_2": "the whole image at 1/2",
    "cnn_4": "the whole image at 1/4",
    "cnn_8": "the whole image at 1/8",
}
OURS = "murthy"
WHOLE = ("cnn", "lowres")  # begin the names of methods without attention
COLUMNS = ["method", "test error, %", "top-k at test time, %", "seeds", "rate", "images seen", "FLOPs"]


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    if wrong := of_no_kind(record, list(NEEDS)):
        return wrong
    kind = record["kind"]
    if kind in ("run", "tune") and not isinstance(record.get("method"), str):
        return "one without method"
    if kind == "run" and not isinstance(record.get("curve"), list):
        return "one without curve (a list)"
    return without_number(record, NEEDS[kind])


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of every method, in the order of `NAMES`; only those with the budget and image size of the last."""
    runs = by_method_of(records, "attention")
    return {method: runs[method] for method in [*NAMES, *runs] if method in runs}


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One line a method, under `COLUMNS`."""
    lines = []
    for method, found in by_method(records).items():
        error, spread = _error(found)
        lines.append(
            [
                NAMES.get(method, method),
                mean_std(100 * error, None if spread is None else 100 * spread),
                _topk(found),
                str(len(found)),
                f"{found[0]['rate']:g}" if finite(found[0].get("rate")) else "–",
                f"{mean(run['examples'] for run in found):.0f}",
                flops_text(mean(run["flops"] for run in found)) if finite(found[0].get("flops")) else "–",
            ]
        )
    return lines


def sections(records: Sequence[Record]) -> list[Section]:
    """Verdict, table and curves, cost, glimpses, limits, method; what has no data is left out."""
    runs = by_method(records)
    costs = [r for r in records if r["kind"] == "cost"]
    trained = [r for r in records if r["kind"] == "shipped"]
    tuned = {r["method"] for r in records if r["kind"] == "tune"}
    first = _shipped(trained[-1], costs) if trained and not runs else _verdict(runs, tuned=tuned)
    found = []
    if runs:
        found.append(_comparison(records, runs))
    if costs:
        found.append(_cost(costs))
    if looked := [r for r in records if r["kind"] == "looked"]:
        found.append(_looked(looked))
    return under(first, [*found, _when_not(), _measured(records, runs)])


def _error(runs: Sequence[Record]) -> tuple[float, float | None]:
    errors = [run["test_error"] for run in runs]
    return mean(errors), stdev(errors) if len(errors) > 1 else None


def _verdict(runs: dict[str, list[Record]], tuned: set[str]) -> Section:
    whole = [method for method in runs if method.startswith(WHOLE)]
    if OURS not in runs or not whole:
        return Section(
            "Attention sampling", paragraph("The comparison is not finished; the same command goes on.", "lead")
        )
    best = min(whole, key=lambda method: _error(runs[method])[0])
    ours, theirs = _error(runs[OURS])[0], _error(runs[best])[0]
    seconds = number(runs[OURS][0]["budget"]["seconds"])
    rate = "at its own rate" if best in tuned else "at one rate, not tuned"
    title = (
        "Attention sampling: a few patches beat every pixel"
        if ours < theirs
        else "Attention sampling lost: every pixel was better here"
    )
    text = (
        f"With {seconds} seconds of processor time each, attention sampling misses {percent(ours)} of the test images "
        f"and the best network that sees all of an image, {NAMES[best]}, {percent(theirs)}. Chance misses 90 %."
    )
    figures = [
        ("attention sampling, test error", percent(ours), f"{plural(len(runs[OURS]), 'seed')}"),
        (f"{NAMES[best]}, test error", percent(theirs), f"the best network over the whole image, {rate}"),
        (
            "images trained on in that time",
            f"{number(runs[OURS][0]['examples'] / max(1, runs[best][0]['examples']))} ×",
            f"{runs[OURS][0]['examples']} against {runs[best][0]['examples']}",
        ),
    ]
    return Section(title, paragraph(text, "lead") + cards(figures))


def _shipped(trained: Record, costs: Sequence[Record]) -> Section:
    """A model that came trained: how often it is right, and what a step costs beside a network over all pixels."""
    pixels = trained["n_patches"] * trained["patch_size"] ** 2 / trained["side"] ** 2
    error = percent(trained["test_error"])
    text = (
        f"Five digits lie among fifty strokes in images of {trained['side']} × {trained['side']} pixels: which digit "
        "is there three times? A model that was told nothing but the answers reads "
        f"{trained['n_patches']} patches of an image, {percent(pixels)} of its pixels, and misses {error} of "
        f"{trained['tested']} test images. Chance misses 90 %. How networks over all pixels fare in the same time, "
        "flopwise demo attention --train shows."
    )
    figures = [("test error", error, f"{trained['tested']} images; chance misses 90 %")]
    newest = {(r["method"], r["side"]): r for r in costs}
    side = max((side for _, side in newest), default=0)
    if (OURS, side) in newest and ("cnn_1", side) in newest:
        ours, theirs = newest[OURS, side], newest["cnn_1", side]
        for key, name in (("milliseconds", "processor time"), ("megabytes", "added memory")):
            if finite(ours.get(key)) and finite(theirs.get(key)):
                unit = "ms" if key == "milliseconds" else "MB"
                remark = f"a training step: {number(ours[key])} against {number(theirs[key])} {unit} on all pixels"
                figures.append((f"less {name}", f"{number(theirs[key] / ours[key])} ×", remark))
    return Section(
        "Attention sampling: a few patches of a large image are enough", paragraph(text, "lead") + cards(figures)
    )


def _comparison(records: Sequence[Record], runs: dict[str, list[Record]]) -> Section:
    estimators = [method for method in runs if not method.startswith(WHOLE)]
    whole = [method for method in runs if method.startswith(WHOLE)]
    charts = []
    for name, chosen in (("Every estimator", estimators), ("Beside networks on the whole image", [OURS, *whole])):
        series = []
        for colour, method in enumerate(chosen[:4]):  # as many colours as there are
            curve = runs[method][0]["curve"] if method in runs else []
            points = [(p["seconds"], 100 * p["test_error"]) for p in curve if finite(p.get("test_error"))]
            if points:
                series.append(Series(NAMES.get(method, method), points, colour=colour))
        if len(series) > 1:
            x, y = Axis("processor time", "s"), Axis("test error", "%")
            charts.append(line_chart(f"{name}: test error against time, seed 0", series, x=x, y=y))
    text = (
        "Large images hold five digits among fifty strokes: which digit is there three times? All methods have the "
        "same seconds. Networks on the whole image have the patches' layers, but for those made for its size."
    )
    return Section(
        "At equal seconds", paragraph(text) + side_by_side(charts) + table("Test error", COLUMNS, rows(records))
    )


def _topk(runs: Sequence[Record]) -> str:
    errors = [run["test_errors"]["topk_10"] for run in runs if finite((run.get("test_errors") or {}).get("topk_10"))]
    return number(100 * mean(errors)) if errors else "–"


def _cost(costs: Sequence[Record]) -> Section:
    lines = [
        [
            f"{r['side']} × {r['side']}, {NAMES.get(r.get('method', ''), r.get('method', ''))}",
            number(r["milliseconds"]) if finite(r.get("milliseconds")) else "–",
            number(r["megabytes"]) if finite(r.get("megabytes")) else "–",
        ]
        for r in costs
    ]
    return Section(
        "One training step",
        table("For one image", ["image and method", "processor time, ms", "added memory, MB"], lines),
    )


def _looked(looked: Sequence[Record]) -> Section:
    body = ""
    for record in looked:
        right = "right" if record["label"] == record.get("predicted") else f"it said {record.get('predicted')}"
        patches = record["patches"]
        half = -(-len(patches) // 2)
        blank = [[0] * len(patches[0][0])] * len(patches[0])
        rows = [patches[:half], [*patches[half:], *[blank] * (2 * half - len(patches))]]
        attention = record["attention"]
        body += side_by_side(
            [
                mosaic(
                    f"What is there three times: {record['label']} ({right})",
                    "the low-resolution view",
                    [[record["low"]]],
                ),
                heat_map("The attention over it", attention, top=max(map(max, attention)) or 1.0),
                mosaic("The patches that were read, in order", "patches", rows),
            ]
        )
    text = (
        "Test images at an eighth of their resolution, which is the view that attention is over; how much attention "
        "each place got, the darker the more; and the patches, which are all that the model read of the image itself."
    )
    return Section("What it looked at", paragraph(text) + body)


def _when_not() -> Section:
    reasons = [
        "What matters fills the image: every patch counts, and a network over all of it is the better estimate.",
        "What matters cannot be told from the rest in the low-resolution view: attention has nothing to go by. Without "
        "a prior it may stay at chance for very long.",
        "The image is small: a network over all pixels is cheap, and simpler.",
        "Every pixel is read anyway, to make the low-resolution view from the file: keep a pyramid.",
    ]
    return Section("When not to use attention sampling", bullets(reasons))


def _measured(records: Sequence[Record], runs: dict[str, list[Record]]) -> Section:
    first = next(iter(runs.values()))[0] if runs else {}
    rows = {
        "budget of a run": f"{number(first['budget']['seconds'])} s of processor time, data included" if first else "",
        "images": f"{first['data']['side']} × {first['data']['side']}, {first['data']['test']} for testing"
        if first
        else "",
        **where_measured(records),
    }
    lines = [[name, value] for name, value in rows.items() if value]
    return Section("How it was measured", table("What ran, and where", ["what", "value"], lines))
