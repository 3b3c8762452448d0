"""Clustered against exact attention: the sections of the page, in their order."""

from collections.abc import Sequence
from itertools import groupby

from flopwise.report.charts import Axis, Cloud, Series, frontier, line_chart, scatter
from flopwise.report.clustered import (
    FASTER,
    FLOORS,
    FRONTIER,
    Selection,
    Task,
    cells,
    columns,
    faster_from,
    goals,
    select,
    setting_text,
    speed,
    verdict,
)
from flopwise.report.page import Section, bullets, cards, paragraph, side_by_side, table, under
from flopwise.report.pictures import heat_map
from flopwise.report.records import Record, finite, where_measured
from flopwise.report.words import distinct, number, percent, plural, times

EXACT = 0  # colour; the others are given in turn


def sections(records: Sequence[Record]) -> list[Section]:
    """Verdict, each task with its frontier, lengths, pictures, limits, method; what has no data is left out."""
    selection = select(records)
    operators = frontier_sections(records)
    if operators and not (selection.tasks or selection.lengths or selection.picture):
        return under(operators[0], [when_not()])
    below = [_task(task) for task in selection.tasks]
    if selection.lengths:
        below.append(_lengths(selection.lengths))
    if selection.picture:
        below.append(_pictures(selection.picture))
    below += [*operators, when_not(selection.lengths), _measured(records, selection)]
    return under(_verdict(records, selection), below)


def frontier_sections(records: Sequence[Record]) -> list[Section]:
    """Operators alone, error against time: the newest record of each kind of inputs; nothing without one."""
    newest = {record["inputs"]: record for record in records if record["kind"] == FRONTIER}
    if not newest:
        return []
    figures = []
    for inputs, record in newest.items():
        clouds = []
        for name, colour in (("clustered", 1), ("others", 2)):
            chosen = [m for m in record["methods"] if _is_clustered(m) == (name == "clustered")]
            points = [(m["milliseconds"], m["error"], m["method"].removeprefix("clustered, ")) for m in chosen]
            clouds.append(Cloud(name, points, colour))
        best = frontier((x, -y) for cloud in clouds for x, y, _ in cloud.points)
        x, y = Axis("processor time", "ms", log=True), Axis("relative error", log=True, reverse=True)
        title = f"On {inputs} inputs, {record['length']} positions"
        figures.append(scatter(title, clouds, x=x, y=y, line=[(a, -b) for a, b in best]))
    first, *others = newest.values()
    body = "".join(paragraph(_best_operators(record), "lead") for record in newest.values())
    body += paragraph(
        "Attention alone, without a model: its output's distance from softmax attention, relative to its length (L2). "
        "In the plots higher up is closer to softmax, further left is faster, and the line joins what nothing beats in "
        "both. C is the number of clusters; top-k, the keys to which every query attends exactly. Structured inputs "
        "have 60 planted centres, a smooth path and a little noise, as the queries of trained models do; in white "
        "noise no query is like another."
    )
    errors = [{m["method"]: m["error"] for m in record["methods"]} for record in others]
    lines = [
        [
            m["method"],
            number(m["milliseconds"]),
            f"{number(m['speedup'])} ×",
            number(m["error"]),
            *(number(found[m["method"]]) if m["method"] in found else "–" for found in errors),
        ]
        for m in first["methods"]
    ]
    columns = ["method", "ms", "times softmax' speed", *(f"error, {inputs} inputs" for inputs in newest)]
    caption = (
        f"8 heads of width 64, {first['length']} positions, one thread, forward; times on {first['inputs']} inputs"
    )
    body += side_by_side(figures) + table(caption, columns, lines)
    return [Section("Clustered attention beside other replacements of softmax that need no training", body)]


def _is_clustered(method: Record) -> bool:
    return method["method"].startswith("clustered")


def _best_operators(record: Record) -> str:
    """The smallest error that each side reaches in less time than softmax takes."""
    start = f"On {record['inputs']} inputs"
    parts = []
    for name, ours in (("clustered attention", True), ("the others", False)):
        faster = [m for m in record["methods"] if _is_clustered(m) == ours and m["speedup"] > 1]
        if faster:
            best = min(faster, key=lambda m: m["error"])
            setting = f"{best['method'].removeprefix('clustered, ')}, {number(best['speedup'])} × softmax' speed"
            parts.append(f"{name} {number(best['error'])} ({setting})")
    if not parts:
        return f"{start} nothing is faster than softmax."
    return f"{start}, the smallest relative error of what is faster than softmax: {', '.join(parts)}."


