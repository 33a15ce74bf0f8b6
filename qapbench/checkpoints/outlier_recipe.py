"""Embedded models that are another embedded model with outliers put in; made on first use.

A folder in `models/embedded` that holds an `outliers.json` in place of a `config.json` describes such a model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qapbench.errors import UserError
from qapbench.hashing import digest_tree
from qapbench.methods.parameters import problems_of
from qapbench.progress import ProgressCallback

from .made import made
from .outliers import Outliers, Place, layout_of, put_in

if TYPE_CHECKING:
    from .find import Checkpoint

RECIPE, DIRECTIONS, WEIGHTS = "outliers.json", "directions.safetensors", "model.safetensors"
VERSION = 1  # version of what `write` writes; increasing it leaves older cache folders unused

Tokens = Literal["visual", "text"]


class Recipe(BaseModel):
    """Content of an `outliers.json`.

    Attributes:
        base: name of the embedded model that outliers are put into.
        writer: name of the linear outside of the decoder whose outputs are tokens of the decoder.
        strength: strength if a spec gives none.
        made_by: command that found the directions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    writer: str
    strength: float
    made_by: str


class OutlierSettings(BaseModel):
    """What a spec can set of such a model.

    Attributes:
        strength: factor of the channels that carry outliers; 1 changes the basis only.
        tokens: whose outliers: those of visual tokens or those of text tokens.
        place: whether the outputs of norms or gated neurons carry them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    strength: Annotated[float, Field(ge=1, le=1e4)]
    tokens: Tokens = "visual"
    place: Place = "norms"


def with_outliers(
    folder: Path, settings: dict[str, str], find: Callable[[str], Checkpoint], field: str = "model"
) -> Path:
    """The checkpoint folder of a recipe, made unless an intact one is in the cache.

    Args:
        folder: the recipe's folder.
        settings: what the spec says of the model, by name.
        find: finds the model that outliers are put into.
        field: field of the spec that names the model, for messages.

    Raises:
        UserError: there is no such setting, or its value is not possible.
    """
    recipe = Recipe.model_validate_json((folder / RECIPE).read_text(encoding="utf-8"))
    chosen = _chosen(settings, recipe, folder.name, field)
    base = find(recipe.base).folder
    inputs = [str(VERSION), chosen.model_dump_json(), digest_tree(folder), digest_tree(base)]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    return made(folder.name, key, lambda out, report: write(folder, base, recipe, chosen, out, report))


def _chosen(settings: dict[str, str], recipe: Recipe, name: str, field: str) -> OutlierSettings:
    """The settings, validated, with defaults filled in."""
    try:
        return OutlierSettings.model_validate({"strength": recipe.strength, **settings})
    except ValidationError as error:
        raise UserError([one.under(field) for one in problems_of(error, OutlierSettings, f"'{name}'")]) from None


def write(
    folder: Path, base: Path, recipe: Recipe, chosen: OutlierSettings, out: Path, report: ProgressCallback
) -> None:
    """Write the checkpoint folder: the base model's files, with other weights in float32.

    Args:
        folder: the recipe's folder, with directions and card.
        base: checkpoint folder of the model that outliers are put into.
        recipe: the recipe.
        chosen: its settings.
        out: an existing empty folder.
        report: told about progress.
    """
    from safetensors.torch import load_file, save_file

    report(folder.name, 0, 2)
    state = load_file(base / WEIGHTS)
    found = load_file(folder / DIRECTIONS)
    outliers = Outliers(found[f"{chosen.tokens}.directions"].double(), found[f"{chosen.tokens}.neurons"])
    layout = layout_of(list(state), recipe.writer)
    new = put_in(state, layout, outliers, chosen.strength, chosen.place)
    report(folder.name, 1, 2)
    shutil.copytree(base, out, dirs_exist_ok=True)
    save_file({name: value.float() for name, value in new.items()}, out / WEIGHTS, {"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(folder / "README.md", out / "README.md")
    status = (folder / "status.txt").read_text(encoding="utf-8").strip()
    said = (
        f"{status} Here they belong to {chosen.tokens} tokens, in {chosen.place}, with strength {chosen.strength:g}.\n"
    )
    (out / "status.txt").write_text(said, encoding="utf-8")
    report(folder.name, 2, 2)
