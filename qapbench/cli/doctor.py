"""`doctor`: what is installed here, what this machine has, and what would unlock more."""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from qapbench.files import cache_folder

from .console import out

State = Literal["ok", "missing", "broken"]
PACKAGE = "qapbench"
EXTRAS = {
    "torchao": "int8 W8A8 on real kernels (`backend: torchao`)",
    "compressed-tensors": "quantized checkpoints as the `model` (W4A16, W8A8, FP8, NVFP4), also those of `quantize`",
    "lmms-eval": "tasks of lmms-eval's (`from: lmms-eval`), and qapbench as a model there",
    "ray": "runs on many machines (`--engine ray`)",
    "smollm2": "the language model that training/smol trains to see",
    "docs": "the site and the notebooks (`make docs`, `make notebooks`)",
    "test": "`make test`",
}
"""What each extra of the package unlocks."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: group of the thing.
        name: the thing.
        state: "missing" is for what is optional; "broken" for what keeps something from working.
        says: the version, the place, or what is wrong and what helps.
    """

    about: str
    name: str
    state: State
    says: str


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is installed, what this machine has, where files are kept, and what missing extras would unlock.

    Exits with 1 if something that is needed is broken.

    \b
    Examples:
      qapbench doctor
      qapbench doctor --json
    """
    findings = [*_packages(), *_devices(), *_folders(), *_plugins(), *_extras()]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        table = Table("", "name", "state", "", title="qapbench doctor", title_justify="left")
        colours = {"ok": "green", "missing": "yellow", "broken": "red"}
        for place, finding in enumerate(findings):
            first = place == 0 or findings[place - 1].about != finding.about
            state = f"[{colours[finding.state]}]{finding.state}[/]"
            table.add_row(finding.about if first else "", escape(finding.name), state, escape(finding.says))
        out.print(table)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def _requirements() -> list[tuple[str, str, str | None]]:
    """Name, range and extra of each package that qapbench's metadata asks for on this machine."""
    from packaging.requirements import Requirement

    found: list[tuple[str, str, str | None]] = []
    for text in requires(PACKAGE) or []:
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            found.append((asked.name, str(asked.specifier), None))
        else:
            extras = [extra for extra in _extra_names() if asked.marker.evaluate({"extra": extra})]
            found += [(asked.name, str(asked.specifier), extra) for extra in extras]
    return found


@functools.cache
def _extra_names() -> list[str]:
    """The extras of the installed package."""
    from importlib.metadata import metadata

    return metadata(PACKAGE).get_all("Provides-Extra") or []


def _lacks(name: str, asked: str) -> str | None:
    """What is wrong with an installed package: None if its version is in the range."""
    from packaging.specifiers import SpecifierSet

    try:
        found = version(name)
    except PackageNotFoundError:
        return "not installed"
    inside = SpecifierSet(asked).contains(found, prereleases=True)
    return None if inside else f"{found} is installed, and {asked} is needed"


def _packages() -> list[Finding]:
    """The packages that are always needed."""
    found = [Finding("packages", PACKAGE, "ok", version(PACKAGE))]
    for name, asked, extra in _requirements():
        if extra is None:
            wrong = _lacks(name, asked)
            says = f"{wrong}; pip install '{name}{asked}'" if wrong else version(name)
            found.append(Finding("packages", name, "broken" if wrong else "ok", says))
    return found


def _devices() -> list[Finding]:
    """What can compute here."""
    import torch

    found = [Finding("devices", "cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    for place in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(place)
        found.append(Finding("devices", f"cuda:{place}", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        says = "none found, or this torch has no CUDA; models run on the CPU"
        found.append(Finding("devices", "cuda", "missing", says))
    return found


def _folders() -> list[Finding]:
    """Where files are kept between runs."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    own = cache_folder()
    places = {
        "qapbench's cache": (own, "assembled models and the index of lm-eval's tasks"),
        "hub's cache": (Path(HF_HUB_CACHE), "models by hub id" + ("; HF_HUB_OFFLINE is set" * bool(HF_HUB_OFFLINE))),
    }
    return [_folder(name, place, holds) for name, (place, holds) in places.items()]


def _folder(name: str, place: Path, holds: str) -> Finding:
    """Whether a folder can be written to, or made."""
    above = next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))
    if not os.access(above, os.W_OK) or not above.is_dir():
        return Finding("folders", name, "broken", f"{place} cannot be written to ({holds})")
    free = shutil.disk_usage(above).free / 2**30
    return Finding("folders", name, "ok", f"{place} ({holds}); {free:.0f} GiB free")


def _plugins() -> list[Finding]:
    """The installed packages that register something."""
    from importlib.metadata import entry_points

    from qapbench.methods.plugins import ENTRY_POINTS, broken_plugins, load_plugins

    load_plugins()
    broken = broken_plugins()
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return [
        Finding("plugins", point.name, "broken", broken[point.name])
        if point.name in broken
        else Finding("plugins", point.name, "ok", point.value)
        for point in points
    ]


def _extras() -> list[Finding]:
    """What is optional."""
    found, every = [], _requirements()
    for extra in _extra_names():
        asked = [(name, asked) for name, asked, owner in every if owner == extra]
        lacking = [name for name, wanted in asked if _lacks(name, wanted)]
        unlocks = EXTRAS.get(extra, "")
        if lacking:
            says = f"{unlocks}; lacks {', '.join(lacking)}: pip install '{PACKAGE}[{extra}]'"
            found.append(Finding("extras", extra, "missing", says))
        else:
            found.append(Finding("extras", extra, "ok", unlocks))
    return found
