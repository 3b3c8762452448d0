"""What `flopwise tune` measured and chose: the sections of the page, in their order."""

from collections.abc import Sequence

from flopwise.report.charts import Axis, Cloud, Series, frontier, line_chart, scatter
from flopwise.report.clustered import FASTER, cosine_text, setting_text
from flopwise.report.clustered_sections import when_not
from flopwise.report.page import Section, bullets, cards, paragraph, side_by_side, table
from flopwise.report.records import Record, finite, where_measured
from flopwise.report.tuned import (
    Search,
    Setting,
    candidate_label,
    candidate_text,
    exact_below,
    is_faster,
    select,
    title,
)
from flopwise.report.words import distinct, percent, plural, times


def sections(records: Sequence[Record]) -> list[Section]:
    """Verdict, layers, frontier, lengths, use, limits, method; what has no data is left out or says so."""
    search = select(records)
    found = [_verdict(search)]
    if search.candidates:
        found.append(_frontier(search))
    if search.errors:
        found.append(_layers(search))
    if search.seconds:
        found.append(_lengths(search))
    if search.chosen:
        found.append(_use(search))
    return [*found, when_not(), _measured(search)]


def _verdict(search: Search) -> Section:
    tuned = search.tuned
    if tuned is None:
        return Section(title(search), paragraph("The same command starts it again."))
    body = paragraph(str(tuned.get("verdict", "")), "lead")
    figures = []
    examples = tuned.get("examples")
    if finite(tuned.get("model_time")):
        remark = "relative to exact, the whole model on inputs it was not chosen on"
        figures.append(("time", times(tuned["model_time"]), remark if search.chosen else f"{remark}: not faster"))
    if finite(tuned.get("fidelity")):
        held = f"mean over {plural(examples, 'example')}, " if isinstance(examples, int) else ""
        remark = f"{held}lowest {cosine_text(tuned.get('lowest'))}; asked for {tuned['tolerance']:g}"
        figures.append((f"held-out fidelity, {tuned.get('metric', 'cosine')}", cosine_text(tuned["fidelity"]), remark))
    if search.chosen:
        starts = [entry["min_length"] for entry in search.chosen.values() if finite(entry.get("min_length"))]
        if starts:
            figures.append(("exact below", f"{min(starts)} tokens", "the settings see to that themselves"))
    return Section(title(search), body + (cards(figures) if figures else ""))


def _frontier(search: Search) -> Section:
    halves = {"search": ("tried on the search half", 1), "check": ("checked on the other half", 2)}
    clouds = [Cloud("exact", [(1.0, 1.0, "exact")], 0)]
    seen: set[str] = set()
    for half, (name, colour) in halves.items():
        points = []
        for candidate in search.candidates:
            if candidate.get("half") == half and finite(candidate.get("fidelity")) and candidate["clustered"]:
                label = candidate_label(candidate)
                points.append((candidate["attention_time"], candidate["fidelity"], "" if label in seen else label))
                seen.add(label)
        clouds.append(Cloud(name, points, colour))
    tried = [(x, y) for cloud in clouds[:2] for x, y, _ in cloud.points]
    tolerance = search.tuned["tolerance"] if search.tuned else None
    metric = search.tuned.get("metric", "fidelity") if search.tuned else "fidelity"
    chart = scatter(
        "Fidelity against time of attention",
        clouds,
        x=Axis("attention time relative to exact"),
        y=Axis(f"fidelity ({metric})"),
        line=frontier(tried),
        level=None if tolerance is None else (tolerance, f"asked for: {tolerance:g}"),
    )
    lines = [
        [
            candidate_text(candidate),
            "search" if candidate.get("half") == "search" else "other half",
            cosine_text(candidate.get("fidelity")),
            cosine_text(candidate.get("lowest")),
            str(candidate["examples"]),
            times(candidate["attention_time"]),
        ]
        for candidate in search.candidates
    ]
    body = chart + table(
        "Every whole-model setting that was tried, in order",
        ["setting", "inputs", "fidelity", "lowest", "examples", "attention time"],
        lines,
    )
    body += paragraph(
        "Labels: layers × clusters/top-k. A setting passes the search with 95 % confidence in its mean, not with the "
        "mean alone; what passes is then judged on the other half of the inputs. Attention time is the sum over "
        "layers, from the times below at the lengths of the inputs.",
        "note",
    )
    return Section("What the search saw", body)


def _layers(search: Search) -> Section:
    settings = sorted({setting for errors in search.errors.values() for setting in errors})
    lines, marked = [], set()
    for i, (layer, errors) in enumerate(sorted(search.errors.items())):
        entry = search.chosen.get(layer)
        chosen = (entry["clusters"], entry["topk"]) if entry else None
        best, worst = min(errors, key=lambda s: errors[s]), max(errors, key=lambda s: errors[s])
        lines.append(
            [
                f"layer {layer}",
                setting_text(*chosen) if chosen else "exact",
                exact_below(entry) if entry else "always",
                percent(errors[chosen]) if chosen in errors else "0" if chosen is None else "–",
                f"{percent(errors[best])} ({_label(best)})",
                f"{percent(errors[worst])} ({_label(worst)})",
            ]
        )
        if chosen:
            marked.add((i, 1))
    body = table(
        "One line per layer; errors are distances to softmax relative to its length (L2), on exact inputs",
        ["layer", "chosen", "exact below", "its error", "smallest error tried", "largest error tried"],
        lines,
        marked=marked,
    )
    body += side_by_side([_errors_chart(search, settings)])
    return Section("Layer by layer", body)


