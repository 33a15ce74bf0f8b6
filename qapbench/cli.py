"""`qapbench`: parse, call, print."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tqdm.auto
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .checkpoints import watcher
from .errors import UserError, nearest

if TYPE_CHECKING:
    from .run.engine import Engine
    from .run.plan import Planned
    from .spec import RunSpec

WIDE = 200  # characters of a table that is not printed to a terminal

study_app = typer.Typer(no_args_is_help=True, help="Studies of why rows differ.")
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Benchmark quantized and vision-token-pruned multimodal LLMs.",
)  # fmt: skip
app.add_typer(study_app, name="study")
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
    fast: Annotated[bool, typer.Option("--fast", help="A subset first; rows out of reach there stop, marked.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the questions; one a GPU.")] = 1,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where workers run.")] = "local",
    spill: Annotated[bool, typer.Option("--spill", help="Let image features wait on disk, not in memory.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions taken up together.")] = None,
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
    making = Engine(
        runs, batch_size, device, trust_remote_code, bars.report, workers=workers, engine=engine, spill=spill
    )
    specs = load_spec(spec, changes or (), making.check)
    if dry_run:
        plans = _plans(specs, making)
        out.print(_plan_table(plans))
        for line in making.shared([plan for _, plan in plans if not isinstance(plan, UserError)]).lines:
            out.print(line, highlight=False)
        return
    try:
        with bars:
            records = making.run(specs, fresh, fast)
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
    _write_page(records, target, Path(spec).stem, runs)


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
def list_items(
    kind: Annotated[str | None, typer.Argument(help="metric, quantizer, ...")] = None,
    matrix: Annotated[bool, typer.Option(help="Run every pruner on a tiny model of every family.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what is registered; with --matrix, which pruner runs on which model family."""
    if matrix:
        _list_matrix(as_json)
        return
    if as_json:
        items = [registry.describe(name) for registry in _registries(kind) for name in registry.names()]
        typer.echo(json.dumps(items))
        return
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


def _list_matrix(as_json: bool) -> None:
    from .matrix import run_matrix

    logging.getLogger("transformers").setLevel(logging.CRITICAL)  # what it warns of is in the table
    cells = list(run_matrix())
    if as_json:
        typer.echo(json.dumps([cell.to_json() for cell in cells]))
        return
    found = {(cell.pruner, cell.family): cell for cell in cells}
    families = list(dict.fromkeys(cell.family for cell in cells))
    table = Table(title="pruner x model family, as found by running", title_justify="left")
    for column in ("pruner", *families):
        table.add_column(column)
    marks: dict[str, int] = {}
    for pruner in dict.fromkeys(cell.pruner for cell in cells):
        row = []
        for family in families:
            cell = found[pruner, family]
            said = [cell.reason] if cell.reason else cell.notes
            numbers = "".join(f" [{marks.setdefault(text, len(marks) + 1)}]" for text in said)
            row.append(escape(f"{cell.outcome}{numbers}"))
        table.add_row(pruner, *row)
    out.print(table)
    for text, number in marks.items():
        out.print(escape(f"[{number}] {text}"), soft_wrap=True, highlight=False)


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
    check: Annotated[Path | None, typer.Option(help="Verify a record (or its folder) instead.")] = None,
    data: Annotated[
        str | None, typer.Option(help="For --check: the data, where the record's path is not here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For --check: print JSON.")] = False,
) -> None:
    """Write one offline HTML page of every record below RUNS, or verify one record."""
    from .run.record import read_records

    if check is not None:
        _check_record(check, data, as_json)
        return

    records = read_records(runs)
    if not records:
        raise UserError(f"no records below {runs}; make some with `qapbench run SPEC --runs {runs}`")
    _write_page(records, page, "qapbench leaderboard", runs)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run: its id or the start of it, its name, or its folder.")],
    second: Annotated[str, typer.Argument(help="The run to compare with it.")],
    runs: RunsOption = Path("runs"),
    flips: Annotated[int, typer.Option(min=0, help="Flipped questions to list, in each direction.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every flipped question.")] = False,
) -> None:
    """Compare two runs question by question: paired differences by column, exact McNemar test, flipped questions."""
    from .analysis import paired
    from .analysis.table import comparison_table, flips_table

    one, other = (paired.read_scored(paired.find_run(name, runs)) for name in (first, second))
    comparison = paired.compare(one, other)
    if as_json:
        typer.echo(json.dumps({**comparison.to_json(), "notes": paired.caveats(one, other)}))
    else:
        out.print(comparison_table(comparison))
        if flips and (comparison.gained or comparison.lost):
            out.print(flips_table(comparison, [one.answers(), other.answers()], flips))
        for note in paired.caveats(one, other):
            out.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)


