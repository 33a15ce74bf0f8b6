"""The commands `explain` and `study`, which show why rows differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from qapbench.errors import UserError
from qapbench.files import replace_synced

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
)


def explain(
    spec: SpecArgument,
    sample: Annotated[str, typer.Option(help="Id of a question with an image.")],
    picture: Annotated[Path, typer.Option("--out", help="The picture to write, a .png file.")],
    changes: SetOption = None,
    row: Annotated[str | None, typer.Option(help="Which run of a sweep; the first with a sensitivity.")] = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = None,
    trust_remote_code: RemoteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores, kept tokens and answers as JSON.")] = False,
) -> None:
    """Draw the pruning of one question: image, sensitivity, relevance, both selections, both answers.

    \b
    Examples:
      qapbench explain table2 --sample test-2026-image-82-2 --out explained.png
    """
    from qapbench.analysis.drawing import draw
    from qapbench.analysis.explain import choose_run, explain
    from qapbench.analysis.pictures import encoded_as
    from qapbench.running.planner import Planner
    from qapbench.running.session import Session
    from qapbench.running.settings import Settings, find_device
    from qapbench.spec.spec_file import load_spec

    if picture.suffix.lower() != ".png":
        raise UserError(f"--out {picture}: the picture is a .png file")
    settings = Settings(runs, find_device(device), trust_remote_code=trust_remote_code)
    chosen = choose_run(load_spec(spec, changes or (), Planner(runs, settings.device).check), row)
    collect_as_usual()
    with progress() as report:
        explanation = explain(chosen, sample, Session(settings, report))
    picture.parent.mkdir(parents=True, exist_ok=True)
    replace_synced(picture, encoded_as("png", draw(explanation)))
    if as_json:
        typer.echo(json.dumps(explanation.to_json()))
        return
    for side in explanation.sides:
        mark = "right" if side.answer == explanation.question.truth else "wrong"
        out.print(f"{escape(side.name)}: {escape(side.answer)} ({mark})", highlight=False)
    print_notes(explanation.notes)
    out.print(f"Picture: {escape(str(picture.resolve()))}", highlight=False, soft_wrap=True)


def study_sensitivity(
    spec: SpecArgument,
    changes: SetOption = None,
    runs: RunsOption = Path("runs"),
    sample: Annotated[int, typer.Option(min=2, help="Questions with an image, drawn by the spec's seed.")] = 50,
    block: Annotated[int, typer.Option(min=1, help="Leave out squares of this side, in tokens.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Omissions per forward pass.")] = 16,
    device: DeviceOption = None,
    trust_remote_code: RemoteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which metric predicts the harm of leaving a visual token out? The leaderboard shows what lies in RUNS.

    \b
    Examples:
      qapbench study sensitivity table2 --sample 50 --runs runs
    """
    from qapbench.analysis.sensitivity import studies_of
    from qapbench.analysis.table import study_table
    from qapbench.running.planner import Planner
    from qapbench.running.session import Session
    from qapbench.running.settings import Settings, find_device
    from qapbench.spec.spec_file import load_spec

    settings = Settings(runs, find_device(device), trust_remote_code=trust_remote_code)
    studies = studies_of(
        load_spec(spec, changes or (), Planner(runs, settings.device).check), sample, block, batch_size
    )
    collect_as_usual()
    with progress() as report:
        session = Session(settings, report)
        summaries = [study.make(session) for study in studies]
    if as_json:
        typer.echo(json.dumps([summary.model_dump(mode="json") for summary in summaries]))
        return
    for summary in summaries:
        out.print(study_table(summary, out.width))
    print_notes(note for summary in summaries for note in summary.notes)
