"""The command line of a benchmark of several parts, whose records go to one file."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flopwise.experiments.runner import provenance


def run_parts(
    about: str | None,
    parts: Mapping[str, Callable[[], Iterable[dict[str, Any]]]],
    results: Path,
    *,
    unshown: Sequence[str] = (),
) -> None:
    """Run the parts named on the command line, or all; append their records to `results`, print all but `unshown`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(parts)}; without one, all")
    chosen = parser.parse_args().parts or list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"a part is one of {', '.join(parts)}; got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    results.parent.mkdir(exist_ok=True)
    for part in chosen:
        for record in parts[part]():
            with results.open("a") as file:
                file.write(json.dumps({"benchmark": results.stem, **record, **provenance()}) + "\n")
            shown = {name: x for name, x in record.items() if name not in unshown}
            shown = {name: round(x, 4) if isinstance(x, float) else x for name, x in shown.items()}
            print(json.dumps(shown), flush=True)