def _errors_chart(search: Search, settings: Sequence[Setting]) -> str:
    """Error along the layers, with the first and the last setting of the grid and with the chosen ones."""

    def line(name: str, settings: dict[int, Setting], colour: int) -> Series:
        points = [
            (float(layer), 100 * errors[settings[layer]])
            for layer, errors in sorted(search.errors.items())
            if layer in settings and settings[layer] in errors
        ]
        return Series(name, points, colour=colour)

    ends = dict.fromkeys([settings[0], settings[-1]])
    series = [
        line(setting_text(*setting), dict.fromkeys(search.errors, setting), colour)
        for setting, colour in zip(ends, (2, 3), strict=False)
    ]
    chosen = {layer: (entry["clusters"], entry["topk"]) for layer, entry in search.chosen.items()}
    if chosen:
        series.append(line("chosen", chosen, 1))
    series = [one for one in series if one.points]
    return line_chart("Error of a layer's attention", series, x=Axis("layer"), y=Axis("error", "%", low=0))


def _lengths(search: Search) -> Section:
    lengths = search.lengths
    settings = sorted(setting for setting in search.seconds if setting is not None)
    lines, marked = [], set()
    for i, setting in enumerate(settings):
        ratios = [search.ratio(setting, length) for length in lengths]
        lines.append([setting_text(*setting), *("–" if r is None else times(r) for r in ratios)])
        marked |= {(i, j + 1) for j in range(len(ratios)) if all(is_faster(r) for r in ratios[j:])}
    if any(settings):
        body = table(
            "Time of one layer's attention relative to exact, at lengths up to your longest input",
            ["setting", *(f"{length} tokens" for length in lengths)],
            lines,
            marked=marked,
        )
        body += paragraph(
            f"Marked: at most {FASTER} × from there on, which counts as faster; more may be noise.", "note"
        )
    else:
        body = ""
    names: dict[Setting | None, str] = {None: "exact"}
    if settings:
        longest = lengths[-1]
        quickest = min(settings, key=lambda s: search.seconds[s].get(longest, float("inf")))
        names |= {quickest: f"{setting_text(*quickest)} (the fastest)"}
        most = [(entry["clusters"], entry["topk"]) for entry in search.chosen.values()]
        if most and (common := max(most, key=most.count)) in search.seconds and common not in names:
            names |= {common: f"{setting_text(*common)} (chosen most often)"}
    series = [
        Series(name, [(n, 1000 * s) for n, s in sorted(search.seconds[setting].items()) if s > 0], colour=colour)
        for colour, (setting, name) in enumerate(names.items())
        if setting in search.seconds
    ]
    series = [one for one in series if one.points]
    if series:
        x, y = Axis("length", "tokens", log=True), Axis("time", "ms", log=True)
        body = line_chart("Time of one layer's attention", series, x=x, y=y) + body
    return Section("From which length it pays", _start(search) + body)


def _start(search: Search) -> str:
    """Below which length the model stays exact, in words."""
    tuned = search.tuned or {}
    tried = f"{search.lengths[0]} to {search.lengths[-1]} tokens"
    if "break_even" not in tuned:
        return ""
    if tuned["break_even"] is None:
        return paragraph(f"At none of the lengths, {tried}, is any setting faster than exact attention: stay exact.")
    return paragraph(
        f"Of {tried}, the first setting to be faster than exact attention, and to stay so, is from "
        f"{tuned['break_even']} tokens on. Below that length the model stays exact whatever the setting."
    )


def _use(search: Search) -> Section:
    steps = [
        "from flopwise.integrations import transformers as fw",
        'fw.use_clustered(model, config="clustered.json")  # the file next to this page',
    ]
    note = (
        "The settings are saved with the model by save_pretrained. They hold for this machine, its number of threads "
        "and inputs of these lengths; elsewhere, tune again. fw.use_exact(model) undoes it."
    )
    return Section("Use it", bullets(steps) + paragraph(note, "note"))


def _measured(search: Search) -> Section:
    tuned, run = search.tuned or {}, search.run
    rows = {
        "model": str(run.get("model", "")),
        "inputs": str(run.get("data", "")),
        "asked for": f"fidelity {tuned['tolerance']:g}, {tuned.get('metric', 'cosine')}" if tuned else "",
        "lengths of the inputs, in tokens": distinct(tuned.get("lengths") or []),
        **(where_measured([tuned]) if tuned else {}),
    }
    body = table("What ran, and where", ["what", "value"], [[name, value or "–"] for name, value in rows.items()])
    body += paragraph(
        "Fidelity compares the model's answers with clustered attention to its own with exact attention: cosine of "
        "the embedding or of the logits, or, with the metric task, the share of examples with the same decision. "
        "Half of the inputs are for the search; fidelity and time in the verdict are from the other half, exact and "
        "clustered in turn, the median.",
        "note",
    )
    if search.left_out:
        body += paragraph(f"Left out: {plural(search.left_out, 'record')} of earlier searches.", "note")
    return Section("How it was measured", body)


def _label(setting: Setting) -> str:
    return f"{setting[0]}/{setting[1]}"
