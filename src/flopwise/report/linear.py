"""Linear attention: records of what a model painted, wrote and cost -> the sections of the page."""

from collections.abc import Sequence

from flopwise.report.charts import Axis, Series, line_chart
from flopwise.report.page import Section, bullets, cards, paragraph, side_by_side, table, under
from flopwise.report.pictures import mosaic
from flopwise.report.records import Record, of_no_kind, where_measured, without_number
from flopwise.report.words import number

NEEDS = {
    "speed": ("batch",),
    "painted": (),
    "completed": (),
    "play": (),
    "run": ("bits_per_dim", "parameters"),
    "tune": (),
    "agreement": ("largest_difference", "largest_logit"),
    "length": ("exponents.linear", "exponents.softmax"),
}
SPEED_COLUMNS = ["", "tokens", "tokens/s", "images/s", "gain over a cache", "gain over no cache"]
LISTS = {
    "speed": ("lengths",),
    "painted": ("digits", "pictures"),
    "completed": ("originals", "completions"),
    "play": (),
    "run": (),
    "tune": (),
    "agreement": (),
    "length": ("lengths",),
}
NAMES = {
    "linear": ("linear, constant state", 1),
    "cache": ("softmax, key-value cache", 0),
    "modules": ("softmax, cache in torch's modules", 3),
    "no cache": ("softmax, no cache", 2),
}


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    if wrong := of_no_kind(record, list(NEEDS)):
        return wrong
    kind = record["kind"]
    for name in LISTS[kind]:
        if not isinstance(record.get(name), list):
            return f"one without {name} (a list)"
    if kind == "play" and not isinstance(record.get("text"), str):
        return "one without text"
    return without_number(record, NEEDS[kind])


def sections(records: Sequence[Record]) -> list[Section]:
    """Verdict, pictures, the play, speed, likelihood, limits, method; what has no data is left out."""
    newest = {(record["kind"], record.get("batch"), record.get("method")): record for record in records}
    speeds = sorted((r for r in newest.values() if r["kind"] == "speed"), key=lambda r: r["batch"])
    found = []
    for kind, show in (("painted", _painted), ("completed", _completed), ("play", _play)):
        found += [show(record) for key, record in newest.items() if key[0] == kind]
    if speeds:
        found.append(_speed(speeds))
    runs = [r for r in newest.values() if r["kind"] == "run"]
    if runs:
        found.append(_likelihood(runs))
    return under(_verdict(speeds), [*found, _when_not(), _measured(records)])


def length_sections(records: Sequence[Record]) -> list[Section]:
    """Time against length, of the newest record; nothing without one."""
    found = [record for record in records if record["kind"] == "length"]
    if not found:
        return []
    rows = found[-1]["lengths"]
    series = [
        Series(name, [(row["length"], row[key]) for row in rows], colour=colour)
        for key, name, colour in (("softmax", "softmax (SDPA)", 0), ("linear", "linear attention", 1))
    ]
    chart = line_chart(
        "A causal forward and backward pass",
        series,
        x=Axis("positions", log=True),
        y=Axis("processor time", "ms", log=True),
    )
    lines = [
        [
            f"{row['length']} positions",
            number(row["linear"]),
            number(row["softmax"]),
            f"{number(row['softmax'] / row['linear'])} ×",
        ]
        for row in rows
    ]
    columns = ["length", "linear, ms", "softmax, ms", "times as fast"]
    body = side_by_side([chart]) + table("8 heads of width 64, one thread, medians", columns, lines)
    return [Section("Cost against length", body)]


def _verdict(speeds: Sequence[Record]) -> Section:
    if not speeds:
        return Section("Linear attention", paragraph("No speed is measured yet; the same command goes on.", "lead"))
    figures = []
    for record in speeds:
        row = record["lengths"][-1]
        gains = [row[f"gain over {baseline}"]["linear"] for baseline in ("cache", "no cache")]
        remark = f"as fast as softmax with a cache; {number(gains[1])} times as fast as without one"
        figures.append((f"{row['length']} tokens, {_sequences(record)}", f"{number(gains[0])} ×", remark))
    best = max(speeds, key=lambda r: r["lengths"][-1]["gain over cache"]["linear"])["lengths"][-1]
    worst = min(r["lengths"][-1]["gain over cache"]["linear"] for r in speeds)
    cache, anew = (number(best[f"gain over {name}"]["linear"]) for name in ("cache", "no cache"))
    title = (
        f"Linear attention generates up to {cache} times as fast as softmax with a cache"
        if worst >= 1
        else "Linear attention is not always faster than softmax with a cache"
    )
    text = (
        f"A transformer with linear attention is a recurrent network: each token costs the same, however many came "
        f"before. Against the honest baseline, a softmax model of the same size with a preallocated key-value cache, "
        f"it generates up to {cache} times as fast; against softmax that computes everything anew for each token, as "
        f"in the paper, {anew} times."
    )
    return Section(title, paragraph(text, "lead") + cards(figures))


