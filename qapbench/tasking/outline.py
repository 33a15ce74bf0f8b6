"""What planning needs to know of a task. For registered tasks it is found without importing lm-eval."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qapbench.errors import Problem, UserError, first_line, nearest
from qapbench.hashing import digest_file
from qapbench.records.tally import UNPARSED
from qapbench.spec.task_spec import TaskSpec

from .images import BlankImage, OnBackground, listed_images
from .registry import LETTER, TaskSource, tasks
from .task_file import TaskFile

if TYPE_CHECKING:
    from qapbench.spec.run_spec import CalibrationSpec


@dataclass(frozen=True)
class TaskOutline:
    """A task, as far as planning needs to know it.

    Attributes:
        name: name in the spec, without the suffix of its letter variant.
        docs: the first `count` documents of a registered task; all documents of a task of lm-eval's.
        columns: names of the metrics of `process_results`, in the order of tables, without `unparsed`.
        unavailable: column -> the reason why these data cannot give it.
        embedded: whether it is one of this project's stand-ins for a benchmark, on whatever data.
        asked: the task's options with defaults filled in: prompt, parser, way of answering, and number of questions.
        stand_in: why the data only stand in for a real benchmark; "" if they do not.
        fingerprint: hash of the data; the SHA-256 in hexadecimal if they are a file.
        count: number of questions that will be asked, `limit` taken into account.
        letter: whether questions are answered by the most likely option, not by generated text.
        source: source of a registered task, or the user's own YAML file of one; None for a task that comes with
            lm-eval, whose version identifies it.
        stored_parser: name of the parser for outputs that another code base stored; None if there is none.
        score: name of the column that is the task's score; None for the last one.
        lower: columns in which a lower value is better.
        background: the colour that transparent pixels of images are put on, `#rrggbb`; None for none.
        blank: whether questions are asked with grey images in the place of their own.
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
    source: TaskSource | TaskFile | None = None
    stored_parser: str | None = None
    score: str | None = None
    lower: frozenset[str] = frozenset()
    background: str | None = None
    blank: bool = False

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the questions in the order of `docs`: their `pid`, or their index if they have none."""
        return [str(doc.get("pid", index)) for index, doc in zip(range(self.count), self.docs, strict=False)]

    @cached_property
    def code(self) -> str:
        """Hash of the task's own files; "" for a task that comes with lm-eval."""
        return self.source.code() if self.source else ""

    def failure(self, what: str, error: Exception) -> Exception:
        """The error to raise for what a task's code raised.

        Args:
            what: what fails, such as "scoring fails".
            error: what was raised.

        Returns:
            A sentence that names the file or the plugin; the error itself if the code comes with qapbench or lm-eval.
        """
        if isinstance(error, UserError):
            return error
        if isinstance(self.source, TaskFile):
            what = f"{self.source.path}: {what}: {type(error).__name__}: {first_line(error)}"
            return UserError(Problem(what, ("task", "name")))
        plugin = self.source is not None and not self.source.module.startswith("qapbench.")
        return self.source.broken(error, f"{what}: ") if plugin and self.source else error

    def images(self, doc: int) -> Sequence[Any]:
        """Images of a document, not decoded. A document of a registered task has at most one, under `image`.

        Args:
            doc: number of the document.
        """
        image = self.docs[doc].get("image")
        return [] if image is None else [image]

    def shown(self, images: Any) -> list[Any]:
        """What a task gives for the images of a document, as the model is shown them.

        They are blank if the spec asks for that; otherwise they are on the background that it names, if it names one.
        """
        listed, background = listed_images(images), self.background
        if self.blank:
            return [BlankImage(image) for image in listed]
        return listed if background is None else [OnBackground(image, background) for image in listed]


def read_outline(spec: TaskSpec, seed: int = 0) -> TaskOutline:
    """Read the outline of a registered task, and its data. lm-eval is not imported.

    Args:
        spec: the task and its options.
        seed: of parsers that guess if an answer cannot be read.

    Raises:
        UserError: no such task is registered, it does not have one of the options, or its data cannot be read.
    """
    if spec.name not in tasks:
        raise unknown_task(spec.name, tasks.names())
    source = tasks.create(spec.name)
    source.check(spec.answers == "letter" and source.has_letters)
    return outline_of(spec, source, source.documents(given_options(spec, seed)))


def given_options(spec: TaskSpec, seed: int) -> dict[str, Any]:
    """The options that a spec sets, which override those in the task's YAML.

    Args:
        spec: the task and its options.
        seed: of parsers that guess.
    """
    given = {**spec.model_dump(include={"data", "prompt", "parser", "limit"}), "seed": seed}
    return {key: value for key, value in given.items() if value is not None}


def outline_of(spec: TaskSpec, source: TaskSource, docs: Any) -> TaskOutline:
    """The outline of a registered task whose documents were read.

    Args:
        spec: the task and its options.
        source: the task's source.
        docs: its documents.
    """
    metadata = source.config.metadata
    letter = spec.answers == "letter" and source.has_letters
    count = min(spec.limit or len(docs), len(docs))
    columns = [name for name in source.columns if name != UNPARSED]
    return TaskOutline(
        name=spec.name,
        docs=docs,
        columns=columns,
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
        score=score_column(spec, columns, columns[-1]) if columns else None,
        background=spec.background,
        blank=spec.blank_images,
    )


def score_column(spec: TaskSpec, columns: Sequence[str], usual: str) -> str | None:
    """The column that is a task's score; None for the last one.

    Args:
        spec: the task, which may name a column.
        columns: names of the task's columns.
        usual: the column if the spec names none.

    Raises:
        UserError: the task has no such column.
    """
    if spec.metric is not None and spec.metric not in columns:
        message = f"task '{spec.name}' has no metric '{spec.metric}'; {nearest(spec.metric, columns)}"
        raise UserError(Problem(message, ("task", "metric")))
    named = spec.metric or usual
    return None if named == columns[-1] else named


def unknown_task(name: str, valid: Iterable[str]) -> UserError:
    """The error for the name of a task that does not exist.

    Args:
        name: the unknown name.
        valid: names to suggest.
    """
    hint = nearest(name, valid)
    if not hint.startswith("did"):
        hint += ", and lm-eval's own"
    return UserError(Problem(f"unknown task '{name}'; {hint}", ("task", "name")))


def typo_of(name: str) -> str | None:
    """The registered task that a name is nearly, so that no index is asked for it; None if it is near none."""
    return next(iter(difflib.get_close_matches(name, tasks.names(), 1, cutoff=0.85)), None)


def letter_base(name: str) -> str | None:
    """The registered task whose letter variant has this name; None if there is none."""
    base = name.removesuffix(LETTER)
    return base if base != name and base in tasks and tasks.create(base).has_letters else None


def calibration_fingerprint(task: TaskOutline, spec: CalibrationSpec) -> str:
    """Hash of the source of calibration samples: of the file, or of the task's own questions for calibration.

    Args:
        task: the run's task.
        spec: the run's calibration.

    Raises:
        UserError: the file does not exist.
    """
    if spec.data:
        file = Path(spec.data).expanduser()
        if not file.is_file():
            where = ("quantize", "calibration", "data")
            raise UserError(Problem(f"{spec.data}: no such file (a parquet file of questions)", where))
        return digest_file(file)
    return getattr(task.docs, "calibration_version", "") or task.fingerprint
