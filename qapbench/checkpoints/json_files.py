"""Reads the JSON files of checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError, first_line

SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*.safetensors.index.json",
)
"""Names of small files, all of them mappings. Libraries that load a checkpoint pass over some of them if broken."""
LARGE = ("tokenizer.json", "vocab.json")
"""Names of files that are parsed only to say why a checkpoint cannot be loaded."""


def read_mapping(file: Path, field: str = "model") -> dict[str, Any]:
    """The content of a JSON file that holds a mapping.

    Args:
        file: the file.
        field: field of the spec that names the checkpoint, for messages.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(Problem(f"{file} cannot be read: {first_line(error)}", (field,))) from error
    if not isinstance(data, dict):
        raise UserError(Problem(f"{file} is not a mapping, but {_short(data)}", (field,)))
    return data


def _short(data: Any) -> str:
    return text if len(text := json.dumps(data)) <= 40 else f"{text[:39]}…"


def check_settings(folder: Path, field: str) -> None:
    """Check that the small JSON files of a checkpoint folder hold mappings, and so do the sections of config.json.

    Files that did not change since they were checked are not read again.

    Args:
        folder: the folder.
        field: field of the spec that names the checkpoint, for messages.

    Raises:
        UserError: some do not; all of them are listed.
    """
    files = sorted(file for pattern in SETTINGS for file in folder.glob(pattern))
    _check(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files), field)


@functools.lru_cache(maxsize=256)
def _check(files: tuple[tuple[Path, int, int], ...], field: str) -> None:
    problems: list[Problem] = []
    for file, _, _ in files:
        try:
            data = read_mapping(file, field)
        except UserError as error:
            problems += error.problems
            continue
        problems += [
            Problem(f"{file}: {key} is not a mapping, but {_short(value)}", (field,))
            for key, value in data.items()
            if key.endswith("_config") and file.name == "config.json" and not isinstance(value, dict | None)
        ]
    if problems:
        raise UserError(problems)


def why_not_loaded(folder: Path, error: Exception, field: str = "model", what: str = "") -> UserError:
    """The error for a checkpoint that a library cannot load.

    Args:
        folder: the checkpoint's folder.
        error: what the library raised.
        field: field of the spec that names the checkpoint.
        what: what should have been loaded from the folder.
    """
    try:
        for name in LARGE:
            if (folder / name).is_file():
                read_mapping(folder / name, field)
    except UserError as found:
        return found
    return UserError(Problem(f"cannot load {what}{' from ' if what else ''}{folder}: {first_line(error)}", (field,)))