def _verdict(records: Sequence[Record], selection: Selection) -> Section:
    title, text = verdict(records)
    body = paragraph(text, "lead")
    figures = []
    for task in selection.tasks:
        if task.keeping:
            best = task.keeping[0]
            remark = f"{best.setting}; attention alone {times(best.attention)}; fidelity {best.fidelity:.4f}"
            figures.append((f"{task.name}: time of the {task.part}", times(best.model), remark))
    if selection.lengths:
        longest = selection.lengths[-1]
        ratio, ceiling = (longest["seconds"][name] / longest["seconds"]["exact"] for name in ("clustered", "without"))
        remark = f"{setting_text(longest['clusters'], longest['topk'])}; without attention {times(ceiling)}"
        figures.append((f"{longest['length']} tokens: time end to end", times(ratio), remark))
    if figures:
        body += cards(figures)
        body += paragraph(
            "Relative to exact attention, torch's own; lower is better. The model is not fine-tuned. A task's "
            "setting is chosen on the examples it is judged on; flopwise tune judges on others.",
            "note",
        )
    if selection.tasks:
        body += paragraph("The project's goals:") + bullets(goals(records))
    return Section(title, body)


def _task(task: Task) -> Section:
    keeping = task.keeping
    marked = {(i, 1) for i, row in enumerate(task.rows) if row in keeping}
    marked |= {(i, len(columns(task)) - 1) for i, row in enumerate(task.rows) if row in keeping and row.model <= FASTER}
    body = side_by_side([*_frontiers(task)])
    body += table(task.title, columns(task), [cells(row) for row in task.rows], marked=marked)
    floor = (
        f"a mean cosine of {FLOORS['text']}" if task.kind == "text" else f"{100 * FLOORS['speech']:.0f} % of the words"
    )
    body += paragraph(
        f"Times are relative to exact attention. Marked: settings which keep {floor}, and their times where these are "
        f"at most {FASTER} ×. The broken line is where settings keep that much. Points are labelled clusters/top-k; "
        "plain means that all queries of a cluster share its row of attention, top-k that each also attends exactly "
        "to the k keys that matter most to its cluster.",
        "note",
    )
    body += _layer_errors(task) if task.kind == "text" else _transcripts(task)
    return Section(f"{task.name.capitalize()}: fidelity against time", body)


def _frontiers(task: Task) -> list[str]:
    """Fidelity against the time of attention, and against that of the model."""
    known = [row for row in task.rows if row.fidelity is not None]
    if not known:
        return []
    if task.kind == "text":  # nearly all cosines are nearly 1: their distance from it, small at the top, spreads them
        y = Axis("1 − mean cosine (higher up is closer to exact)", log=True, reverse=True)
        heights = [max(1 - (row.fidelity or 0.0), 1e-6) for row in known]
        kept = (1 - FLOORS["text"], f"a cosine of {FLOORS['text']}")
        exact = []
    else:
        y = Axis("words that stay", "%")
        heights = [100 * (row.fidelity or 0.0) for row in known]
        kept = (100 * FLOORS["speech"], f"{100 * FLOORS['speech']:.0f} %")
        exact = [(1.0, 100.0, "exact")]
    topks = sorted({row.record["topk"] for row in known})
    figures = []
    for name, title in (("attention", "Attention alone"), ("model", f"The {task.part}")):
        clouds = [Cloud("exact", exact, EXACT)]
        for i, topk in enumerate(topks):
            pairs = [(row, height) for row, height in zip(known, heights, strict=True) if row.record["topk"] == topk]
            points = [(getattr(row, name), height, row.label) for row, height in pairs]
            clouds.append(Cloud(f"top-{topk}" if topk else "plain", points, 1 + i % 3))
        up = -1.0 if y.reverse else 1.0
        best = frontier((px, up * py) for cloud in clouds for px, py, _ in cloud.points)
        line = [(px, up * py) for px, py in best]
        x = Axis("time relative to exact")
        figures.append(scatter(f"{title}: fidelity against time", clouds, x=x, y=y, line=line, level=kept))
    return figures


def _layer_errors(task: Task) -> str:
    rows = [row for row in task.rows if row.record.get("layer_errors")]
    if not rows:
        return ""
    layers = max(len(row.record["layer_errors"]) for row in rows)
    lines = []
    for row in rows:
        errors = [percent(e) if finite(e) else "–" for e in row.record["layer_errors"]]
        lines.append([row.setting, *errors, *["–"] * (layers - len(errors))])
    return table(
        "Error of each layer's attention, given exact inputs: distance to softmax relative to its length (L2)",
        ["setting", *(f"layer {layer}" for layer in range(layers))],
        lines,
    )


def _transcripts(task: Task) -> str:
    """The transcripts that changed, with the fastest setting that keeps the words or else the most faithful."""
    known = sorted((row for row in task.rows if row.fidelity is not None), key=lambda row: -(row.fidelity or 0.0))
    if not known:
        return ""
    row = (task.keeping or known)[0]
    changed = row.record.get("transcripts") or []
    if not changed:
        return paragraph(f"With {row.setting}, every transcript is the same.")
    lines = [[str(i), pair["exact"], pair["clustered"]] for i, pair in enumerate(changed, start=1)]
    return table(f"What changed with {row.setting}", ["clip", "exact", "clustered"], lines, prose=True)


