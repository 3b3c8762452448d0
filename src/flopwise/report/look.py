"""What a classifier saw in one image: a page with the image to zoom into, the attention over it, and the patches."""

import json
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flopwise.report.page import Section, cards, page, paragraph, table
from flopwise.report.pictures import png
from flopwise.report.words import number, percent

OVERLAY = (230, 80, 0)  # the attention's colour; how much of it is how much attention
NEEDED = ("image", "model", "label", "probabilities", "zoom", "attention", "patches")


def write_look(seen_path: Path, page_path: Path) -> None:
    """Write the page of what `flopwise look` saw, whole or not at all.

    Raises:
        ValueError: `seen_path` is not what `flopwise look` writes.
    """
    seen = json.loads(seen_path.read_text(encoding="utf-8"))
    missing = [name for name in NEEDED if name not in seen]
    if missing:
        raise ValueError(f"{seen_path} is not what `flopwise look` wrote: it has no {', '.join(missing)}.")
    text = page(f"{seen['image']}: {seen['label']}", sections(seen), script="look.js")
    part = page_path.with_name(f".{page_path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(page_path)
    finally:
        part.unlink(missing_ok=True)


def sections(seen: Mapping[str, Any]) -> list[Section]:
    """Verdict, the image, the patches, method."""
    ranked = sorted(seen["probabilities"].items(), key=lambda pair: -pair[1])
    zoom, patches = seen["zoom"], seen["patches"]
    read = sum(p["height"] * p["width"] for p in patches)
    total = zoom["height"] * zoom["width"]
    figures = [
        ("class", str(seen["label"]), f"probability {percent(ranked[0][1])}"),
        ("pixels read at full resolution", percent(read / total), f"{len(patches)} patches of {total:,} pixels"),
    ]
    verdict = Section(f"It is {seen['label']}, says the model", cards(figures))
    if len(ranked) > 1:
        body = table("All classes", ["class", "probability"], [[name, percent(p)] for name, p in ranked[:10]])
        verdict = Section(verdict.title, verdict.body + body)
    looked = Section("Where it looked", _viewer(seen))
    return [verdict, looked, Section("The patches, by weight", _patches(seen)), _method(seen)]


def _viewer(seen: Mapping[str, Any]) -> str:
    """The image as an SVG in its own pixels: tiles from coarse to fine, attention, outlines; `look.js` moves it."""
    zoom, attention = seen["zoom"], seen["attention"]
    width, height = zoom["width"], zoom["height"]
    tiles = []
    for level in zoom["levels"]:
        side, factor = zoom["tile"], level["downsample"]
        for place, picture in level["tiles"].items():
            row, column = map(int, place.split(","))
            wide, high = min(side, level["width"] - column * side), min(side, level["height"] - row * side)
            tiles.append(
                f'<image x="{column * side * factor:g}" y="{row * side * factor:g}" width="{wide * factor:g}" '
                f'height="{high * factor:g}" preserveAspectRatio="none" href="{picture}"/>'
            )
    rows = attention["rows"]
    high, wide = len(rows) * attention["step"][0], len(rows[0]) * attention["step"][1]
    top, left = attention["corner"]
    overlay = (
        f'<image class="attention" x="{left:g}" y="{top:g}" width="{wide:g}" height="{high:g}" '
        f'preserveAspectRatio="none" href="{_overlay(rows)}"/>'
    )
    outlines = []
    for i, patch in enumerate(seen["patches"]):
        place = " ".join(f'{name}="{patch[name]}"' for name in ("x", "y", "width", "height"))
        title = f"patch {i + 1}, weight {percent(patch['weight'])}"
        outlines.append(f'<rect class="patch" data-number="{i}" {place}><title>{escape(title)}</title></rect>')
    alt = escape(f"{seen['image']}, {width} x {height} pixels, with the patches that were read")
    return (
        '<figure class="look"><div class="tools" role="group" aria-label="view">'
        '<button type="button" data-do="in">zoom in</button><button type="button" data-do="out">zoom out</button>'
        '<button type="button" data-do="all">whole image</button>'
        '<label><input type="checkbox" data-show="attention" checked> attention</label>'
        '<label><input type="checkbox" data-show="patch" checked> patches</label></div>'
        f'<svg class="viewer" tabindex="0" viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">'
        f"{''.join(tiles)}{overlay}<g>{''.join(outlines)}</g></svg></figure>"
        + paragraph(
            "Drag to move; the wheel, + and - zoom; arrow keys move. Where nothing was read at full resolution, what "
            "is shown comes from a coarser level.",
            "note",
        )
    )


def _overlay(rows: Sequence[Sequence[float]]) -> str:
    """The attention as a transparent picture, one pixel a position; half as strong is a quarter of the attention."""
    top = max(map(max, rows)) or 1.0
    lines = [b"".join(bytes([*OVERLAY, round(200 * (max(value, 0.0) / top) ** 0.5)]) for value in row) for row in rows]
    return f"data:image/png;base64,{b64encode(png(lines, len(rows[0]), channels=4)).decode()}"


def _patches(seen: Mapping[str, Any]) -> str:
    order = sorted(range(len(seen["patches"])), key=lambda i: -seen["patches"][i]["weight"])
    scale = seen.get("microns_per_pixel")
    items = []
    for i in order:
        patch = seen["patches"][i]
        where = f"y {patch['y']}, x {patch['x']}"
        if scale:
            where += f" ({number(patch['y'] * scale[0] / 1000)}, {number(patch['x'] * scale[1] / 1000)} mm)"
        words, picture = f"{percent(patch['weight'])}; {where}", patch["picture"]
        shown = f'<img class="heat" alt="patch {i + 1}" src="{picture}">'
        items.append(f'<li><button type="button" data-patch="{i}">{shown}</button>{escape(words)}</li>')
    return f'<ul class="patches">{"".join(items)}</ul>' + paragraph(
        "A patch's weight is its share in the estimate of the features. Press one to find it in the image.", "note"
    )


def _method(seen: Mapping[str, Any]) -> Section:
    zoom, scale = seen["zoom"], seen.get("microns_per_pixel")
    rows = [
        ["image", f"{seen['image']}, {zoom['width']} x {zoom['height']} pixels"],
        ["resolution", f"{number(scale[0])} x {number(scale[1])} microns a pixel" if scale else "not in the file"],
        ["model", str(seen["model"])],
        ["attention", f"{len(seen['attention']['rows'])} x {len(seen['attention']['rows'][0])} positions"],
    ]
    text = (
        "The model looks at a low-resolution view, which gives an attention over positions, and reads patches at full "
        "resolution where the attention is largest. It saw nothing else of the image. Attention says where the model "
        "looked, not why it decided as it did. The patches' places are in patches.geojson beside this page."
    )
    return Section("How to read this", paragraph(text) + table("What was looked at", ["what", "value"], rows))
