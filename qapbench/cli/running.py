"""The commands `run` and `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from qapbench.errors import UserError

from .console import (
    DeviceOption,
    RemoteOption,
    RunsOption,
    SetOption,
    SpecArgument,
    collect_as_usual,
    out,
    print_notes,
    progress,
    write_page,
)

if TYPE_CHECKING:
    from qapbench.running.plan import Planned
    from qapbench.running.planner import Planner
    from qapbench.spec.run_spec import RunSpec


def run(
    spec: SpecArgument,
    changes: SetOption = None,
    runs: RunsOption = Path("runs"),
    fresh: Annotated[bool, typer.Option(help="Make every run anew; earlier results are set aside.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="A subset first; rows out of reach there stop, marked.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the questions; one per GPU.")] = 1,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where workers run.")] = "local",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each process on a CPU; 1 for small models.")
    ] = None,
    spill: Annotated[bool, typer.Option("--spill", help="Let image features wait on disk, not in memory.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions taken up together, 8 by default.")] = None,
    device: DeviceOption = None,
    trust_remote_code: RemoteOption = False,
    page: Annotated[Path | None, typer.Option("--out", help="Leaderboard page; RUNS/leaderboard.html.")] = None,
) -> None:
    """Make the runs of a spec that are missing, print the table, write the leaderboard page."""
    from qapbench.running.estimate import of_all
    from qapbench.running.execute import make_runs
    from qapbench.running.planner import Planner
    from qapbench.running.settings import BATCH, Settings, find_device
    from qapbench.spec.spec_file import load_spec

    target = page or runs / "leaderboard.html"
    if target.suffix not in (".html", ".htm"):
        raise UserError(f"--out {target}: the page is an .html file")
    settings = Settings(
        runs, find_device(device), batch_size or BATCH, workers, engine, spill, trust_remote_code, threads
    )
    planner = Planner(runs, settings.device)
    specs = load_spec(spec, changes or (), planner.check, lambda sentence: print_notes([sentence]))
    if dry_run:
        plans = _plans(specs, planner)
        out.print(_plan_table(plans))
        for line in planner.shared([plan for _, plan in plans if not isinstance(plan, UserError)]).lines:
            out.print(line, highlight=False)
        known = [(one, plan.total) for one, plan in plans if not isinstance(plan, UserError)]
        for line in of_all([one for one, _ in known], settings, [total for _, total in known]):
            out.print(escape(line), highlight=False)
        return
    from qapbench.analysis.strata import Strata  # imported here because it takes a second
    from qapbench.analysis.table import ablation_table

    collect_as_usual()
    with progress() as report:
        records = make_runs(specs, settings, fresh, fast, report, planner)
    out.print(ablation_table(Strata(runs).records(records, runs), out.width))
    spent = [record.timing for record in records]
    out.print(
        f"{sum(t.questions for t in spent)} questions in {sum(t.seconds for t in spent):.0f} s as made, "
        f"peak memory {max(t.peak_memory_mb or 0 for t in spent)} MB"
    )
    print_notes(note for record in records for note in record.notes)
    write_page(records, target, Path(spec).stem, runs)


def validate(
    spec: SpecArgument,
    changes: SetOption = None,
    check_data: Annotated[bool, typer.Option("--check-data", help="Also decode every picture of the data.")] = False,
) -> None:
    """Check a spec, its task, data and local model, and list its runs."""
    from qapbench.running.planner import Planner
    from qapbench.running.settings import find_device
    from qapbench.spec.spec_file import load_spec

    planner = Planner(Path("runs"), find_device(None))
    specs = load_spec(spec, changes or (), planner.check, lambda sentence: print_notes([sentence]))
    if check_data:
        planner.check_data(specs)
    for one in specs:
        asked = ", ".join(part.task.name for part in planner.parts(one))
        out.print(escape(f"{one.name}: {one.model} on {asked}"), highlight=False)
    out.print(f"{len(specs)} run(s), all valid")


def _plans(specs: list[RunSpec], planner: Planner) -> list[tuple[RunSpec, Planned | UserError]]:
    """The plan of each run, or the error if it cannot be planned."""
    plans: list[tuple[RunSpec, Planned | UserError]] = []
    for spec in (part for row in specs for part in planner.parts(row)):
        try:
            plans.append((spec, planner.plan(spec, fetch=False)))
        except UserError as error:
            plans.append((spec, error))
    return plans


def _plan_table(plans: list[tuple[RunSpec, Planned | UserError]]) -> Table:
    """A table with one row per run: its id, its state, and how much is answered."""
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
