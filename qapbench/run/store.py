"""Answers on disk: appended batch by batch, synced, and taken up again after a crash."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qapbench.errors import UserError

ANSWERS = "answers.jsonl"
Answer = dict[str, Any]


class Store:
    """The answers of one run, one JSON object a line, in the order of the plan.

    Lines hold nothing that differs between two executions (no times), so a run that was killed and taken up again
    ends with the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ANSWERS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time; a second one is told so."""
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
            if not line.endswith(b"\n"):
                break
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(answer, dict):
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
        """Write a batch and wait until it is on disk."""
        text = "".join(json.dumps(answer, sort_keys=True) + "\n" for answer in answers)
        with self.path.open("ab") as handle:
            handle.write(text.encode())
            handle.flush()
            os.fsync(handle.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole or not at all."""
    draft = path.with_suffix(path.suffix + ".tmp")
    with draft.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, sort_keys=True)
        handle.write("\n")
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
