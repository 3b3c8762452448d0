"""Matrices as pictures in the page: one pixel an entry, a PNG inside the markup."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape

LIGHTEST, DARKEST = (248, 250, 252), (8, 48, 107)  # of 0 and of `top`; steps between them look alike in grey, too
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
GAP = 2  # pixels between the pictures of a mosaic

Matrix = Sequence[Sequence[float]]
Colour = tuple[int, int, int]


def heat_map(title: str, rows: Matrix, *, top: float) -> str:
    """A figure: white is 0, dark blue is `top` or more, and half as dark is a quarter of it (a square root).

    Raises:
        ValueError: the matrix is empty or ragged, or `top` is not above 0.
    """
    width = len(rows[0]) if rows else 0
    if not width or any(len(row) != width for row in rows) or top <= 0:
        raise ValueError(
            f"the picture {title!r} needs rows of one length and a top above 0; got {len(rows)} rows, the first of "
            f"{width}, and {top}. Leave the picture out."
        )
    lines = [bytes(round(255 * min(max(value / top, 0.0), 1.0) ** 0.5) for value in row) for row in rows]
    alt = f"{title}: {len(rows)} queries from top to bottom, {width} keys from left to right"
    return _figure(title, alt, lines, LIGHTEST, DARKEST)


def mosaic(title: str, alt: str, rows: Sequence[Sequence[Matrix]]) -> str:
    """A figure of many pictures in grey, 0 black and 255 white, all of one size, in rows of equal number.

    Raises:
        ValueError: there is no picture, or they differ in size or number.
    """
    shapes = {(len(row), len(picture), len(line)) for row in rows for picture in row for line in picture}
    if len(shapes) != 1:
        raise ValueError(
            f"the mosaic {title!r} needs rows of equally many pictures of one size; got {sorted(shapes)}. Leave it out."
        )
    ((across, height, width),) = shapes
    gap = [bytes([128]) * (across * (width + GAP) - GAP)] * GAP
    lines: list[bytes] = []
    for row in rows:
        lines += gap if lines else []
        lines += [(b"\x80" * GAP).join(bytes(map(int, picture[y])) for picture in row) for y in range(height)]
    return _figure(title, alt, lines, BLACK, WHITE)


def _figure(title: str, alt: str, lines: Sequence[bytes], first: Colour, last: Colour) -> str:
    data = b64encode(_png(lines, first, last)).decode()
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><img class="heat" width="{len(lines[0])}" '
        f'height="{len(lines)}" alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'
    )


def _png(lines: Sequence[bytes], first: Colour, last: Colour) -> bytes:
    """A picture of 256 colours from `first` to `last`, one byte a pixel."""
    palette = bytes(
        round(low + (high - low) * i / 255) for i in range(256) for low, high in zip(first, last, strict=True)
    )
    return png(lines, len(lines[0]), channels=1, palette=palette)


def png(lines: Sequence[bytes], width: int, *, channels: int, palette: bytes = b"") -> bytes:
    """A PNG file of 8 bits: one channel through a palette, or red, green, blue and opacity."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(lines), 8, 3 if channels == 1 else 6, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines), 9)  # every line starts with its filter: none
    colours = chunk(b"PLTE", palette) if palette else b""
    chunks = chunk(b"IHDR", header) + colours + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
