"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path

ABANDONED = 3600  # seconds since the last write, after which nobody is writing a draft any more


def cache_folder() -> Path:
    """Folder of what is kept between runs: the one for caches of users on this system."""
    import platformdirs

    return platformdirs.user_cache_path("qapbench", appauthor=False)


def replace_synced(path: Path, content: str | bytes) -> None:
    """Replace a file whole or not at all, and wait until it is on disk.

    Raises:
        OSError: it cannot be written. The file is as it was, and no draft is left.
    """
    replace_all_synced({path: content})


def replace_all_synced(contents: Mapping[Path, str | bytes]) -> None:
    """Replace several files. All of them are on disk as drafts before the first is put in its place.

    Args:
        contents: file -> its content; text is written as UTF-8.

    Raises:
        OSError: one of them cannot be written. It names that file, and no draft is left.
    """
    drafts: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            _remove_abandoned(path)
            drafts[path] = draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            with naming(path), draft.open("wb", buffering=0) as handle:
                write_synced(handle, content.encode() if isinstance(content, str) else content)
        for path, draft in drafts.items():
            with naming(path):
                draft.replace(path)
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def replace_written(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file by one that a function writes, whole or not at all, and wait until it is on disk.

    Args:
        path: the file.
        write: writes the new content to the draft that it is given.

    Raises:
        OSError: it cannot be written. The file is as it was, and no draft is left.
    """
    _remove_abandoned(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            write(draft)
            with draft.open("rb+") as handle:
                os.fsync(handle.fileno())
            draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_synced(handle: FileIO, data: bytes) -> None:
    """Write all bytes to an unbuffered file, and wait until they are on disk."""
    left = memoryview(data)
    while left:
        left = left[handle.write(left) :]
    os.fsync(handle.fileno())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """While the context is open, an OSError names this file. By itself, that of a full disk names none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _remove_abandoned(path: Path) -> None:
    """Remove the drafts of a file that killed processes left."""
    for draft in path.parent.glob(f"{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > ABANDONED:
                draft.unlink()
