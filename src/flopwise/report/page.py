"""The page around the figures: one HTML file with its style and script inside, and the few blocks sections are made of.

Every helper takes plain text and escapes it; only `Section.body` and `page` handle markup.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A heading (plain text) and what stands below it (markup); level 3 belongs to the section of level 2 before it."""

    title: str
    body: str
    level: int = 2


def under(first: Section, others: Sequence[Section]) -> list[Section]:
    """A section and those that belong to it."""
    return [first, *(replace(section, level=3) for section in others)]


def page(title: str, sections: Sequence[Section], *, script: str = "hover.js") -> str:
    """A complete HTML document which needs no other file and makes no request; `script` is a file beside this one.

    A page of several sections of level 2, with others below them, begins with links to these.
    """
    resources = files("flopwise.report")
    style = resources.joinpath("style.css").read_text(encoding="utf-8")
    code = resources.joinpath(script).read_text(encoding="utf-8")
    body = "\n".join(
        f'<section id="s{i}">\n<h{part.level}>{escape(part.title)}</h{part.level}>\n{part.body}\n</section>'
        for i, part in enumerate(sections)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header><p class="brand">flopwise</p><h1>{escape(title)}</h1></header>{_contents(sections)}
<main>
{body}
</main>
<script>
{code}</script>
</body>
</html>
"""


def _contents(sections: Sequence[Section]) -> str:
    links = [f'<li><a href="#s{i}">{escape(part.title)}</a></li>' for i, part in enumerate(sections) if part.level == 2]
    if len(links) == 1 or len(links) == len(sections):
        return ""
    return f'\n<nav aria-label="On this page"><ol>{"".join(links)}</ol></nav>'


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def paragraph(text: str, kind: str = "") -> str:
    """`kind` is a class of the style sheet: "lead" for the verdict, "note" for small print."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def cards(figures: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures, each (what it is, its value, a remark)."""
    blocks = [
        f'<div class="card"><dt>{escape(name)}</dt>'
        f"<dd><strong>{escape(value)}</strong><span>{escape(remark)}</span></dd></div>"
        for name, value, remark in figures
    ]
    return f'<dl class="cards">{"".join(blocks)}</dl>'


def side_by_side(figures: Sequence[str]) -> str:
    """Charts in two columns where there is room, in one where there is not; three of them in three."""
    kind = "pair three" if len(figures) == 3 else "pair"
    return f'<div class="{kind}">{"".join(figures)}</div>'


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    marked: Collection[tuple[int, int]] = (),
    prose: bool = False,
) -> str:
    """A table whose first column names the rows.

    On a narrow screen each row becomes a block of "column: value" lines; the explicit roles keep it a table for
    screen readers there. `marked` are the (row, column) cells to highlight, counted from 0, none of the first column;
    the cells of `prose` are sentences, not numbers.
    """
    head = "".join(f'<th scope="col" role="columnheader">{escape(column)}</th>' for column in columns)
    kind = ' class="prose"' if prose else ""
    body = []
    for i, (name, *values) in enumerate(rows):
        cells = [f'<th scope="row" role="rowheader">{escape(name)}</th>']
        for j, (column, value) in enumerate(zip(columns[1:], values, strict=True), start=1):
            mark = ' class="marked"' if (i, j) in marked else ""
            cells.append(f'<td role="cell" data-column="{escape(column)}"{mark}>{escape(value)}</td>')
        body.append(f'<tr role="row">{"".join(cells)}</tr>')
    return (
        f'<table role="table"{kind}><caption>{escape(caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table>'
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's markdown, for READMEs and docs."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *rows])
