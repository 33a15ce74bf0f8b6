"""What is known of a task without lm-eval: its documents, and what a plan has to know of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError, nearest
from qapbench.hashing import digest_file
from qapbench.records.tally import UNPARSED
from qapbench.spec.run_spec import CalibrationSpec, TaskSpec

from .registry import LETTER, TaskSource, tasks


@dataclass(frozen=True)
class TaskOutline:
    """A task as far as planning a run needs it.

    Attributes:
        name: as the spec has it, without the ending of its letter variant.
        docs: the documents of the whole data set (of the first `count` for registered tasks).
        columns: the names that `process_results` may give, in the order of the tables; without `unparsed`.
        unavailable: columns that these data cannot give, with the reason.
        embedded: one of this project's own stand-ins, whatever data it is asked on.
        asked: what the spec's task fields come to, defaults filled in: prompt, parser, how answers are made, count.
        stand_in: why these data only stand in for a real benchmark; "" where they do not.
        fingerprint: of the data, in hexadecimal where it is a file's SHA-256.
        count: questions that will be asked, `limit` considered.
        letter: answered by the most likely option, not by generated text.
        source: where a registered task comes from; None for lm-eval's, which lm-eval's version stands for.
        stored_parser: the parser for files that another code base wrote; None where the task names none.
    """

    name: str
    docs: Any
    columns: list[str]
    unavailable: dict[str, str]
    embedded: bool
    asked: dict[str, Any]
    stand_in: str
    fingerprint: str
    count: int
    letter: bool
    source: TaskSource | None = None
    stored_parser: str | None = None

    @cached_property
    def ids(self) -> list[str]:
        """The questions' ids in the order of `docs`: their `pid`, or their position where there is none."""
        return [str(doc.get("pid", index)) for index, doc in zip(range(self.count), self.docs, strict=False)]

    @property
    def code(self) -> str:
        """Hash of the task's own files; "" for a task of lm-eval's."""
        return self.source.code() if self.source else ""

    def images(self, doc: int) -> Sequence[Any]:
        """The images of a document, still encoded; a registered task keeps the one that there may be in `image`."""
        image = self.docs[doc].get("image")
        return [] if image is None else [image]


def read_outline(spec: TaskSpec, seed: int = 0) -> TaskOutline:
    """The outline of a registered task: reads its data, and not lm-eval.

    Args:
        seed: of parsers that guess where an answer cannot be read.

    Raises:
        UserError: no such task is registered, an option that it does not have, or data that cannot be read.
    """
    if spec.name not in tasks:
        raise unknown_task(spec.name, tasks.names())
    source = tasks.create(spec.name)
    metadata = source.config["metadata"]
    docs = source.read(**{**metadata, **given_options(spec, seed)})[str(source.config["test_split"])]
    return outline_of(spec, source, docs)


def given_options(spec: TaskSpec, seed: int) -> dict[str, Any]:
    """The options that a spec gives a task, which come over those of its YAML."""
    given = {**spec.model_dump(include={"data", "prompt", "parser", "limit"}), "seed": seed}
    return {key: value for key, value in given.items() if value is not None}


def outline_of(spec: TaskSpec, source: TaskSource, docs: Any) -> TaskOutline:
    """The outline of a registered task whose documents are read."""
    metadata = source.config["metadata"]
    letter = spec.answers == "letter" and source.has_letters
    count = min(spec.limit or len(docs), len(docs))
    return TaskOutline(
        name=spec.name,
        docs=docs,
        columns=[name for name in source.columns if name != UNPARSED],
        unavailable=dict(getattr(docs, "unavailable", {})),
        embedded=bool(metadata.get("embedded")),
        asked={
            "limit": count,
            "answers": "letter" if letter else "generate",
            "prompt": getattr(docs, "prompt", None),
            "parser": getattr(docs, "parser", None),
        },
        stand_in="" if spec.data else str(metadata.get("stand_in") or ""),
        fingerprint=str(docs.fingerprint),
        count=count,
        letter=letter,
        source=source,
        stored_parser=metadata.get("stored_parser"),
    )


def unknown_task(name: str, valid: Iterable[str]) -> UserError:
    """The error for a task that nobody has, with the nearest name."""
    hint = nearest(name, valid)
    if not hint.startswith("did"):
        hint += ", and lm-eval's own"
    return UserError(Problem(f"unknown task '{name}'; {hint}", ("task", "name")))


def letter_base(name: str) -> str | None:
    """The registered task that a name is the letter variant of; None where it is none's."""
    base = name.removesuffix(LETTER)
    return base if base != name and base in tasks and tasks.create(base).has_letters else None


def calibration_fingerprint(task: TaskOutline, spec: CalibrationSpec) -> str:
    """Hash of what calibration samples are drawn from: the file's content, or the version of the task's own source.

    Raises:
        UserError: there is no such file.
    """
    if spec.data:
        file = Path(spec.data).expanduser()
        if not file.is_file():
            where = ("quantize", "calibration", "data")
            raise UserError(Problem(f"{spec.data}: no such file (a parquet file of questions)", where))
        return digest_file(file)
    return getattr(task.docs, "calibration_version", "") or task.fingerprint
