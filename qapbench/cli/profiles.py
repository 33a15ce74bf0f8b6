"""The command `profile`: what the rows of a spec take on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import DeviceOption, RemoteOption, RunsOption, SetOption, SpecArgument, collect_as_usual, out, progress


def profile(
    spec: SpecArgument,
    changes: SetOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; one more warms up.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Prompts side by side.")] = 1,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU.")] = None,
    trust_remote_code: RemoteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a prompt under each run of a spec, alone or in a batch, row against row in one process.

    Times are medians after a warm-up. Profiles are kept in RUNS, where the leaderboard reads them.

    \b
    Examples:
      qapbench profile quickstart --repeats 5
    """
    from qapbench.analysis.profile_table import profile_table
    from qapbench.records.profile import write_profile
    from qapbench.running.planner import Planner
    from qapbench.running.profile import profile as measure
    from qapbench.running.session import Session
    from qapbench.running.settings import Settings, find_device
    from qapbench.spec.spec_file import load_spec

    settings = Settings(runs, find_device(device), trust_remote_code=trust_remote_code, threads=threads)
    planner = Planner(runs, settings.device)
    specs = load_spec(spec, changes or (), planner.check)
    collect_as_usual()
    with progress() as report:
        found = measure(specs, Session(settings, report), planner, repeats, new_tokens, batch)
    for one in found:
        write_profile(runs, one)
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in found]))
        return
    out.print(profile_table(found, out.width))
