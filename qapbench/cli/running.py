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
    from qapbench.running.settings import Settings
    from qapbench.spec.run_spec import RunSpec


def run(
    spec: SpecArgument,
    changes: SetOption = None,
    runs: RunsOption = Path("runs"),
    fresh: Annotated[bool, typer.Option(help="Make every run anew; earlier results are set aside.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="A subset first; rows out of reach there stop, marked.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the questions; by default as many as pay.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where workers run: here, or on a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster (auto, or HOST:PORT); else Ray on this machine.")
    ] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="Share of a GPU that each worker of a Ray cluster has.")] = 1.0,
    send_files: Annotated[
        bool, typer.Option("--send-files", help="Send checkpoints and data to the nodes of a Ray cluster without them.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each process on a CPU; 1 for small models.")
    ] = None,
    spill: Annotated[bool, typer.Option("--spill", help="Let image features wait on disk, not in memory.")] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Leave the decoder's weights on disk; each pass reads them. Slow.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions taken up together, 8 by default.")] = None,
    device: DeviceOption = None,
    device_map: Annotated[
        str | None, typer.Option("--device-map", help="auto: over all GPUs; what they have no room for stays on disk.")
    ] = None,
    trust_remote_code: RemoteOption = False,
    page: Annotated[Path | None, typer.Option("--out", help="Leaderboard page; RUNS/leaderboard.html.")] = None,
) -> None:
    """Make the runs of a spec that are missing, print the table, write the leaderboard page.

    \b
    Examples:
      qapbench run quickstart
      qapbench run spec.yaml --set prune.keep=16 --runs runs
      qapbench run spec.yaml --dry-run
    """
    from qapbench.running.engines import make_settings
    from qapbench.running.estimate import of_all
    from qapbench.running.execute import make_runs
    from qapbench.running.planner import Planner
    from qapbench.running.settings import BATCH
    from qapbench.spec.spec_file import load_spec

    target = page or runs / "leaderboard.html"
    if target.suffix not in (".html", ".htm"):
        raise UserError(f"--out {target}: the page is an .html file")
    settings = make_settings(
        runs,
        device,
        batch_size=batch_size or BATCH,
        workers=workers,
        may_share=workers is None and engine == "local",
        engine=engine,
        spill=spill,
        offload=offload,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        threads=threads,
        address=address,
        gpus_per_worker=gpus_per_worker,
        send_files=send_files,
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
    from qapbench.running.threads import in_words

    def header(used: Settings) -> None:
        out.print(escape(in_words(specs, used)), highlight=False)

    collect_as_usual()
    with progress() as report:
        records = make_runs(specs, settings, fresh, fast, report, planner, tell=header)
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
    """Check a spec, its task, data and local model, and list its runs.

    \b
    Examples:
      qapbench validate spec.yaml
      qapbench validate table2 --set task.limit=100
    """
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


def select(
    spec: SpecArgument,
    table: Annotated[Path, typer.Option("--out", help="The table to write, a .parquet file.")],
    changes: SetOption = None,
    embeds: Annotated[
        Path | None, typer.Option(help="Folder for the embeddings of every prompt, as engines take them.")
    ] = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Write which tokens of every image the runs of a spec keep. Nothing is answered.

    \b
    Examples:
      qapbench select spec.yaml --out keep.parquet
      qapbench select spec.yaml --out keep.parquet --embeds embeds
    """
    from qapbench.running.keep_lists import select, write
    from qapbench.running.planner import Planner
    from qapbench.running.session import Session
    from qapbench.running.settings import Settings, find_device
    from qapbench.spec.spec_file import load_spec

    if table.suffix != ".parquet":
        raise UserError(f"--out {table}: the table is a .parquet file")
    settings = Settings(runs, find_device(device), trust_remote_code=trust_remote_code)
    planner = Planner(runs, settings.device)
    specs = load_spec(spec, changes or (), planner.check, lambda sentence: print_notes([sentence]))
    collect_as_usual()
    with progress() as report:
        found = select(specs, Session(settings, report), planner, embeds)
    write(found, table)
    merged = sum(count > 0 for count in found["merged"].to_pylist())
    if merged and embeds is None:
        print_notes(
            [f"{merged} of {len(found)} images have merged tokens, which no index stands for; --embeds writes them too"]
        )
    out.print(f"{len(found)} images: {escape(str(table.resolve()))}", highlight=False, soft_wrap=True)


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
