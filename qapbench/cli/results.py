"""The commands `leaderboard`, `compare` and `score`, which read what is answered already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from qapbench.errors import UserError

from .console import RunsOption, err, out, print_notes, write_page


def leaderboard(
    runs: RunsOption = Path("runs"),
    page: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("leaderboard.html"),
    check: Annotated[Path | None, typer.Option(help="Verify a record (or its folder) instead.")] = None,
    data: Annotated[
        str | None, typer.Option(help="For --check: the data, where the record's path is not here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For --check: print JSON.")] = False,
) -> None:
    """Write one offline HTML page of every record below RUNS, or verify one record.

    \b
    Examples:
      qapbench leaderboard --runs runs --out board.html
      qapbench leaderboard --check runs/158cbb971c014df6
    """
    from qapbench.records.load import load_records

    if check is not None:
        _check_record(check, data, as_json)
        return

    records = load_records(runs)
    if not records:
        raise UserError(f"no records below {runs}; make some with `qapbench run SPEC --runs {runs}`")
    write_page(records, page, "qapbench leaderboard", runs)


def compare(
    first: Annotated[str, typer.Argument(help="A run: its id or the start of it, its name, or its folder.")],
    second: Annotated[str, typer.Argument(help="The run to compare with it.")],
    runs: RunsOption = Path("runs"),
    flips: Annotated[int, typer.Option(min=0, help="Flipped questions to list, in each direction.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every flipped question.")] = False,
) -> None:
    """Compare two runs question by question: paired differences by column, exact McNemar test, flipped questions.

    \b
    Examples:
      qapbench compare "W4A4 cdpruner 32" "W4A4 cdpruner 32 + combined"
      qapbench compare 158cbb97 4b96d4ef --flips 3 --json
    """
    from qapbench.analysis import paired
    from qapbench.analysis.strata import Strata
    from qapbench.analysis.table import comparison_table, flips_table

    folders = [paired.find_run(name, runs) for name in (first, second)]
    one, other = (Strata(folder.resolve().parent).of(paired.read_scored(folder)) for folder in folders)
    for damage in dict.fromkeys(run.damage for run in (one, other) if run.damage):
        err.print(f"[yellow]warning:[/] {escape(damage)}", highlight=False, soft_wrap=True)
    comparison = paired.compare(one, other)
    notes = [*comparison.untested, *filter(None, [comparison.left_out]), *paired.caveats(one, other)]
    if as_json:
        typer.echo(json.dumps({**comparison.to_json(), "notes": notes}))
    else:
        out.print(comparison_table(comparison, out.width))
        if flips and (comparison.gained or comparison.lost):
            out.print(flips_table(comparison, [one.answers(), other.answers()], flips))
        print_notes(notes)


def score(
    file: Annotated[Path, typer.Argument(help="Stored outputs: LLaVA's JSON, or JSON lines.")],
    task: Annotated[str, typer.Option(help="Task that the outputs answer.")],
    data: Annotated[str | None, typer.Option(help="Its data: a parquet file or a hub id.")] = None,
    parser: Annotated[str | None, typer.Option(help="How answers are read; the task's own by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="For parsers that guess.")] = 0,
) -> None:
    """Score stored outputs again.

    \b
    Examples:
      qapbench score answers.json --task scienceqa --data test.parquet --parser llava
    """
    from qapbench.analysis.score import score_file
    from qapbench.analysis.table import scores_table
    from qapbench.spec.task_spec import TaskSpec

    scores = score_file(file, TaskSpec(name=task, data=data, parser=parser, answers="generate"), seed)
    if as_json:
        typer.echo(json.dumps(scores.to_json()))
    else:
        out.print(scores_table(scores.to_json()))


def _check_record(path: Path, data: str | None, as_json: bool) -> None:
    """Verify one record and print the result."""
    from qapbench.analysis.check import check_record

    report = check_record(path, data)
    if as_json:
        typer.echo(json.dumps({"record": str(path), **report.to_json()}))
        return
    for line in report.passed:
        out.print(f"[green]ok[/] {escape(line)}", highlight=False, soft_wrap=True)
    for line in report.notes:
        out.print(f"[yellow]{escape(line)}[/]", highlight=False, soft_wrap=True)
