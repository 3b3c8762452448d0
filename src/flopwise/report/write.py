"""The way in: read a file of records, write the page."""

import json
from pathlib import Path

from flopwise.report import (
    attention,
    audit,
    claims,
    clustered,
    clustered_sections,
    importance,
    importance_sections,
    lake,
    linear,
    settings,
    tuned,
    tuned_sections,
)
from flopwise.report.page import Section, page, paragraph, write_page
from flopwise.report.records import Record

PROBLEM = {
    "importance": importance.problem,
    "importance_settings": settings.problem,
    "audit": audit.problem,
    "attention": attention.problem,
    "lake": lake.problem,
    "linear": linear.problem,
    "clustered": clustered.problem,
    "tune": tuned.problem,
    "claims": claims.problem,
}
SECTIONS = {
    "importance": importance_sections.sections,
    "importance_settings": settings.sections,
    "audit": audit.sections,
    "attention": attention.sections,
    "lake": lake.sections,
    "linear": linear.sections,
    "clustered": clustered_sections.sections,
    "tune": tuned_sections.sections,
}


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file, in its order.

    A last line which has no newline and does not parse is what a killed run leaves behind: it is left out.

    Raises:
        ValueError: any other line is not a record; the message names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one too
            if number == len(lines):
                break
            raise _malformed(path, number, f"not JSON ({error})") from error
        problem = _problem(record)
        if problem:
            raise _malformed(path, number, problem)
        records.append(record)
    return records


def write_report(records_path: Path, page_path: Path) -> None:
    """Write the page of the records at `records_path` to `page_path`, whole or not at all.

    Several experiments in one file are one page, one after the other; with verdicts on claims, claim by claim.

    Raises:
        FileNotFoundError: there is no file at `records_path`. (An empty file gives a page which says so.)
        ValueError: see `read_records`.
    """
    records = read_records(records_path)
    sections = [Section("No records yet", paragraph(f"{records_path.name} holds no finished run."))]
    if any(r["experiment"] == "claims" for r in records):
        sections = claims.sections(records)
    elif records:
        experiments = {name: [r for r in records if r["experiment"] == name] for name in SECTIONS}
        sections = [part for name, found in experiments.items() if found for part in SECTIONS[name](found)]
    text = page("Stop wasting FLOPs: what was measured", sections)
    write_page(page_path, text)


def _problem(record: object) -> str | None:
    """What is wrong with a record, in words which continue "this line is ..."; None if nothing is."""
    if not isinstance(record, dict):
        return f"not an object but {type(record).__name__}"
    experiment = record.get("experiment")
    if experiment not in PROBLEM:
        return f"one with experiment {experiment!r}, not one of {', '.join(PROBLEM)}"
    return PROBLEM[experiment](record)


def _malformed(path: Path, number: int, problem: str) -> ValueError:
    return ValueError(
        f"{path}, line {number}: every line must be one record, but this one is {problem}. "
        "Remove the line, or write the records again."
    )
