"""Stores of JSON lines that are synced to disk, accept several writers, and continue after a crash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from qapbench.errors import UserError
from qapbench.files import naming, replace_synced, write_synced

from .answer import Answer

ANSWERS = "answers.jsonl"
CHECK = re.compile(rb', "check": "([0-9a-f]{16})"\}')
"""End of a stored line: the checksum of what stands before it. Inside a JSON string, its quotes would be escaped."""


class Line(Protocol):
    """What a store can hold: a pydantic model that gives its own plain data."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...
    def to_json(self) -> dict[str, Any]: ...


L = TypeVar("L", bound=Line)


@dataclass(frozen=True)
class Scan(Generic[L]):
    """What a store holds.

    Attributes:
        lines: the intact lines, in the order of the file.
        damaged: numbers of the lines, from 1, that are damaged or that this version cannot read.
        torn: whether the file ends inside a line, as a killed writer leaves it.
    """

    lines: list[L] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    torn: bool = False


class Store(Generic[L]):
    """The lines of one run, one JSON object per line, each with a checksum.

    While a run is made, lines are stored in the order in which they arrive, from any number of processes. `arrange`
    then puts the finished run into the order of the work. Lines hold nothing that differs between two executions, such
    as times. A run therefore ends with the same bytes, whether it ran alone, in a sweep, in parallel, or was killed and
    continued.

    Nothing but `arrange` removes a line: a damaged one is skipped by readers, and only the end that a killed writer
    tore is cut off, by the next writer while it holds the lock.

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

    def _writing(self) -> FileLock:
        """The lock that every writer of the file takes."""
        return FileLock(self._beside("append.lock"))

    def read(self) -> list[L]:
        """All intact lines. Those that are torn or damaged, or that this version cannot read, are skipped."""
        return self.scan().lines

    def scan(self) -> Scan[L]:
        """All intact lines, and which lines are damaged. Empty if there is no file.

        Raises:
            OSError: the file cannot be read.
        """
        if not self.path.is_file():
            return Scan()
        *texts, rest = self.path.read_bytes().split(b"\n")
        found: Scan[L] = Scan(torn=bool(rest))
        for number, text in enumerate(texts, start=1):
            if (line := self._parsed(text)) is not None:
                found.lines.append(line)
            else:
                found.damaged.append(number)
                found.lines.extend(self._joined(text))
        return found

    def mentioning(self, words: Iterable[str]) -> list[L]:
        """The intact lines that hold one of these texts as a JSON string. No other line is parsed.

        Raises:
            OSError: the file cannot be read.
        """
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        ends: dict[int, int] = {}  # where a line begins -> where it ends
        for word in words:
            spelled = json.dumps(word).encode()
            place = data.find(spelled)
            while place >= 0:
                start, end = data.rfind(b"\n", 0, place) + 1, data.find(b"\n", place)
                ends[start] = end
                place = data.find(spelled, end) if end >= 0 else -1
        found = (self._parsed(data[start:end]) for start, end in sorted(ends.items()) if end >= 0)
        return [line for line in found if line is not None]

    def _parsed(self, text: bytes) -> L | None:
        """The line; None if it is damaged or cannot be read.

        Version 0.1 wrote no checksums. A line without one counts if it holds exactly what they wrote, so that
        no damage can make a line with a checksum look like an older one.
        """
        end = CHECK.search(text, len(text) - len(_check(b"")))
        try:
            if end is None:
                data = json.loads(text.decode())
                line = self.line.model_validate(data)
                return line if line.to_json().keys() == data.keys() else None
            body = text[: end.start()] + b"}"
            return self.line.model_validate(json.loads(body.decode())) if _check(body) == end[0] else None
        except (ValidationError, ValueError, RecursionError):
            return None

    def _joined(self, text: bytes) -> Iterator[L]:
        """The intact ones among several lines that follow each other without a line break, because it was damaged."""
        start = 0
        for end in CHECK.finditer(text):
            if (line := self._parsed(text[start : end.end()])) is not None:
                yield line
            start = end.end() + 1

    def count(self) -> int:
        """Number of complete lines. They are not parsed."""
        return self.path.read_bytes().count(b"\n") if self.path.is_file() else 0

    def append(self, lines: Sequence[L]) -> None:
        """Write lines, and wait until they are on disk.

        Writers take turns. The end of the file that a killed writer tore is cut off first.

        Raises:
            OSError: they cannot be written. None of them is then in the file.
        """
        data = b"".join(map(_checked, lines))
        with self._writing(), naming(self.path), self.path.open("a+b", buffering=0) as handle:
            end = _cut_torn(handle)
            try:
                write_synced(handle, data)
            except BaseException:
                with suppress(OSError):
                    handle.truncate(end)
                raise

    def arrange(self, order: Callable[[L], Hashable], places: Iterable[Hashable]) -> list[L]:
        """Rewrite the file with one line per place, in the order of the places.

        The file is replaced whole or not at all.

        Args:
            order: gives the place of a line.
            places: the places, in order. Lines at other places are left out.

        Returns:
            The lines that are now in the file.
        """
        with self._writing():  # what is appended meanwhile goes to the new file
            found: dict[Hashable, L] = {}
            for line in self.read():
                found.setdefault(order(line), line)
            lines = [found[place] for place in places if place in found]
            replace_synced(self.path, b"".join(map(_checked, lines)))
            return lines


def answers_of(folder: Path) -> Store[Answer]:
    """The store of a run's answers.

    Args:
        folder: the run's folder.
    """
    return Store(folder, Answer)


def _cut_torn(handle: FileIO) -> int:
    """Cut off what stands behind the last line break. The new size of the file is returned."""
    end = handle.seek(0, os.SEEK_END)
    if not end:
        return 0
    handle.seek(end - 1)
    if handle.read(1) != b"\n":
        handle.seek(0)
        end = handle.truncate(handle.readall().rfind(b"\n") + 1)
    return end


def _line(line: Line) -> str:
    return json.dumps(line.to_json(), sort_keys=True) + "\n"


def _checked(line: Line) -> bytes:
    """The line as it is stored, with its checksum."""
    body = json.dumps(line.to_json(), sort_keys=True).encode()
    return body[:-1] + _check(body) + b"\n"


def _check(body: bytes) -> bytes:
    """The end of a line, which holds the checksum of the JSON object without it."""
    return f', "check": "{checksum(body)}"}}'.encode()


def checksum(data: bytes) -> str:
    """Checksum of stored bytes: the first 16 digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


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


def set_aside(path: Path) -> Path | None:
    """Move a run's folder, or what stands in the place of one of its files, out of the way. Nothing is deleted.

    Returns:
        Its new path; None if there is nothing at `path`.
    """
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return path.rename(target)
