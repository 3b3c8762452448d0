"""What a classifier saw in one image: a page with the image to zoom into, the attention over it, and the patches."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flopwise.report.deepzoom import Pyramid, as_jpeg, deep_zoom, viewer
from flopwise.report.page import Section, cards, page, paragraph, table, write_page
from flopwise.report.pictures import png
from flopwise.report.words import number, percent

OVERLAY = (230, 80, 0)  # the attention's colour; how much of it is how much attention


def write_look(page_path: Path, seen: Mapping[str, Any], image: Pyramid, pixels: Sequence[Any]) -> None:
    """Write the page of what a classifier saw, whole or not at all.

    Args:
        seen: "image", "model", "label", "probabilities" of all classes, "attention" {"rows", "corner", "step"} in
            pixels of the image, "patches" [{"y", "x", "height", "width", "weight"}], perhaps "microns_per_pixel".
        image: of which tiles are put into the page.
        pixels: of every patch, (channels, height, width) of 8 bits.

    Raises:
        ImportError: Pillow is missing.
    """
    regions = [tuple(patch[name] for name in ("y", "x", "height", "width")) for patch in seen["patches"]]
    zoom = deep_zoom(image, regions=regions)
    pictures = [as_jpeg(patch) for patch in pixels]
    text = page(f"{seen['image']}: {seen['label']}", sections(seen, zoom, pictures), script="deepzoom.js")
    write_page(page_path, text)


def sections(seen: Mapping[str, Any], zoom: dict[str, Any], pictures: Sequence[str]) -> list[Section]:
    """Verdict, the image with its patches, method."""
    ranked = sorted(seen["probabilities"].items(), key=lambda pair: -pair[1])
    patches = seen["patches"]
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
    return [verdict, Section("Where it looked", _looked(seen, zoom, pictures)), _method(seen, zoom)]


def _looked(seen: Mapping[str, Any], zoom: dict[str, Any], pictures: Sequence[str]) -> str:
    """The image to zoom into, the attention over it, and the patches: `deepzoom.js` joins them."""
    attention, patches = seen["attention"], seen["patches"]
    rows, (top, left), (down, across) = attention["rows"], attention["corner"], attention["step"]
    overlay = {"uri": _overlay(rows), "y": top, "x": left, "height": len(rows) * down, "width": len(rows[0]) * across}
    boxes = [tuple(patch[name] for name in ("y", "x", "height", "width")) for patch in patches]
    label = f"{seen['image']}, {zoom['width']} x {zoom['height']} pixels, with the patches that were read"
    shown = viewer(zoom, label, boxes=boxes, overlay=overlay).removesuffix("</div>")
    switch = '<p><label><input type="checkbox" checked> the attention over it</label></p>'
    note = paragraph(
        "Drag or pinch; + and - zoom, 0 shows all, arrow keys move; the wheel zooms once the image was clicked. Where "
        "nothing was read at full resolution, a coarser level is shown. Press a patch to find it. A patch's weight is "
        "its share in the estimate of the features.",
        "note",
    )
    return f'<figure class="look">{shown}{switch}{_patches(seen, pictures)}</div></figure>{note}'


def _overlay(rows: Sequence[Sequence[float]]) -> str:
    """The attention as a transparent picture, one pixel a position; half as strong is a quarter of the attention."""
    top = max(map(max, rows)) or 1.0
    lines = [b"".join(bytes([*OVERLAY, round(200 * (max(value, 0.0) / top) ** 0.5)]) for value in row) for row in rows]
    return f"data:image/png;base64,{b64encode(png(lines, len(rows[0]), channels=4)).decode()}"


def _patches(seen: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The patches, the heaviest first."""
    scale, items = seen.get("microns_per_pixel"), []
    for i in sorted(range(len(pictures)), key=lambda i: -seen["patches"][i]["weight"]):
        patch = seen["patches"][i]
        words = f"{percent(patch['weight'])}; y {patch['y']}, x {patch['x']}"
        if scale:
            words += f" ({number(patch['y'] * scale[0] / 1000)}, {number(patch['x'] * scale[1] / 1000)} mm)"
        shown = f'<img class="heat" alt="patch {i + 1}" src="{pictures[i]}">'
        items.append(f'<li><button type="button" data-box="{i}">{shown}</button>{escape(words)}</li>')
    return f'<ul class="patches">{"".join(items)}</ul>'


def _method(seen: Mapping[str, Any], zoom: Mapping[str, Any]) -> Section:
    scale = seen.get("microns_per_pixel")
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
