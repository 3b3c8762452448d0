"""Clustered against exact attention in pretrained models: records -> numbers and a verdict in words.

Fidelity is 1 where the answers are exact attention's: the mean cosine of embeddings, the share of words that stay in
transcripts. A setting keeps the answers where its fidelity reaches the task's `floor`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flopwise.report.records import Record, finite, of_no_kind, without_number
from flopwise.report.words import number, percent, plural, times

FASTER = 0.97  # more of the exact time than this is not called faster: it may be noise
FLOORS = {"text": 0.99, "speech": 0.97}
NEEDS = {
    "text": ("seconds.exact", "seconds.clustered", "attention_seconds.exact", "attention_seconds.clustered"),
    "speech": ("seconds.exact", "seconds.clustered", "attention_seconds.exact", "attention_seconds.clustered"),
    "length": ("seconds.exact", "seconds.clustered", "seconds.without"),
    "picture": (),
}
FRONTIER = "frontier"  # operators alone, with others of their kind: not a task
GOAL_TEXT = {"texts": 48, "mean": 0.992, "min": 0.98, "neighbours": 0.86, "accuracy": 0.01}  # 64 clusters, top-64
GOAL_SPEECH = {"clips": 60, "word_error": 0.03, "attention": 0.7}
GOAL_SPEEDS = {4096: 2.7, 8192: 4.2}  # tokens -> times faster, end to end


def problem(record: Record) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    if wrong := of_no_kind(record, (*NEEDS, FRONTIER)):
        return wrong
    kind = record["kind"]
    if kind == FRONTIER:
        return None if isinstance(record.get("methods"), list) else "one without methods (a list)"
    if kind == "picture" and not isinstance(record.get("pictures"), list):
        return "one without pictures (a list)"
    if kind == "text" and not isinstance(record.get("cosine"), dict):
        return "one without cosine (an object)"
    examples = () if kind == "picture" else ("examples",)
    return without_number(record, ("clusters", "topk", "length", *examples, *NEEDS[kind]))


@dataclass(frozen=True)
class Row:
    """One setting in one task; times are relative to exact attention.

    Args:
        fidelity: None if it came out as no number.
        attention, model: time of the attention layers alone, and of the whole model (of Whisper, its encoder).
    """

    record: Record
    fidelity: float | None
    attention: float
    model: float

    @property
    def setting(self) -> str:
        return setting_text(self.record["clusters"], self.record["topk"])

    @property
    def label(self) -> str:
        return f"{self.record['clusters']}/{self.record['topk']}"


@dataclass(frozen=True)
class Task:
    """All settings that were measured on the same examples, in the order of clusters and top-k."""

    kind: Literal["text", "speech"]
    joined: bool
    model: str
    length: int
    examples: int
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """text, speech, joined speech"""
        return f"joined {self.kind}" if self.joined else self.kind

    @property
    def title(self) -> str:
        unit = "tokens" if self.kind == "text" else "frames"
        joined = " of joined prompts" if self.joined else ""
        return f"{self.model}, {self.inputs}{joined}, {self.length} {unit} each"

    @property
    def inputs(self) -> str:
        return plural(self.examples, "text" if self.kind == "text" else "clip")

    @property
    def part(self) -> str:
        """What is timed, for the task's second time."""
        return "whole model" if self.kind == "text" else "encoder"

    @property
    def keeping(self) -> list[Row]:
        """The settings which keep the answers, the fastest whole model first."""
        kept = [row for row in self.rows if row.fidelity is not None and row.fidelity >= FLOORS[self.kind]]
        return sorted(kept, key=lambda row: row.model)

    @property
    def outcome(self) -> Literal["faster", "same", "slower", "lost"]:
        if not self.keeping:
            return "lost"
        ratio = self.keeping[0].model
        return "faster" if ratio <= FASTER else "same" if ratio < 1 / FASTER else "slower"


@dataclass(frozen=True)
class Selection:
    """The records which are reported."""

    tasks: list[Task]
    lengths: list[Record]  # one setting; ascending
    picture: Record | None
    left_out: int  # on other examples than the newest, or repeated later


def select(records: Sequence[Record]) -> Selection:
    """Of each task the newest examples, with the newest record of each setting; of lengths the newest setting."""
    records = [record for record in records if record["kind"] != FRONTIER]
    found: list[Task] = []
    kept = 0
    for kind in ("text", "speech"):
        for joined in (False, True):
            every = [r for r in records if r["kind"] == kind and bool(r.get("joined")) == joined]
            same = [r for r in every if all(r[key] == every[-1][key] for key in ("length", "examples"))]
            newest = {(r["clusters"], r["topk"]): r for r in same}
            rows = tuple(_row(newest[key]) for key in sorted(newest))
            kept += len(rows)
            if rows:
                last = every[-1]
                model = str(last.get("model", "the model"))
                found.append(Task(kind, joined, model, last["length"], last["examples"], rows))
    every = [r for r in records if r["kind"] == "length"]
    same = [r for r in every if all(r[key] == every[-1][key] for key in ("clusters", "topk"))]
    lengths = {r["length"]: r for r in same}
    pictures = [r for r in records if r["kind"] == "picture"]
    kept += len(lengths) + min(1, len(pictures))
    return Selection(
        found, [lengths[n] for n in sorted(lengths)], pictures[-1] if pictures else None, len(records) - kept
    )