def _lengths(lengths: Sequence[Record]) -> Section:
    setting = setting_text(lengths[-1]["clusters"], lengths[-1]["topk"])
    x = Axis("length", "tokens", log=True)
    names = {"exact": ("exact", 0), "clustered": (setting, 1), "without": ("attention removed", 2)}
    seconds = [
        Series(name, [(r["length"], r["seconds"][key]) for r in lengths], colour=colour)
        for key, (name, colour) in names.items()
    ]
    faster = [
        Series(setting, [(r["length"], speed(r, "clustered")) for r in lengths], colour=1),
        Series("attention removed: the ceiling", [(r["length"], speed(r, "without")) for r in lengths], colour=2),
    ]
    body = side_by_side(
        [
            line_chart("Time of the whole model", seconds, x=x, y=Axis("time", "s", log=True)),
            line_chart("How many times faster than exact", faster, x=x, y=Axis("speed relative to exact", "×")),
        ]
    )
    lines = [
        [
            f"{r['length']} tokens",
            *(number(r["seconds"][key]) for key in names),
            times(speed(r, "clustered")),
            times(speed(r, "without")),
        ]
        for r in lengths
    ]
    body += table(
        f"{lengths[-1].get('model', 'The model')}, {setting}, one text at a time",
        ["length", "exact, s", "clustered, s", "attention removed, s", "speed, clustered", "speed, ceiling"],
        lines,
    )
    body += paragraph(
        "The ceiling is the same model with attention that hands its values through at no cost. No attention, "
        "however cheap, makes the model faster than that. Positions beyond the model's own repeat: times are real "
        "there, answers are not looked at.",
        "note",
    )
    return Section("End to end, at longer inputs", body)


def _pictures(record: Record) -> Section:
    figures = []
    for layer, group in groupby(record["pictures"], key=lambda picture: picture["layer"]):
        pair = {picture["attention"]: picture["rows"] for picture in group}
        entries = sorted(a for row in pair.get("exact", []) for a in row if finite(a))
        if not entries:
            continue
        top = (
            entries[int(0.995 * (len(entries) - 1))] or entries[-1] or 1.0
        )  # the few largest would leave the rest white
        figures += [heat_map(f"Layer {layer}, {name}", rows, top=top) for name, rows in pair.items()]
    if not figures:
        return Section("Attention itself", paragraph("The records hold no picture."))
    text = (
        f"One head of {record.get('model', 'the model')} on one text of {record['length']} tokens, with "
        f"{setting_text(record['clusters'], record['topk'])}. Each line is a query, each column a key; only the first "
        "ones are shown. Darker is more attention, on the same scale in both pictures of a layer."
    )
    return Section("Attention itself", paragraph(text) + side_by_side(figures))


def when_not(lengths: Sequence[Record] = ()) -> Section:
    """Also for the page of `tune`; `lengths` are records of end-to-end times, ascending."""
    short = "Inputs are short: to group the queries costs more than it saves."
    if lengths:
        start = faster_from(lengths)
        tried = f"{lengths[0]['length']} to {lengths[-1]['length']} tokens"
        where = f"from {start} tokens on" if start else "at none of them"
        short += f" Of {tried}, measured here, it was faster {where}."
    reasons = [
        short,
        "The model generates text: its layers are causal, and a cluster would let a query see its own future. Such "
        "layers stay exact.",
        "Attention is a small part of the model's time: no attention, however cheap, can save more than that part.",
        "Queries do not group: where they are nearly unrelated to one another, more clusters hardly lower the error.",
        "Answers hang on small margins, as nearest neighbours among near duplicates do: a cosine of 0.99 can swap "
        "them.",
        "An accelerator with a fused attention kernel runs the model: what is measured here is a processor.",
    ]
    return Section("When not to use clustered attention", bullets(reasons))


def _measured(records: Sequence[Record], selection: Selection) -> Section:
    grid = distinct(row.setting for task in selection.tasks for row in task.rows)
    rows = {
        "tasks": "; ".join(task.title for task in selection.tasks),
        "settings": grid,
        "lengths": distinct(r["length"] for r in selection.lengths),
        **where_measured(records),
    }
    body = table("What ran, and where", ["what", "value"], [[name, value or "–"] for name, value in rows.items()])
    body += paragraph(
        "Exact is torch's scaled_dot_product_attention in the same model. Times are processor seconds on one thread, "
        "exact and clustered in turn, the median of the turns after one to warm up. Attention time is that of the "
        "attention layers on a batch's real queries, keys and values, without the projections; clustering is part of "
        "it. Fidelity compares a model's answers with clustered attention to its own with exact attention, on texts "
        "without padding and on recordings as they are. Topics are told by a logistic regression on the embeddings, "
        "on folds it was not fitted on.",
        "note",
    )
    if selection.left_out:
        left_out = plural(selection.left_out, "record")
        body += paragraph(f"Left out: {left_out} on other examples, of another setting, or repeated later.", "note")
    return Section("How it was measured", body)
