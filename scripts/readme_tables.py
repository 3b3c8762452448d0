"""Makes the README's tables from the records in benchmarks/results; `--check` fails when they differ.

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import json
import re
import sys
from pathlib import Path

from flopwise.report import read_records
from flopwise.report.importance import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def importance() -> str:
    """The comparison at equal FLOPs."""
    return markdown_table(read_records(RESULTS / "importance.jsonl"))


def overhead() -> str:
    """What the ledger and the sampler cost, from the newest benchmark record."""
    record = json.loads((RESULTS / "importance_sampling.jsonl").read_text().splitlines()[-1])
    rows = [f"| {name} | {ratio:.3f} |" for name, ratio in record["overhead"].items()]
    kept = record["score quality after one epoch"]
    rows += [
        f"| variance reduction that the {name} keeps of exact norms' | {kept[name]['variance reduction kept']:.2f} |"
        for name in ("upper bound", "loss")
    ]
    return "\n".join(["| CPU time of | ratio |", "|---|---|", *rows])


TABLES = {"importance": importance, "overhead": overhead}


def main(check: bool) -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    made = PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]().strip()}\n{place[3]}", text)
    if not check:
        path.write_text(made)
    elif made != text:
        sys.exit("README.md: a table differs from the records; run `python scripts/readme_tables.py` and commit.")


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