def setting_text(clusters: int, topk: int) -> str:
    """64 clusters, top-32"""
    return f"{plural(clusters, 'cluster')}, {f'top-{topk}' if topk else 'plain'}"


def columns(task: Task) -> list[str]:
    """The columns of the task's table."""
    answers = {
        "text": ["mean cosine", "lowest", "neighbours kept", "topics told right (exact)"],
        "speech": ["words that differ", "same transcripts"],
    }
    return ["setting", *answers[task.kind], "attention time", f"{task.part} time"]


def cells(row: Row) -> list[str]:
    """One line of the table; times are relative to exact attention."""
    record = row.record
    if record["kind"] == "text":
        cosine, topics = record["cosine"], record.get("topic_accuracy") or {}
        answers = [
            cosine_text(row.fidelity),
            cosine_text(cosine.get("min")),
            _share(record.get("neighbours_kept")),
            f"{_share(topics.get('clustered'))} ({_share(topics.get('exact'))})",
        ]
    else:
        answers = [_share(record.get("word_error")), _share(record.get("same_transcripts"))]
    return [row.setting, *answers, times(row.attention), times(row.model)]


def markdown_table(task: Task) -> str:
    """The task's table in GitHub's markdown."""
    head = columns(task)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(cells(row) for row in task.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cosine_text(value: float | None) -> str:
    return f"{value:.4f}" if finite(value) else "no number"


def speed(record: Record, attention: Literal["clustered", "without"]) -> float:
    """How many times faster than exact a whole model is, clustered or without any attention."""
    return record["seconds"]["exact"] / record["seconds"][attention]


# --- in words ------------------------------------------------------------------------------------------------------


def verdict(records: Sequence[Record]) -> tuple[str, str]:
    """(one line, a few sentences): what came out, whichever way it went."""
    selection = select(records)
    if not selection.tasks:
        missing = "What clustering does to a model's answers has not been measured yet."
        return "No verdict yet", " ".join([missing, *_lengths(selection.lengths)])
    sentences = [_sentence(task) for task in selection.tasks]
    present = {task.kind for task in selection.tasks}
    sentences += [f"{kind.capitalize()} was not measured." for kind in FLOORS if kind not in present]
    return _title(selection.tasks), " ".join([*sentences, *_lengths(selection.lengths)])


def goals(records: Sequence[Record]) -> list[str]:
    """The project's goals, and whether each was reached."""
    selection = select(records)
    tasks = {task.name: task for task in selection.tasks}
    want = GOAL_TEXT
    text = (
        f"Text, {setting_text(64, 64)}: mean cosine at least {want['mean']}, lowest {want['min']}, "
        f"{100 * want['neighbours']:.0f} % of nearest neighbours kept, topics within one point of exact"
    )
    rows = [row for row in tasks["text"].rows if row.label == "64/64"] if "text" in tasks else []
    result = "not measured"
    if rows:
        examples = rows[0].record["examples"]
        result = _reached(_text_goal(rows[0].record)) + _too_few(examples, want["texts"], "text")
    found = [f"{text}: {result}."]

    speech = "Speech, some setting: under 3 % of words differ at less than 0.7 × the encoder's attention time"
    within = [
        row
        for task in selection.tasks
        if task.kind == "speech"
        for row in task.rows
        if row.fidelity is not None
        and 1 - row.fidelity < GOAL_SPEECH["word_error"]
        and row.attention < GOAL_SPEECH["attention"]
    ]
    result = "not measured"
    if clips := [task.examples for task in selection.tasks if task.kind == "speech"]:
        result = _reached(bool(within)) + _too_few(max(clips), GOAL_SPEECH["clips"], "clip")
    found.append(f"{speech}: {result}.")

    lengths = {r["length"]: r for r in selection.lengths if (r["clusters"], r["topk"]) == (32, 32)}
    for length, goal in GOAL_SPEEDS.items():
        result = "not measured"
        if length in lengths:
            reached = speed(lengths[length], "clustered")
            result = f"{number(reached)} times, {_reached(reached >= goal)}"
        found.append(f"{length} tokens end to end, {setting_text(32, 32)}: at least {goal} times faster: {result}.")
    return found


def _row(record: Record) -> Row:
    found = record["cosine"].get("mean") if record["kind"] == "text" else record.get("word_error")
    fidelity: float | None = None
    if found is not None and finite(found):
        fidelity = found if record["kind"] == "text" else 1 - found
    attention, model = (record[key]["clustered"] / record[key]["exact"] for key in ("attention_seconds", "seconds"))
    return Row(record, fidelity, attention, model)


def _title(tasks: Sequence[Task]) -> str:
    outcomes = {task.outcome for task in tasks}
    if len(outcomes) == 1:
        title = {
            "faster": "Clustered attention kept the answers in less time",
            "same": "Clustered attention kept the answers, but saved no time",
            "slower": "Clustered attention kept the answers, but took longer",
            "lost": "Clustered attention did not keep the answers",
        }[outcomes.pop()]
        kinds = {task.kind for task in tasks}
        return title if len(kinds) == len(FLOORS) else f"{title} ({kinds.pop()} only)"
    short = {"faster": "faster", "same": "no faster", "slower": "slower", "lost": "answers not kept"}
    return f"A mixed result: {', '.join(f'{task.name} {short[task.outcome]}' for task in tasks)}"


def _sentence(task: Task) -> str:
    start = f"{task.name.capitalize()} ({task.title}): "
    floor = (
        f"a mean cosine of {FLOORS['text']}" if task.kind == "text" else f"{100 * FLOORS['speech']:.0f} % of the words"
    )
    settings = plural(len(task.rows), "setting")
    if task.outcome == "lost":
        known = [row for row in task.rows if row.fidelity is not None]
        if not known:
            return f"{start}none of {settings} gave a number."
        best = max(known, key=lambda row: row.fidelity or 0.0)
        return (
            f"{start}none of {settings} keeps {floor}. The closest, {best.setting}, {_kept(task, best)}, "
            f"at {times(best.attention)} the attention time and {times(best.model)} the {task.part}'s."
        )
    best = task.keeping[0]
    of = f"{len(task.keeping)} of {settings} {'keeps' if len(task.keeping) == 1 else 'keep'} {floor}"
    close = {
        "faster": "",
        "same": ": no difference to speak of",
        "slower": ": exact attention is the faster one here",
    }[task.outcome]
    return (
        f"{start}{of}. The fastest of these, {best.setting}, {_kept(task, best)}. Attention takes "
        f"{times(best.attention)} its exact time and the {task.part} {times(best.model)}{close}."
    )


def _kept(task: Task, row: Row) -> str:
    if task.kind == "text":
        lowest = row.record["cosine"].get("min")
        return (
            f"has a mean cosine of {cosine_text(row.fidelity)} to the exact embeddings (lowest {cosine_text(lowest)})"
        )
    return f"differs from the exact transcripts in {_share(row.record.get('word_error'))} of the words"


def _lengths(lengths: Sequence[Record]) -> list[str]:
    if not lengths:
        return []
    longest = lengths[-1]
    setting, tokens = setting_text(longest["clusters"], longest["topk"]), longest["length"]
    ratio, ceiling = (longest["seconds"][name] / longest["seconds"]["exact"] for name in ("clustered", "without"))
    start = faster_from(lengths)
    at = f"at {tokens} tokens it takes {times(ratio)} the exact time; were attention free, {times(ceiling)}"
    if start is None:
        return [f"End to end, a BERT-shaped model with {setting} is not faster than exact at {tokens} tokens: {at}."]
    if len(lengths) == 1:
        return [f"End to end, a BERT-shaped model with {setting}: {at}."]
    return [f"End to end, a BERT-shaped model with {setting} is faster from {start} tokens on: {at}."]


def faster_from(lengths: Sequence[Record]) -> int | None:
    """The shortest measured length from which on the model is faster at all measured lengths."""
    found = None
    for record in reversed(lengths):
        if record["seconds"]["clustered"] > FASTER * record["seconds"]["exact"]:
            break
        found = record["length"]
    return found


def _text_goal(record: Record) -> bool:
    cosine, topics, want = record["cosine"], record.get("topic_accuracy") or {}, GOAL_TEXT
    values = [
        cosine.get("mean"),
        cosine.get("min"),
        record.get("neighbours_kept"),
        *map(topics.get, ("exact", "clustered")),
    ]
    if not all(finite(value) for value in values):
        return False
    mean, lowest, neighbours, exact, clustered = values
    enough = mean >= want["mean"] and lowest >= want["min"] and neighbours >= want["neighbours"]
    return enough and clustered >= exact - want["accuracy"] - 1e-9


def _too_few(examples: int, wanted: float, noun: str) -> str:
    """Continues a sentence where a goal asks for more examples than there are."""
    return "" if examples >= wanted else f" on {plural(examples, noun)}; the goal asks for {wanted:.0f}"


def _reached(reached: bool) -> str:
    return "reached" if reached else "not reached"


def _share(value: float | None) -> str:
    return percent(value) if value is not None and finite(value) else "–"
