"""Builds the release and tries it where nothing is installed.

    python scripts/release_check.py        or: make release-check

sdist and wheel go into dist/, the wheel made from the sdist. The wheel alone, without extras, is installed into a fresh
environment (versions from constraints.txt) and used there: what the README promises has to work, and what an extra is
needed for has to say so in one line. Takes one to two minutes, most of it for torch.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
LARGEST = 12_000_000  # bytes of the wheel
SLOWEST = 1.3  # times the import of torch alone
IMPORTS = 5
# What is asked for without its extra -> the command that the answer names.
MISSING = {
    "from flopwise.integrations import transformers": "pip install 'flopwise[hf]'",
    "from flopwise.attention_sampling import open_image; open_image('slide.tiff')": "pip install 'flopwise[images]'",
    "import torch; from flopwise.linear_attention import linear_attention as f; x = torch.ones(1, 1, 4, 4); "
    "f(x, x, x, backend='numba')": "pip install 'flopwise[cpu]'",
    "import torch; from flopwise.clustered_attention import clustered_attention as f; x = torch.ones(1, 1, 4, 4); "
    "f(x, x, x, clusters=2, backend='numba')": "pip install 'flopwise[cpu]'",
}
IMPORTED = """
import sys, flopwise
import flopwise.importance_sampling, flopwise.attention_sampling, flopwise.linear_attention
import flopwise.clustered_attention, flopwise.models
heavy = {"numba", "numpy", "transformers", "tokenizers", "lightning", "tifffile", "zarr", "PIL", "typer", "rich"}
assert not (found := heavy & set(sys.modules)), found
print(flopwise.__version__)
"""
TIMED = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        wheel = build(home)
        size = wheel.stat().st_size
        print(f"{wheel.name}: {size / 1e6:.2f} MB", flush=True)
        if size > LARGEST:
            sys.exit(f"a wheel has at most {LARGEST / 1e6:g} MB; {wheel.name} has {size / 1e6:.2f}.")
        python = environment(home / "user")
        run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        try_out(python, home)
    print(f"{wheel.name} works without extras.")


def build(home: Path) -> Path:
    """dist/*.tar.gz, and from it dist/*.whl; returns the wheel."""
    dist = ROOT / "dist"
    for old in (*dist.glob("flopwise-*.whl"), *dist.glob("flopwise-*.tar.gz")):
        old.unlink()
    builder = environment(home / "builder")
    run(builder, "-m", "pip", "install", "--quiet", "build")
    run(builder, "-m", "build", "--outdir", dist, ROOT, quiet=True)
    (wheel,) = dist.glob("flopwise-*.whl")
    return wheel


def environment(folder: Path) -> Path:
    """A fresh virtual environment's Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def try_out(python: Path, home: Path) -> None:
    """Use the installed package away from its source."""
    flopwise = python.with_name("flopwise")
    version = run(python, "-W", "ignore", "-c", IMPORTED, cwd=home)
    if run(flopwise, "--version", cwd=home).split() != ["flopwise", version.strip()]:
        sys.exit("`flopwise --version` is not the package's version.")
    ratio = import_time(python, "flopwise", home) / import_time(python, "torch", home)
    print(f"import of flopwise: {ratio:.2f} times that of torch", flush=True)
    if ratio > SLOWEST:
        sys.exit(f"the import of flopwise takes at most {SLOWEST} times torch's; got {ratio:.2f}.")
    run(flopwise, "demo", "importance", "--budget", "2e9", "--seeds", "1", cwd=home, quiet=True)
    if "<h2>" not in (home / "report" / "index.html").read_text():
        sys.exit("the demo wrote no page.")
    for code, command in MISSING.items():
        answer = run(python, "-W", "ignore", "-c", code, cwd=home, fails=True).strip().splitlines()[-1]
        if command not in answer:
            sys.exit(f"{code!r} without its extra should name {command}; it said: {answer}")
    answer = run(flopwise, "demo", "clustered", cwd=home, fails=True)
    if "pip install 'flopwise[hf]'" not in answer or "Traceback" in answer:
        sys.exit(f"`flopwise demo clustered` without packages should say what it needs; it said: {answer}")


def import_time(python: Path, module: str, home: Path) -> float:
    """Processor seconds, the median of fresh processes."""
    return median(float(run(python, "-W", "ignore", "-c", TIMED.format(module), cwd=home)) for _ in range(IMPORTS))


def run(*command: str | Path, cwd: Path | None = None, quiet: bool = False, fails: bool = False) -> str:
    """What the command wrote; it has to end well or, where it `fails`, badly. Nothing is found by PYTHONPATH."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, text=True, capture_output=True, check=False
    )
    if (done.returncode != 0) != fails:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return "" if quiet else done.stdout + (done.stderr if fails else "")


if __name__ == "__main__":
    main()
