"""Answers on disk: appended as they are made, synced, safe with several writers, taken up again after a crash."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qapbench.errors import UserError

ANSWERS = "answers.jsonl"
Answer = dict[str, Any]


class Store:
    """The answers of one run, one JSON object a line.

    While a run is made, lines stand in the order in which they came, from however many processes. `arrange` brings
    the finished run into the order of the work. Lines hold nothing that differs between two executions (no times), so
    a run ends with the same bytes whether it was alone, in a sweep, in parallel, or killed and taken up again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ANSWERS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time; a second one is told so. Its own worker processes append without this lock."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, not in it: a folder that is set aside does not take the lock away.
        with self.folder.with_name(f".{self.folder.name}.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process is writing {self.folder}; wait for it or stop it") from None
            yield

    def read(self) -> list[Answer]:
        """Every whole line. A line torn by a crash ends the list."""
        if not self.path.exists():
            return []
        answers = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            answer = _parsed(line)
            if answer is None:
                break
            answers.append(answer)
        return answers

    def keep(self, count: int) -> None:
        """Cut the file after `count` whole lines."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)[:count]
        with self.path.open("r+b") as handle:
            handle.truncate(sum(map(len, lines)))
            os.fsync(handle.fileno())

    def append(self, answers: Sequence[Answer]) -> None:
        """Write a batch and wait until it is on disk. Writers take turns; what a killed one tore is cut off first."""
        text = "".join(map(_line, answers)).encode()
        with self.path.open("a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            end = handle.seek(0, os.SEEK_END)
            if end and os.pread(handle.fileno(), 1, end - 1) != b"\n":
                handle.seek(0)
                handle.truncate(handle.read().rfind(b"\n") + 1)
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())

    def arrange(self, order: Callable[[Answer], Hashable], places: Iterable[Hashable]) -> list[Answer]:
        """Rewrite the file with one line a place, in that order, whole or not at all; other lines are left out."""
        found: dict[Hashable, Answer] = {}
        for answer in self.read():
            found.setdefault(order(answer), answer)
        answers = [found[place] for place in places if place in found]
        replace_synced(self.path, "".join(map(_line, answers)))
        return answers


def _line(answer: Answer) -> str:
    return json.dumps(answer, sort_keys=True) + "\n"


def _parsed(line: bytes) -> Answer | None:
    if not line.endswith(b"\n"):
        return None
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole or not at all."""
    replace_synced(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def replace_synced(path: Path, text: str) -> None:
    """Replace a text file whole or not at all, and wait until it is on disk."""
    draft = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(path)


def set_aside(folder: Path) -> Path | None:
    """Move a run's folder out of the way; nothing is deleted."""
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    return folder.rename(target)