@app.command()
def explain(
    spec: SpecArgument,
    sample: Annotated[str, typer.Option(help="Id of a question with an image.")],
    picture: Annotated[Path, typer.Option("--out", help="The picture to write, a .png file.")],
    changes: SetOption = None,
    row: Annotated[str | None, typer.Option(help="Which run of a sweep; the first with a sensitivity.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a checkpoint run its own Python code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores, kept tokens and answers as JSON.")] = False,
) -> None:
    """Draw what one question's pruning sees: image, sensitivity, relevance, both selections, both answers."""
    from .analysis.explain import choose_run, explain, save
    from .run.engine import Engine
    from .specfile import load_spec

    if picture.suffix.lower() != ".png":
        raise UserError(f"--out {picture}: the picture is a .png file")
    making = Engine(Path("runs"), device=device)
    chosen = choose_run(load_spec(spec, changes or (), making.check), row)
    explanation = explain(chosen, sample, making.device, trust_remote_code)
    save(explanation, picture)
    if as_json:
        typer.echo(json.dumps(explanation.to_json()))
        return
    for side in explanation.sides:
        mark = "right" if side.answer == explanation.question.truth else "wrong"
        out.print(f"{escape(side.name)}: {escape(side.answer)} ({mark})", highlight=False)
    for note in explanation.notes:
        out.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    out.print(f"Picture: {escape(str(picture.resolve()))}", highlight=False, soft_wrap=True)


@study_app.command("sensitivity")
def study_sensitivity(
    spec: SpecArgument,
    changes: SetOption = None,
    runs: RunsOption = Path("runs"),
    sample: Annotated[int, typer.Option(min=2, help="Questions with an image, drawn by the spec's seed.")] = 50,
    block: Annotated[int, typer.Option(min=1, help="Leave out squares of this side, in tokens.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Omissions a forward pass.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a checkpoint run its own Python code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which metric predicts the harm of leaving a visual token out? The leaderboard shows what lies in RUNS."""
    from .analysis.sensitivity import studies_of
    from .analysis.table import study_table
    from .run.engine import Engine
    from .specfile import load_spec

    making = Engine(runs, device=device)
    specs = load_spec(spec, changes or (), making.check)
    studies = studies_of(
        specs, sample=sample, block=block, batch_size=batch_size, device=making.device,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    bars = _Progress()
    try:
        with bars:
            summaries = [study.make(runs, bars.report) for study in studies]
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on from here", highlight=False)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps([summary.model_dump(mode="json") for summary in summaries]))
        return
    for summary in summaries:
        out.print(study_table(summary))
    for note in dict.fromkeys(note for summary in summaries for note in summary.notes):
        out.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)


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


def _check_record(path: Path, data: str | None, as_json: bool) -> None:
    from .analysis.check import check_record

    report = check_record(path, data)
    if as_json:
        typer.echo(json.dumps({"record": str(path), **report.to_json()}))
        return
    for line in report.passed:
        out.print(f"[green]ok[/] {escape(line)}", highlight=False, soft_wrap=True)
    for line in report.notes:
        out.print(f"[yellow]{escape(line)}[/]", highlight=False, soft_wrap=True)


def _write_page(records: list[dict[str, Any]], page: Path, title: str, runs: Path) -> None:
    from .leaderboard import build

    page.parent.mkdir(parents=True, exist_ok=True)
    build(records, page, title=title, runs=runs)
    out.print(f"Leaderboard: {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)


def _plans(specs: list[RunSpec], engine: Engine) -> list[tuple[RunSpec, Planned | UserError]]:
    """What each run would take up, or why that cannot be said."""
    plans: list[tuple[RunSpec, Planned | UserError]] = []
    for spec in specs:
        try:
            plans.append((spec, engine.plan(spec, fetch=False)))
        except UserError as error:
            plans.append((spec, error))
    return plans


def _plan_table(plans: list[tuple[RunSpec, Planned | UserError]]) -> Table:
    table = Table(title="Plan", title_justify="left")
    for column in ("run", "id", "state"):
        table.add_column(column)
    table.add_column("answered", justify="right")
    for spec, plan in plans:
        if isinstance(plan, UserError):
            table.add_row(escape(spec.name), "–", escape(plan.problems[0].message), "")
        else:
            table.add_row(escape(spec.name), plan.id, plan.state, f"{plan.answered} of {plan.total}")
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


@contextlib.contextmanager
def _watching_assembly() -> Iterator[None]:
    """Show a bar while an embedded model is put together, which happens once a machine."""
    shown: list[_Progress] = []

    def report(name: str, done: int, total: int) -> None:
        if not shown:
            shown.append(_Progress())
            shown[0].bar.start()
        shown[0].report(f"{name}: first use", done, total)
        if done == total:
            shown.pop().bar.stop()

    token = watcher.set(report)
    try:
        yield
    finally:
        watcher.reset(token)
        for bars in shown:
            bars.bar.stop()


def main() -> None:
    """Entry point: the user's mistakes are one readable message and exit code 2, faults of ours exit with 1."""
    from .receipt import NotQuantizedError

    # Our own bar is the only one; lm-eval and transformers offer no common switch for theirs.
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    tqdm.auto.tqdm.__init__ = functools.partialmethod(tqdm.auto.tqdm.__init__, disable=True)
    for noisy in ("transformers", "torchao", "torch.utils._pytree"):  # torchao: kernels of other machines
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with _watching_assembly():
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