def _sequences(record: Record) -> str:
    return "one sequence" if record["batch"] == 1 else f"{record['batch']} at once"


def _painted(record: Record) -> Section:
    digits, pictures = record["digits"], record["pictures"]
    each = len(pictures) // max(1, len(set(digits)))
    columns = [pictures[i : i + each] for i in range(0, len(pictures), each)]
    rows = [list(row) for row in zip(*columns, strict=True)]
    text = (
        "Painted pixel by pixel from nothing but the name of the digit, which is the column. The name is read once, "
        "up to 784 pixels before: not every picture obeys it."
    )
    return Section(
        "New digits, painted",
        paragraph(text) + mosaic("Columns: 0 to 9", "painted digits, 0 to 9 from left to right", rows),
    )


def _completed(record: Record) -> Section:
    given = record.get("given_rows", 14)
    rows = []
    for original, completions in zip(record["originals"], record["completions"], strict=True):
        half = [line if y < given else [64] * len(line) for y, line in enumerate(original)]
        rows.append([original, half, *completions])
    text = (
        "Held-out digits whose lower half was hidden. First column: the digit; second: what the model was shown, read "
        "once into a state of constant size; the others: what it painted from that state, each on its own."
    )
    return Section(
        "Half a digit, completed", paragraph(text) + mosaic("Completions", "half-hidden digits and completions", rows)
    )


def _speed(speeds: Sequence[Record]) -> Section:
    charts = []
    for record in speeds:
        series = [
            Series(name, [(p["position"], p["tokens_per_second"]) for p in record["by_position"][key]], colour=colour)
            for key, (name, colour) in NAMES.items()
            if record.get("by_position", {}).get(key)
        ]
        if series:
            x, y = Axis("tokens so far"), Axis("tokens a second", log=True)
            charts.append(line_chart(f"Generating {_sequences(record)}", series, x=x, y=y))
    return Section(
        "Speed", side_by_side(charts) + table("Whole generations, one thread", SPEED_COLUMNS, speed_rows(speeds))
    )


def speed_rows(records: Sequence[Record]) -> list[list[str]]:
    """One line for each contender, batch and length."""
    lines = []
    for record in (r for r in records if r.get("experiment") == "linear" and r["kind"] == "speed"):
        for row in record["lengths"]:
            for name, rate in row["tokens_per_second"].items():
                images = row.get("images_per_second", {}).get(name)
                gains = [row[f"gain over {b}"].get(name) for b in ("cache", "no cache")]
                lines.append(
                    [
                        f"{_sequences(record)}, {NAMES.get(name, (name,))[0]}",
                        str(row["length"]),
                        number(rate),
                        "–" if images is None else number(images),
                        *("–" if gain is None else f"{number(gain)} ×" for gain in gains),
                    ]
                )
    return lines


def _play(record: Record) -> Section:
    prompt = record.get("prompt", "")
    note = f"Written byte by byte after {prompt!r}, by a model of {record.get('parameters', 0):,} weights."
    return Section("A play", paragraph(prompt + record["text"], "verse") + paragraph(note, "note"))


def _likelihood(runs: Sequence[Record]) -> Section:
    lines = [
        [
            {"linear": "linear, the thesis' recipe", "modern": "linear, the modern recipe"}.get(
                r["method"], r["method"]
            ),
            f"{r['bits_per_dim']:.4f}",
            number(r["parameters"]),
            f"{r['rate']:g}",
            str(r["examples"]),
        ]
        for r in runs
    ]
    columns = ["attention", "bits a pixel", "weights", "its tuned rate", "digits seen"]
    text = (
        "Held-out digits, all models trained with the same FLOPs, each at its own best learning rate. Lower is better."
    )
    return Section("Likelihood", paragraph(text) + table("Bits per dimension", columns, lines))


def _when_not() -> Section:
    reasons = [
        "The model exists already and was trained with softmax: linear attention has to be trained. For pretrained "
        "encoders there is clustered attention.",
        "Sequences are short, some hundred tokens, one at a time: softmax with a cache is about as fast.",
        "The task is to look up something far back, word for word: a state of constant size forgets.",
        "Generation is bound by something else, such as a slow tokenizer or a network.",
    ]
    return Section("When not to use linear attention", bullets(reasons))


def _measured(records: Sequence[Record]) -> Section:
    rows = {"model": _size(records), **where_measured(records)}
    body = table("What ran, and where", ["what", "value"], [[name, value or "–"] for name, value in rows.items()])
    body += paragraph(
        "Tokens a second are from the processor's time on one thread, all contenders taking turns, medians. The "
        "baseline is the same model with torch's scaled_dot_product_attention: with a preallocated key-value cache, "
        "and computing everything anew for each token. What a softmax step costs is measured at four positions of a "
        "generation and integrated over it.",
        "note",
    )
    return Section("How it was measured", body)


def _size(records: Sequence[Record]) -> str:
    size = next((r["size"] for r in records if isinstance(r.get("size"), dict)), {})
    return ", ".join(f"{name} {value}" for name, value in size.items())
