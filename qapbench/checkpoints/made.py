"""The user's cache folder of checkpoints that recipes describe, each made once and checked by hash."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from qapbench import files
from qapbench.bars import shown
from qapbench.hashing import digest_file, state_of_tree
from qapbench.progress import ProgressCallback, assembly_progress, silent
from qapbench.visible import visible_logger

MANIFEST = "manifest.json"
log = visible_logger(__name__)


def cache_folder() -> Path:
    """Folder that holds the checkpoints."""
    return files.cache_folder() / "assembled"


def made(name: str, key: str, build: Callable[[Path, ProgressCallback], None]) -> Path:
    """Make a checkpoint folder, unless an intact one is in the cache.

    Args:
        name: the model's name, as the folder's name begins.
        key: hash of everything that the checkpoint is made of.
        build: writes the checkpoint into an existing empty folder, and tells a callback about its progress. It is only
            called if there is no intact folder.

    Returns:
        The checkpoint folder.
    """
    target = cache_folder() / f"{name}-{key}"
    if target.is_dir():
        if not (broken := broken_file(target)):
            return target
        log.warning("%s: %s is not what was written; made anew", target, broken)
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    try:
        with shown() if assembly_progress.get() is None else contextlib.nullcontext():
            build(new, assembly_progress.get() or silent)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        manifest = {path.relative_to(new).as_posix(): digest_file(path) for path in files}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        new.chmod(0o755)
        try:
            new.rename(target)
        except OSError:
            if broken_file(target):  # if it is intact, another process was faster and wrote the same content
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target


def broken_file(folder: Path) -> str:
    """The first file of a folder that differs from the manifest; "" if there is none. Read again when it changed."""
    return _broken_file(folder, state_of_tree(folder))


@functools.lru_cache(maxsize=64)
def _broken_file(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return MANIFEST
    if not isinstance(manifest, dict):
        return MANIFEST
    for name, digest in manifest.items():
        if not (folder / name).is_file() or digest_file(folder / name) != digest:
            return name
    return ""
