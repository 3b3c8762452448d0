"""Makes the Fashion-MNIST files that the package ships: the first 10,000 training and 2,000 test images.

    python scripts/make_fashion_mnist.py FOLDER

FOLDER holds the four original IDX files, for instance the Debian package `dataset-fashion-mnist`'s
/usr/share/datasets/fashion-mnist. The output is the same to the last byte every time.
"""

import gzip
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "flopwise" / "experiments" / "data"
EXAMPLES = {"train": 10_000, "t10k": 2_000}
HEADER = {"images-idx3": 16, "labels-idx1": 8}  # bytes before the first example
EXAMPLE_BYTES = {"images-idx3": 28 * 28, "labels-idx1": 1}


def main(folder: Path) -> None:
    for split, count in EXAMPLES.items():
        for kind, header in HEADER.items():
            name = f"{split}-{kind}-ubyte.gz"
            content = gzip.decompress((folder / name).read_bytes())
            first = content[:4] + count.to_bytes(4, "big") + content[8:header]
            body = content[header : header + count * EXAMPLE_BYTES[kind]]
            (TARGET / name).write_bytes(gzip.compress(first + body, compresslevel=9, mtime=0))
            print(f"{name}: {(TARGET / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
