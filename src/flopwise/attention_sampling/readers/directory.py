"""The directories of a TIFF file, read strictly: every size and offset is held against the file before it is used.

Source: TIFF 6.0 (Adobe 1992), BigTIFF, and the SubIFDs of the TIFF supplements.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize

from flopwise.attention_sampling.readers.base import ImageError

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DIRECTORIES = 4096  # in one file
TAGS = 4096  # in one directory

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION = 256, 257, 258, 259, 262, 270
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_COUNTS = 273, 277, 278, 279
X_RESOLUTION, Y_RESOLUTION, PLANAR, UNIT, PREDICTOR = 282, 283, 284, 296, 317
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, SUB_DIRECTORIES, SAMPLE_FORMAT = 322, 323, 324, 325, 330, 339


@dataclass(frozen=True)
class Entry:
    kind: int
    count: int
    offset: int  # of the values, in the file


class File:
    """A file descriptor of its own, read only at given positions: threads share it, and so may processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        finalize(self, os.close, self.descriptor)  # also at the interpreter's exit, when __del__ may find no `os`
        self.size = os.fstat(self.descriptor).st_size

    def read(self, offset: int, count: int) -> bytes:
        if offset + count > self.size:
            raise ImageError(
                f"{self.path}: truncated or wrong offset: {count} bytes at {offset} lie beyond the end, {self.size}."
            )
        data = os.pread(self.descriptor, count, offset)
        if len(data) < count:
            raise ImageError(
                f"{self.path}: {count} bytes at {offset} could not be read; it shrank after it was opened."
            )
        return data


class Directory:
    """One image file directory (IFD): tag -> entry."""

    def __init__(self, file: File, order: str, big: bool, offset: int) -> None:
        self.file, self.order, self.offset = file, order, offset
        head, entry, inline = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
        width = struct.calcsize(order + entry) + inline
        start = offset + struct.calcsize(order + head)
        (count,) = struct.unpack(order + head, file.read(offset, start - offset))
        if not 0 < count <= TAGS:
            raise ImageError(f"{file.path}: a directory has 1 to {TAGS} tags; the one at {offset} has {count}.")
        data = file.read(start, count * width + inline)
        self.entries: dict[int, Entry] = {}
        for i in range(count):
            tag, kind, number = struct.unpack_from(order + entry, data, i * width)
            place = start + (i + 1) * width - inline
            if number * SIZES.get(kind, 0) > inline:
                (place,) = struct.unpack_from(order + "QI"[inline == 4], data, (i + 1) * width - inline)
            self.entries.setdefault(tag, Entry(kind, number, place))
        (self.next,) = struct.unpack_from(order + "QI"[inline == 4], data, count * width)

    def __contains__(self, tag: int) -> bool:
        return tag in self.entries

    def count(self, tag: int) -> int:
        return self.entries[tag].count if tag in self.entries else 0

    def integers(self, tag: int, limit: int = 64) -> tuple[int, ...]:
        """The values of an integer tag, () when it is not there."""
        entry = self.entries.get(tag)
        if entry is None:
            return ()
        if entry.kind not in INTEGERS or entry.count > limit:
            raise ImageError(
                f"{self.file.path}: tag {tag} is one to {limit} integers; got {entry.count} of type {entry.kind}."
            )
        data = self.file.read(entry.offset, entry.count * SIZES[entry.kind])
        return struct.unpack(f"{self.order}{entry.count}{INTEGERS[entry.kind]}", data)

    def integer(self, tag: int, default: int = 0) -> int:
        values = self.integers(tag)
        return values[0] if values else default

    def rational(self, tag: int) -> float:
        entry = self.entries.get(tag)
        if entry is None or entry.kind != 5 or entry.count != 1:
            return 0.0
        above, below = struct.unpack(self.order + "II", self.file.read(entry.offset, 8))
        return above / below if below else 0.0

    def text(self, tag: int, limit: int = 2**24) -> str:
        entry = self.entries.get(tag)
        if entry is None or entry.kind != 2:
            return ""
        return self.file.read(entry.offset, min(entry.count, limit)).decode("utf-8", "replace")


def directories(file: File) -> list[Directory]:
    """The main chain, and after each directory its SubIFDs.

    Raises:
        ImageError: not a TIFF, a directory beyond the end of the file, a circle, more than 4096 directories.
    """
    magic = file.read(0, min(4, file.size))
    if magic not in MAGIC:
        raise ImageError(f"{file.path}: a TIFF begins with {MAGIC}; got {magic!r}.")
    order, big = "<" if magic[:2] == b"II" else ">", b"+" in magic
    (offset,) = struct.unpack(order + "QI"[not big], file.read(8 if big else 4, 8 if big else 4))
    found: list[Directory] = []
    seen: set[int] = set()

    def visit(offset: int) -> Directory:
        if offset in seen or len(seen) == DIRECTORIES:
            raise ImageError(
                f"{file.path}: at most {DIRECTORIES} directories, each met once; the one at {offset} is number "
                f"{len(seen) + 1} or closes a circle."
            )
        seen.add(offset)
        found.append(Directory(file, order, big, offset))
        return found[-1]

    while offset:
        directory = visit(offset)
        for child in directory.integers(SUB_DIRECTORIES, DIRECTORIES):
            visit(child)
        offset = directory.next
    if not found:
        raise ImageError(f"{file.path}: a TIFF has at least one directory; this one has none.")
    return found
