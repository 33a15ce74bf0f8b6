"""The command `quantize`, which writes a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qapbench.errors import UserError

from .console import (
    DeviceOption,
    RemoteOption,
    RunsOption,
    SetOption,
    SpecArgument,
    collect_as_usual,
    out,
    progress,
)


def quantize(
    spec: SpecArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the checkpoint, which must not exist.")],
    changes: SetOption = None,
    row: Annotated[str | None, typer.Option(help="Which run of a sweep, by its name.")] = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Quantize the model of a spec, and write it as a checkpoint that transformers and vLLM read.

    The format is that of compressed-tensors. What it cannot express is refused.

    \b
    Examples:
      qapbench quantize spec.yaml --out my-w4a16
    """
    from qapbench.running.planner import Planner
    from qapbench.running.saving import check_saving, save_quantized
    from qapbench.running.session import Session
    from qapbench.running.settings import Settings, find_device
    from qapbench.spec.spec_file import load_spec

    settings = Settings(runs, find_device(device), trust_remote_code=trust_remote_code)
    specs = load_spec(spec, changes or (), Planner(runs, settings.device).check)
    chosen = [one for one in specs if row in (None, one.name)]
    if len(chosen) != 1:
        names = ", ".join(f"'{one.name}'" for one in specs)
        raise UserError(f"--row: name one run of the spec: {names}")
    check_saving(chosen[0], folder, settings.device)
    collect_as_usual()
    with progress() as report:
        saved = save_quantized(chosen[0], folder, Session(settings, report))
    out.print(
        f"{saved.folder}: {saved.layout}, {saved.linears} linears at {saved.bits:.3g} bits per weight, "
        f"{saved.nbytes / 1e6:,.1f} MB in all",
        highlight=False,
        soft_wrap=True,
    )
