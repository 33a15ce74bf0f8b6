"""`qapbench`: parse, call, print."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tqdm.auto
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import UserError, nearest

if TYPE_CHECKING:
    from .run.engine import Engine
    from .spec import RunSpec

WIDE = 200  # characters of a table that is not printed to a terminal

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Benchmark quantized and vision-token-pruned multimodal LLMs.",
)  # fmt: skip
# Piped or in a file a table may be as wide as it is; a terminal, or COLUMNS, sets the width otherwise.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
err = Console(stderr=True)

SpecArgument = Annotated[str, typer.Argument(help="A spec file, or the name of a shipped spec (quickstart).")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a dotted key.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the results.")]


@app.command()
def run(
    spec: SpecArgument,
    changes: SetOption = None,
    runs: RunsOption = Path("runs"),
    fresh: Annotated[bool, typer.Option(help="Make every run anew; earlier results are set aside.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    engine: Annotated[Literal["local"], typer.Option(help="Where runs are made.")] = "local",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions a forward pass.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a checkpoint run its own Python code.")] = False,
    page: Annotated[Path | None, typer.Option("--out", help="Leaderboard page; RUNS/leaderboard.html.")] = None,
) -> None:
    """Make the runs of a spec that are missing, print the table, write the leaderboard page."""
    from .analysis.table import ablation_table
    from .run.engine import Engine
    from .specfile import load_spec

    target = page or runs / "leaderboard.html"
    if target.suffix not in (".html", ".htm"):
        raise UserError(f"--out {target}: the page is an .html file")
    bars = _Progress()
    making = Engine(runs, batch_size, device, trust_remote_code, bars.report)
    specs = load_spec(spec, changes or (), making.check)
    if dry_run:
        out.print(_plan_table(specs, making))
        return
    try:
        with bars:
            records = [making.run(one, fresh) for one in specs]
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on from here", highlight=False)
        raise typer.Exit(130) from None
    out.print(ablation_table(records, out.width))
    spent = [record["timing"] for record in records]
    out.print(
        f"{sum(t['questions'] for t in spent)} questions in {sum(t['seconds'] for t in spent):.0f} s as made, "
        f"peak memory {max(t['peak_memory_mb'] for t in spent)} MB"
    )
    for note in dict.fromkeys(note for record in records for note in record.get("notes", [])):
        out.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    _write_page(records, target, Path(spec).stem)


@app.command()
def validate(spec: SpecArgument, changes: SetOption = None) -> None:
    """Check a spec, its task, data and local model, and list its runs."""
    from .run.engine import Engine
    from .specfile import load_spec

    specs = load_spec(spec, changes or (), Engine(Path("runs")).check)
    for one in specs:
        out.print(escape(f"{one.name}: {one.model} on {one.task.name}"), highlight=False)
    out.print(f"{len(specs)} run(s), all valid")


@app.command("list")
def list_items(kind: Annotated[str | None, typer.Argument(help="metric, quantizer, ...")] = None) -> None:
    """List what is registered."""
    for registry in _registries(kind):
        table = Table(title=registry.kind, title_justify="left")
        table.add_column("name", style="bold")
        table.add_column("parameters")
        table.add_column("what it is")
        for entry in registry:
            fields = entry.params.model_fields
            params = ", ".join(f"{k}={v.default!r}" for k, v in fields.items())
            table.add_row(escape(entry.name), escape(params), escape(entry.doc.partition("\n")[0]))
        out.print(table)


@app.command()
def show(kind: str, name: str) -> None:
    """Describe one registered item: documentation, parameters, origin."""
    (registry,) = _registries(kind)
    described = registry.describe(name)
    out.print(f"[bold]{escape(name)}[/] ({registry.kind}), from {escape(described['origin'])}", highlight=False)
    out.print(escape(described["doc"]), highlight=False)
    out.print_json(json.dumps(described["parameters"]))


@app.command()
def leaderboard(
    runs: RunsOption = Path("runs"),
    page: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("leaderboard.html"),
) -> None:
    """Write one offline HTML page of every record below RUNS."""
    from .run.record import read_records

    records = read_records(runs)
    if not records:
        raise UserError(f"no records below {runs}; make some with `qapbench run SPEC --runs {runs}`")
    _write_page(records, page, "qapbench")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run: its id or the start of it, its name, or its folder.")],
    second: Annotated[str, typer.Argument(help="The run to compare with it.")],
    runs: RunsOption = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, flipped questions included.")] = False,
) -> None:
    """Compare two runs question by question: paired differences, exact McNemar test, flips."""
    from .analysis import paired
    from .analysis.table import comparison_table

    one, other = (paired.read_scored(paired.find_run(name, runs)) for name in (first, second))
    comparison = paired.compare(one, other)
    if as_json:
        typer.echo(json.dumps(comparison.to_json()))
    else:
        out.print(comparison_table(comparison))


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="Stored outputs: LLaVA's JSON, or JSON lines.")],
    task: Annotated[str, typer.Option(help="Task that the outputs answer.")],
    data: Annotated[str | None, typer.Option(help="Its data: a parquet file or a hub id.")] = None,
    parser: Annotated[str | None, typer.Option(help="How answers are read; the task's own by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="For parsers that guess.")] = 0,
) -> None:
    """Score stored outputs again."""
    from .analysis.score import score_file
    from .analysis.table import scores_table
    from .spec import TaskSpec

    scores = score_file(file, TaskSpec(name=task, data=data, parser=parser, answers="generate"), seed)
    if as_json:
        typer.echo(json.dumps(scores.to_json()))
    else:
        out.print(scores_table(scores.to_json()))


def _registries(kind: str | None) -> list[Any]:
    from .strategy import KINDS

    if kind is None:
        return list(KINDS.values())
    name = kind if kind in KINDS else kind.removesuffix("s")
    if name not in KINDS:
        raise UserError(f"no kind '{kind}'; {nearest(kind, KINDS)}")
    return [KINDS[name]]


def _write_page(records: list[dict[str, Any]], page: Path, title: str) -> None:
    from .leaderboard import build

    page.parent.mkdir(parents=True, exist_ok=True)
    build(records, page, title=title)
    out.print(f"Leaderboard: {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)


def _plan_table(specs: list[RunSpec], engine: Engine) -> Table:
    table = Table(title="Plan", title_justify="left")
    for column in ("run", "id", "state"):
        table.add_column(column)
    table.add_column("answered", justify="right")
    for spec in specs:
        try:
            planned = engine.plan(spec, fetch=False)
        except UserError as error:
            table.add_row(escape(spec.name), "–", escape(error.problems[0].message), "")
            continue
        table.add_row(escape(spec.name), planned.id, planned.state, f"{planned.answered} of {planned.total}")
    return table


class _Progress:
    """A bar per run, with rate and time left; on standard error, so that tables can be piped."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=err)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.bar.start()

    def report(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(escape(name), total=total, completed=done, rate="")
        task = self.tasks[name]
        speed = self.bar.tasks[self.bar.task_ids.index(task)].speed
        self.bar.update(task, completed=done, rate=f"{speed:.1f}/s" if speed else "")

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def main() -> None:
    """Entry point: the user's mistakes are one readable message and exit code 2, faults of ours exit with 1."""
    from .receipt import NotQuantizedError

    # Our own bar is the only one; lm-eval and transformers offer no common switch for theirs.
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    tqdm.auto.tqdm.__init__ = functools.partialmethod(tqdm.auto.tqdm.__init__, disable=True)
    for noisy in ("transformers", "torchao", "torch.utils._pytree"):  # torchao: kernels of other machines
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            err.print(f"[red]error:[/] {escape(str(problem))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except NotQuantizedError as error:
        err.print(f"[red]run failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        err.print(f"[red]error:[/] {escape(f'{error.filename}: {error.strerror}')}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
