"""`new`: the files of a strategy of the user's own."""

from __future__ import annotations

import json
import keyword
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal, get_args

import typer
from rich.markup import escape

from qapbench.errors import UserError, nearest
from qapbench.files import replace_all_synced

from . import completion
from .console import out

Kind = Literal["metric", "quantizer", "fusion", "pruner", "ptq", "allocation"]
TEMPLATES = Path(__file__).parent / "templates"


def new(
    kind: Annotated[str, typer.Argument(help=f"{', '.join(get_args(Kind))}.", autocompletion=completion.kinds)],
    name: Annotated[str, typer.Argument(help="Its name, which is a Python name too.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where the files are written.")] = Path(),
) -> None:
    """Write a strategy of one's own to start from: a plugin that works, a spec that uses it, and a test.

    \b
    Examples:
      qapbench new metric my_metric
      qapbench new pruner my_pruner --folder plugins
    """
    texts = _files(kind.removesuffix("s"), name)
    if there := [file for file in texts if (folder / file).exists()]:
        raise UserError(f"{folder / there[0]} is there already; choose another name or --folder")
    folder.mkdir(parents=True, exist_ok=True)
    replace_all_synced({folder / file: text for file, text in texts.items()})
    listed = " ".join(str(folder / file) for file in texts)
    out.print(escape(f"wrote {listed}"), soft_wrap=True, highlight=False)
    spec, test = folder / f"{name}.yaml", folder / f"test_{name}.py"
    out.print(escape(f"try it: qapbench run {spec}; pytest {test}"), soft_wrap=True, highlight=False)


def _files(kind: str, name: str) -> dict[str, str]:
    """Texts of the files, by their names.

    Raises:
        UserError: there is no such kind, the name is no Python name, or it is taken.
    """
    from qapbench.methods.kinds import KINDS

    if kind not in get_args(Kind):
        raise UserError(f"no template for the kind '{kind}'; {nearest(kind, get_args(Kind))}")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"'{name}' is no Python name, such as my_{kind}")
    made = {kind: name, **({"metric": f"{name}_error"} if kind == "quantizer" else {})}
    for of, own in made.items():
        if own in KINDS[of]:
            raise UserError(f"{of} '{own}' is registered already, by {KINDS[of].entry(own).origin}")
    words = {"name": name, "kind": kind, "Class": name.title().replace("_", "")}
    in_spec = _sections(kind, name, keep=32, format={"bits": 4, "group_size": 128})
    in_test = _sections(kind, name, keep=4, format={"bits": 4})  # the test's model has few tokens and narrow layers
    as_yaml = "\n".join(f"{key}: {_flow(value)}" for key, value in in_spec.items())
    as_python = "\n".join(f"    {json.dumps(key)}: {json.dumps(value)}," for key, value in in_test.items())
    return {
        f"{name}.py": _filled(kind, **words),
        f"{name}.yaml": _filled("spec", **words, sections=as_yaml),
        f"test_{name}.py": _filled("test", **words, sections=as_python),
    }


def _sections(kind: str, name: str, keep: int, format: dict[str, int]) -> dict[str, Any]:
    """The sections of a spec that use a strategy.

    Args:
        kind: kind of the strategy.
        name: its name.
        keep: budget of tokens.
        format: format of weights and activations.
    """
    quantize: dict[str, Any] = {"method": "rtn", "weights": format, "activations": format}
    prune: dict[str, Any] = {"method": "cdpruner", "keep": keep}
    if kind == "ptq":
        return {"quantize": {**quantize, "method": name}, "prune": prune}
    if kind == "allocation":
        return {"quantize": {**quantize, "allocate": name, "calibration": {"samples": 16}}, "prune": prune}
    if kind == "pruner":
        return {"quantize": quantize, "prune": {**prune, "method": name}}
    scores = {
        "metric": {"sensitivity": name},
        "quantizer": {"sensitivity": f"{name}_error"},
        "fusion": {"sensitivity": "combined", "fusion": name},
    }
    return {"quantize": quantize, "prune": {**prune, **scores[kind]}}


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(below)}' for key, below in value.items())}}}"
    return str(value)


def _filled(template: str, **words: str) -> str:
    """The text of a template."""
    return Template((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(words)
