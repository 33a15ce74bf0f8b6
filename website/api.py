"""Pages of the Python interface, and what of it lacks a docstring."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import griffe

from qapbench import HOMES

from .markdown import page

TITLES = {
    "run": ("Running and results", "Make runs, read their records, and count what a row costs."),
    "strategies": ("Writing a strategy", "Base classes, registries and decorators of the six kinds."),
    "formats": ("Number formats", "What quantizes a tensor, and how a quantized one is kept."),
    "calibration": ("Calibration", "What a PTQ method that looks at samples is written against."),
    "models": ("Models and tasks", "Families of models, formats of checkpoints, and tasks."),
}
GROUPS = {
    "compression": "run",
    "running": "run",
    "records.load": "run",
    "records.record": "run",
    "records.parts": "run",
    "spec.run_spec": "run",
    "spec.sweep_spec": "run",
    "costing.amounts": "run",
    "costing.cost": "run",
    "costing.prompt": "run",
    "errors": "run",
    "methods.kinds": "strategies",
    "methods.pruner": "strategies",
    "methods.decoder_pruner": "strategies",
    "methods.measure": "strategies",
    "methods.fusing": "strategies",
    "methods.scores": "strategies",
    "methods.tokens": "strategies",
    "methods.reads": "strategies",
    "methods.quantization": "strategies",
    "methods.plans": "strategies",
    "methods.rotation": "strategies",
    "methods.kronecker": "strategies",
    "methods.stiefel": "strategies",
    "methods.formats": "formats",
    "methods.affine": "formats",
    "methods.floating": "formats",
    "methods.normal_float": "formats",
    "methods.packed": "formats",
    "quantize.calibration": "calibration",
    "quantize.install": "calibration",
    "models.checkpoint_format": "models",
    "models.family": "models",
    "tasking.registry": "models",
}
"""The page that each public module's names stand on. A module that is missing here is an error of the build."""
NO_PROSE = {"model_config"}
"""Attributes of pydantic's that say nothing of ours."""


def pages() -> dict[str, str]:
    """Source of each page of the interface, by its path."""
    return {f"reference/api/{name}.md": _page(name) for name in TITLES}


def _page(name: str) -> str:
    title, about = TITLES[name]
    names = sorted((one for one, home in HOMES.items() if GROUPS[home] == name), key=str.lower)
    blocks = [f"::: {_target(one).path}" for one in names]
    return page(f"# {title}", f"{about} All names are imported from `qapbench`.", *blocks)


@functools.cache
def _package() -> Any:
    return griffe.load("qapbench", search_paths=[Path(__file__).parents[1]], docstring_parser="google")


def _target(name: str) -> Any:
    """What a public name stands for, where it is defined."""
    found = _package()[f"{HOMES[name]}.{name}"]
    return found.final_target if found.is_alias else found


def undocumented() -> list[str]:
    """Public names of `qapbench`, and their public members, that say nowhere what they are."""
    found = []
    for name in sorted(HOMES):
        target = _target(name)
        if not target.docstring:
            found.append(name)
        if target.is_class:
            said = _described(target)
            found += [
                f"{name}.{member.name}"
                for member in target.members.values()
                if not (member.name.startswith("_") or member.is_alias or member.name in NO_PROSE)
                and not (member.docstring or member.name in said)
            ]
    return found


def _described(target: Any) -> set[str]:
    """Names that the docstrings of a class and of its bases describe, and members that a base documents."""
    names = set()
    for owner in [target, *target.mro()]:
        sections = owner.docstring.parsed if owner.docstring else []
        names |= {
            one.name
            for section in sections
            if section.kind.value in ("attributes", "parameters")
            for one in section.value
        }
        if owner is not target:
            names |= {member.name for member in owner.members.values() if not member.is_alias and member.docstring}
    return names
