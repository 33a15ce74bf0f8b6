"""Whether the files of a finished run are those that its record was made from, and how to mend them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from qapbench.errors import UserError
from qapbench.receipt import Receipt

from .answer import ScoredQuestion
from .record import SCORED, Record
from .store import ANSWERS, answers_of

RECEIPT, SPEC = "receipt.json", "spec.json"
FILES = (ANSWERS, SCORED, RECEIPT)
"""The files beside a record whose content it vouches for."""


class StoredReceipt(BaseModel):
    """A run's receipt, as it was measured at the first question.

    Attributes:
        group: hash of the quantized model that was measured (`Planned.group`).
        receipt: the receipt.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    group: str
    receipt: Receipt


def stored_receipt(path: Path) -> StoredReceipt | None:
    """The receipt in a file; None if there is none, or it is damaged."""
    try:
        return StoredReceipt.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files beside a record, by name; what is not there is left out."""
    return {name: _digest(folder / name) for name in FILES if (folder / name).is_file()}


def damage(folder: Path, record: Record, moved: bool = False) -> dict[str, str]:
    """The files of a finished run that are not as its record says: name -> what is wrong, as a phrase.

    Records of qapbench 0.2 and earlier hold no hashes. Of these runs, the content of each line is checked, and the
    number of lines.

    Args:
        folder: the run's folder.
        record: its record.
        moved: whether the folder may lack the receipt, as one that came by pull request does.
    """
    found = {}
    for name in FILES:
        path = folder / name
        if not path.exists():
            if not (moved and name == RECEIPT):
                found[name] = f"{name} is missing"
            continue
        try:
            if not path.is_file():
                found[name] = f"{name} is no file"
            elif not (_fits(path, record) if name in record.files else _LEGACY[name](folder, record)):
                found[name] = f"{name} is damaged{_where(folder) if name == ANSWERS else ''}"
        except OSError as error:
            found[name] = f"{name} cannot be read ({error.strerror})"
    return found


def _fits(path: Path, record: Record) -> bool:
    """Whether a file has the content that the record was made from.

    The answers of a stopped run may go on behind that content: another command completes it.
    """
    expected = record.files[path.name]
    if _digest(path) == expected:
        return True
    return record.stopped is not None and path.name == ANSWERS and _begins(path, expected)


def _begins(path: Path, expected: str) -> bool:
    """Whether the first lines of a file have a hash."""
    total = hashlib.sha256()
    for line in path.read_bytes().splitlines(keepends=True):
        total.update(line)
        if total.hexdigest() == expected:
            return True
    return False


def described(folder: Path, phrases: Iterable[str]) -> str:
    """One sentence that says what is damaged, and names the command that mends it."""
    return f"{folder}: {', '.join(phrases)}; {mending(folder)}"


def mending(folder: Path) -> str:
    """The command that mends a run, as a phrase."""
    runs = shlex.quote(str(folder.parent))
    if (folder / SPEC).is_file():
        return f"mend it with `qapbench run {shlex.quote(str(folder / SPEC))} --runs {runs}`"
    return f"mend it with `qapbench run SPEC --runs {runs}`, where SPEC is the spec that made it"


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _where(folder: Path) -> str:
    """The places of damaged lines of the answers in words; "" if each line by itself is intact."""
    lines = answers_of(folder).scan().damaged
    return f" in {lines_in_words(lines)}" if lines else ""


def lines_in_words(numbers: list[int], most: int = 5) -> str:
    """Numbers of lines, of which the first few are listed."""
    listed = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"line{'' if len(numbers) == 1 else 's'} {listed}{more}"


def _answers_fit(folder: Path, record: Record) -> bool:
    found = answers_of(folder).scan()
    whole = record.task is None or len({answer.place for answer in found.lines}) == record.task.questions
    return whole and not found.damaged and not found.torn


def _scores_fit(folder: Path, record: Record) -> bool:
    try:
        return len(read_scored_questions(folder)) == record.scores.unparsed.n
    except UserError:
        return False


def _receipt_fits(folder: Path, record: Record) -> bool:
    return stored_receipt(folder / RECEIPT) is not None


_LEGACY: dict[str, Callable[[Path, Record], bool]] = {
    ANSWERS: _answers_fit,
    SCORED: _scores_fit,
    RECEIPT: _receipt_fits,
}
"""How a file is checked whose hash the record does not hold."""


def read_scored_questions(folder: Path, shared: dict[str, ScoredQuestion] | None = None) -> list[ScoredQuestion]:
    """Read the scored questions in a run's folder.

    Args:
        folder: the run's folder.
        shared: lines of other runs, by their text, to which this run's are added. Of many runs on the same questions
            most lines are equal; they are then parsed once, and kept in memory once.

    Raises:
        UserError: the file is missing, or a line is not a scored question.
    """
    path = folder / SCORED
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        parsed = {} if shared is None else shared
        for line in lines:
            if line not in parsed:
                parsed[line] = ScoredQuestion.model_validate(json.loads(line))
        return [parsed[line] for line in lines]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValidationError, ValueError, RecursionError):
        raise UserError(f"{path} does not hold one scored question per line") from None
