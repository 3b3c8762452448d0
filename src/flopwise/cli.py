"""The command line: `flopwise --help`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flopwise import __version__

app = typer.Typer(
    help="Stop wasting FLOPs: compute where it matters, measured against the honest baseline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
demo_app = typer.Typer(help="See what a technique buys, on real data, and a page that tells.", add_completion=False)
app.add_typer(demo_app, name="demo")

Seeds = Annotated[int, typer.Option(min=1, help="How many seeds each method is trained with; the band in the plots.")]
Out = Annotated[Path, typer.Option(help="Folder of the records, checkpoints and the page. Run again to go on there.")]


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
    """See what a technique buys, on real data. Without a name: all of them, which today is `importance`."""
    if context.invoked_subcommand is None:
        demo_importance()


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
    from flopwise.report import write_report

    console = Console()
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
    records, page = out / "records.jsonl", out / "index.html"
    try:
        importance.compare(plan, out)
    except KeyboardInterrupt:
        write_report(records, page)
        console.print(f"Stopped. What was done is in {page}; the same command goes on from here.")
        raise typer.Exit(130) from None
    write_report(records, page)
    _print_verdict(console, records)
    console.print(f"The page: [bold]{page}[/bold]   The records: {records}", highlight=False)


def _print_verdict(console: Console, path: Path) -> None:
    """The result table and the verdict in words."""
    from rich.table import Table

    from flopwise.report import read_records
    from flopwise.report.importance import markdown_table, verdict

    records = read_records(path)
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown_table(records).splitlines()
    )
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    title, text = verdict(records)
    console.print(f"[bold]{title}[/bold]\n{text}", highlight=False)
