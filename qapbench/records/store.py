"""Stores of JSON lines that are synced to disk, accept several writers, and continue after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from qapbench.errors import UserError

from .answer import Answer

ANSWERS = "answers.jsonl"


class Line(Protocol):
    """What a store can hold: a pydantic model that gives its own plain data."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...
    def to_json(self) -> dict[str, Any]: ...


L = TypeVar("L", bound=Line)


class Store(Generic[L]):
    """The lines of one run, one JSON object per line.

    While a run is made, lines are stored in the order in which they arrive, from any number of processes. `arrange`
    then puts the finished run into the order of the work. Lines hold nothing that differs between two executions, such
    as times. A run therefore ends with the same bytes, whether it ran alone, in a sweep, in parallel, or was killed and
    continued.

    Args:
        folder: the run's folder.
        line: the model of a line.
    """

    def __init__(self, folder: Path, line: type[L]) -> None:
        self.folder = folder
        self.line = line
        self.path = folder / ANSWERS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While the context is open, no other command can lock the run. Its own workers append without this lock.

        Raises:
            UserError: another process holds the lock.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._beside("lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another process is writing {self.folder}; wait for it or stop it") from None
        try:
            yield
        finally:
            lock.release()

    def _beside(self, kind: str) -> Path:
        """A file beside the run's folder. It is not inside, so that a lock stays when the folder is set aside."""
        return self.folder.with_name(f".{self.folder.name}.{kind}")

    def read(self) -> list[L]:
        """All complete lines. A line that a crash tore, or that this version cannot read, ends the list."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_bytes().splitlines(keepends=True):
            line = self._parsed(text)
            if line is None:
                break
            lines.append(line)
        return lines

    def mentioning(self, words: Iterable[str]) -> list[L]:
        """The complete lines that hold one of these texts as a JSON string. No other line is parsed."""
        if not self.path.exists():
            return []
        spelled = [json.dumps(word).encode() for word in words]
        texts = self.path.read_bytes().splitlines(keepends=True)
        found = (self._parsed(text) for text in texts if any(word in text for word in spelled))
        return [line for line in found if line is not None]

    def _parsed(self, text: bytes) -> L | None:
        """The line, or None if it is torn or cannot be read."""
        if not text.endswith(b"\n"):
            return None
        try:
            return self.line.model_validate(json.loads(text))
        except (ValidationError, ValueError):
            return None

    def count(self) -> int:
        """Number of complete lines. They are not parsed."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def keep(self, count: int) -> None:
        """Cut the file after `count` complete lines."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)[:count]
        with self.path.open("r+b") as handle:
            handle.truncate(sum(map(len, lines)))
            os.fsync(handle.fileno())

    def append(self, lines: Sequence[L]) -> None:
        """Write lines, and wait until they are on disk.

        Writers take turns. A line that a killed writer tore is cut off first.
        """
        text = "".join(map(_line, lines)).encode()
        with FileLock(self._beside("append.lock")), self.path.open("a+b") as handle:
            if end := handle.seek(0, os.SEEK_END):
                handle.seek(end - 1)
                if handle.read(1) != b"\n":
                    handle.seek(0)
                    handle.truncate(handle.read().rfind(b"\n") + 1)
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())

    def arrange(self, order: Callable[[L], Hashable], places: Iterable[Hashable]) -> list[L]:
        """Rewrite the file with one line per place, in the order of the places.

        The file is replaced whole or not at all.

        Args:
            order: gives the place of a line.
            places: the places, in order. Lines at other places are left out.

        Returns:
            The lines that are now in the file.
        """
        found: dict[Hashable, L] = {}
        for line in self.read():
            found.setdefault(order(line), line)
        lines = [found[place] for place in places if place in found]
        replace_synced(self.path, "".join(map(_line, lines)))
        return lines


def answers_of(folder: Path) -> Store[Answer]:
    """The store of a run's answers.

    Args:
        folder: the run's folder.
    """
    return Store(folder, Answer)


def _line(line: Line) -> str:
    return json.dumps(line.to_json(), sort_keys=True) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole or not at all.

    Args:
        path: the file.
        value: plain data, or a pydantic model.
    """
    data = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
    replace_synced(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Replace a file of JSON lines whole or not at all."""
    replace_synced(path, "".join(map(_line, lines)))


def replace_synced(path: Path, text: str) -> None:
    """Replace a text file whole or not at all, and wait until it is on disk."""
    draft = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(path)


def set_aside(folder: Path) -> Path | None:
    """Move a run's folder out of the way, without deleting anything.

    Returns:
        Its new path; None if there is no such folder.
    """
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    return folder.rename(target)
