"""The way in: read a file of records, write the page."""

import json
import os
from pathlib import Path

from flopwise.report import importance
from flopwise.report.importance import Record
from flopwise.report.importance_sections import sections
from flopwise.report.page import Section, page, paragraph


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
        problem = importance.problem(record)
        if problem:
            raise _malformed(path, number, problem)
        records.append(record)
    return records


def write_report(records_path: Path, page_path: Path) -> None:
    """Write the page of the records at `records_path` to `page_path`, whole or not at all.

    Raises:
        FileNotFoundError: there is no file at `records_path`. (An empty file gives a page which says so.)
        ValueError: see `read_records`.
    """
    records = read_records(records_path)
    empty = Section("No records yet", paragraph(f"{records_path.name} holds no finished run."))
    text = page("Stop wasting FLOPs: what was measured", sections(records) if records else [empty])

    page_path.parent.mkdir(parents=True, exist_ok=True)
    part = page_path.with_name(f".{page_path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(page_path)
    finally:
        part.unlink(missing_ok=True)


def _malformed(path: Path, number: int, problem: str) -> ValueError:
    return ValueError(
        f"{path}, line {number}: every line must be one record, but this one is {problem}. "
        "Remove the line, or write the records again."
    )
