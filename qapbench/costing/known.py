"""Finds the model whose cost is asked: a loaded one, a config, or a name; without any weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qapbench.checkpoints.find import embedded_names, find_checkpoint
from qapbench.checkpoints.json_files import read_mapping
from qapbench.errors import Problem, UserError, first_line, nearest
from qapbench.models import Family, family_of
from qapbench.models.checkpoint_format import format_of
from qapbench.models.family import default_tower, family_class
from qapbench.models.relevance import find_tower

from .selection import TextTowerShape

CONFIG = "config.json"


@dataclass(frozen=True)
class CostedModel:
    """A model as far as its cost is concerned.

    Attributes:
        name: its name.
        family: the model, whose weights may be on the "meta" device.
        text_tower: the text tower of its joint image-text space; None if there is none.
    """

    name: str
    family: Family
    text_tower: TextTowerShape | None = None


def known_configs() -> dict[str, dict[str, Any]]:
    """The well-known checkpoints whose configs come with the package: name -> content of its file.

    A file has the hub ids of the checkpoint, the CLIP whose text tower belongs to it, and what of its config.json its
    cost depends on.
    """
    return _data("configs")


def _data(folder: str) -> dict[str, dict[str, Any]]:
    found = (files(__package__) / folder).iterdir()
    listed = sorted((file for file in found if file.name.endswith(".json")), key=lambda file: file.name)
    return {file.name.removesuffix(".json"): json.loads(file.read_text("utf-8")) for file in listed}


def costed_model(given: Any, dtype: str = "auto", named_tower: str | None = None) -> CostedModel:
    """The model whose cost is asked.

    Args:
        given: a loaded model; a config, as a mapping or as transformers has it; the name of a well-known checkpoint
            (`known_configs`) or its hub id; an embedded model, a checkpoint folder, or a hub id in the local cache.
        dtype: name of the dtype of the weights; "auto" is the config's own.
        named_tower: text tower that a spec names.

    Raises:
        UserError: there is no such model, or no family is registered for it.
    """
    if isinstance(given, nn.Module):
        family = family_of(given)
        config, folder = family.model.config.to_dict(), str(family.model.name_or_path)
        return CostedModel(folder or type(given).__name__, family, _tower(family, named_tower, folder, config))
    if not isinstance(given, str | Path):
        config = dict(given) if isinstance(given, Mapping) else given.to_dict()
        family = without_weights(config, dtype)
        return CostedModel(str(config.get("model_type")), family, _tower(family, named_tower, "", config))
    name, known = str(given), known_configs()
    for key, content in known.items():
        if name == key or name in content["hub"]:
            family = without_weights(content["config"], dtype)
            tower = _data("text_towers").get(str(content["text_tower"]))
            shape = TextTowerShape.of(tower) if tower and named_tower is None else None
            return CostedModel(key, family, shape or _tower(family, named_tower, "", content["config"]))
    place = _folder(name, known)
    config = read_mapping(place / CONFIG)
    layout = format_of(config)
    if layout is None:
        family = without_weights(config, dtype)
    else:
        family = family_of(layout(place, config).empty(_dtype(config, dtype)).eval())
    return CostedModel(name, family, _tower(family, named_tower, str(place), config))


def _folder(name: str, known: Mapping[str, Any]) -> Path:
    """The folder of a checkpoint, of which only the config is read.

    Raises:
        UserError: there is none.
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return folder
    if name.count("/") == 1 or name in embedded_names():
        return find_checkpoint(name, fetch=False).folder
    raise UserError(Problem(f"no model or folder '{name}'; {nearest(name, [*known, *embedded_names()])}", ("model",)))


def _tower(family: Family, named: str | None, folder: str, config: Mapping[str, Any]) -> TextTowerShape | None:
    """The text tower that a run of this model would read, found on this machine or among the known ones."""
    if family.clip_width is None:
        return None
    default = default_tower(config)
    found, _ = find_tower(named, folder, default, False)
    if found is not None:
        return TextTowerShape.of(read_mapping(found / CONFIG))
    tower = next((one for one in _data("text_towers").values() if one["hub"] == default), None)
    return TextTowerShape.of(tower) if tower else None


def without_weights(config: Mapping[str, Any], dtype: str = "auto") -> Family:
    """A model on the "meta" device, which has shapes and no values.

    Args:
        config: content of a config.json.
        dtype: name of the dtype of the weights; "auto" is the config's own, and float32 if it names none.

    Raises:
        UserError: no family is registered for it, or the config is not complete.
    """
    if format_of(config):
        what = "its layout is that of its authors, whose config lacks the vision tower; name the checkpoint's folder"
        raise UserError(Problem(what, ("model",)))
    family_class(str(config.get("model_type")))
    return _built(json.dumps(config, sort_keys=True, default=str), _dtype(config, dtype))


def _dtype(config: Mapping[str, Any], asked: str) -> str:
    """Name of the dtype of the weights; the config's own for "auto", and float32 if it names none."""
    named = config.get("dtype") or config.get("torch_dtype") or "float32" if asked == "auto" else asked
    return str(named).removeprefix("torch.")


@functools.lru_cache(maxsize=4)
def _built(config: str, dtype: str) -> Family:
    from transformers import AutoConfig, AutoModelForImageTextToText

    content: dict[str, Any] = json.loads(config)
    try:
        full = AutoConfig.for_model(**content)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(full, dtype=getattr(torch, dtype))
    except Exception as error:  # ValueError, KeyError, TypeError and errors of transformers' own: no common base
        raise UserError(Problem(f"its config makes no model: {first_line(error)}", ("model",))) from error
    return family_of(model.eval())
