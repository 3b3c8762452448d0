"""Matrices as pictures in the page: one pixel an entry, a PNG inside the markup."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape

LIGHTEST, DARKEST = (248, 250, 252), (8, 48, 107)  # of 0 and of `top`; steps between them look alike in grey, too

Matrix = Sequence[Sequence[float]]


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
    data = b64encode(_png(lines)).decode()
    alt = f"{title}: {len(rows)} queries from top to bottom, {width} keys from left to right"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><img class="heat" width="{width}" height="{len(rows)}" '
        f'alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'
    )


def _png(lines: Sequence[bytes]) -> bytes:
    """A picture of 256 colours from LIGHTEST to DARKEST, one byte a pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", len(lines[0]), len(lines), 8, 3, 0, 0, 0)  # 8 bits, from a palette
    palette = bytes(
        round(light + (dark - light) * i / 255)
        for i in range(256)
        for light, dark in zip(LIGHTEST, DARKEST, strict=True)
    )
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines), 9)  # every line starts with its filter: none
    chunks = chunk(b"IHDR", header) + chunk(b"PLTE", palette) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
