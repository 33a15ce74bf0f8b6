"""A task of lmms-eval's as one of lm-eval's, so that everything asks and scores it like any other task.

lmms-eval's own functions write the prompts, find the pictures, read the answers and aggregate the scores.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import random
import socket
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import ConfigurableTask

from qapbench.errors import Problem, UserError, first_line

from .lmms_data import DataSource, hub_error
from .lmms_index import INSTALL, LIGHT, NAME, LmmsTaskFile
from .lmms_pictures import Picture, Pictures
from .lmms_requests import generation, marked

SUBMISSION = "submission"  # lmms-eval's name of a metric that only writes a file for an evaluation server
TRIED = 16  # questions that are looked at to find the metric that all belong to
OUTPUTS = ("generate_until", "multiple_choice")


class NetworkError(BaseException):
    """A function of a task wants to ask a service. No handler of theirs for exceptions catches it."""


class JudgedError(UserError):
    """A task has its answers judged by a service on the network."""


class Document(dict[str, Any]):
    """A document without its pictures.

    Attributes:
        place: split and number, by which its pictures are found.
    """

    place: tuple[str, int]


class Score(float):
    """The score of one question, with what lmms-eval's aggregation reads of it.

    Attributes:
        item: what the task's `process_results` gave for the metric.
    """

    item: Any


class Documents(Sequence[Document]):
    """The documents of one split, as lm-eval iterates over them.

    Args:
        task: lmms-eval's task.
        split: name of the split.
    """

    def __init__(self, task: Any, split: str) -> None:
        self.task = task
        self.split = split
        self.plain = task.dataset_no_image[split]
        self.features = self.plain.features
        with_media = task.dataset[split]
        self.pictures = Pictures(task.config.task, lambda index: task.doc_to_visual(with_media[index]))

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        doc = Document(self.plain[index])
        doc.place = self.split, index
        doc["relevance_text"] = context(self.task, doc)
        return doc


def context(task: Any, doc: dict[str, Any]) -> str:
    """The text that lmms-eval gives a model for a document: description, examples and question.

    Args:
        task: lmms-eval's task.
        doc: the document.
    """
    return str(task.fewshot_context(doc, task.config.num_fewshot or 0))


def load_lmms_task(found: LmmsTaskFile, data: str | dict[str, str] | None) -> tuple[ConfigurableTask, str, str | None]:
    """Load a task of lmms-eval's.

    Args:
        found: the task's file.
        data: where its data are; None asks the hub.

    Returns:
        (the task as lm-eval's, hash of its data, the metric that is its score or None for the first one)

    Raises:
        UserError: it cannot be loaded, its data are missing, or it is of a kind that cannot be asked.
    """
    _refuse(found.name, found.entries())
    try:
        with _silent():
            from lmms_eval.api.task import ConfigurableTask as LmmsTask
            from lmms_eval.utils import load_yaml_config
    except ImportError as error:
        message = f"lmms-eval cannot be imported: {first_line(error)}; its tasks need this: {LIGHT}"
        raise UserError(Problem(message, NAME)) from None

    class Loaded(LmmsTask):
        """Without lmms-eval's repeated attempts: what is missing does not appear by waiting."""

        download = getattr(LmmsTask.download, "__wrapped__", LmmsTask.download)

    source: DataSource | None = None
    path = ""
    try:
        with _silent():
            config = load_yaml_config(str(found.path), mode="full")
            path = str(config.get("dataset_path"))
            splits = [
                str(config[key]) for key in ("test_split", "validation_split", "training_split") if config.get(key)
            ]
            source = DataSource(data, list(dict.fromkeys(name.strip() for name in splits)))
            with source.serving():
                task = Loaded(config=config)
    except UserError:
        raise
    except Exception as error:  # of lmms-eval, datasets, the hub, and the task's functions: no common base
        if data is None and source is not None and isinstance(error, OSError):  # so are those of datasets and the hub
            raise hub_error(path, error) from None
        message = f"lmms-eval cannot load '{found.name}': {type(error).__name__}: {first_line(error)}"
        hint = f"; {INSTALL} brings what its tasks need" if isinstance(error, ImportError) else ""
        raise UserError(Problem(message + hint, NAME)) from None
    made = _as_lm_eval(found.name, task)
    return made, source.fingerprint, _overall(made)


def _refuse(name: str, config: dict[str, Any]) -> None:
    """Check that a task can be asked.

    Raises:
        UserError: it is of another kind, asks about videos, or has no score.
    """
    kind = config.get("output_type", "generate_until")
    if kind not in OUTPUTS:
        raise UserError(Problem(f"'{name}' is of the kind {kind}; what can be asked is {' or '.join(OUTPUTS)}", NAME))
    if (config.get("dataset_kwargs") or {}).get("video"):
        raise UserError(Problem(f"'{name}' asks about videos; what can be asked about is pictures", NAME))
    metrics = config.get("metric_list")
    if metrics is not None and all(metric.get("metric") == SUBMISSION for metric in metrics):
        raise UserError(Problem(f"'{name}' has no score, only answers to be handed in at an evaluation server", NAME))


def _as_lm_eval(name: str, task: Any) -> ConfigurableTask:
    """lm-eval's task whose functions are those of lmms-eval's task."""
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    training = task.config.training_split if task.config.training_split in task.dataset else None
    documents = {part: Documents(task, part) for part in (split, training) if part is not None}

    def pictures(doc: Document) -> list[Picture]:
        part, index = doc.place
        return documents[part].pictures.of(index)

    def text(doc: Document) -> str:
        shown = len(pictures(doc)) if task.config.doc_to_visual is not None else 0
        return marked(doc["relevance_text"], shown)

    choices = task.OUTPUT_TYPE == "multiple_choice"
    config = {
        "task": name,
        "custom_dataset": lambda **_: documents,
        "test_split": split,
        "training_split": training,
        "output_type": task.OUTPUT_TYPE,
        "doc_to_text": text,
        "doc_to_image": pictures if task.config.doc_to_visual is not None else None,
        "doc_to_target": _on_document(task.doc_to_target),
        "doc_to_choice": _on_document(task.doc_to_choice) if choices else None,
        "process_results": functools.partial(_scores, task),
        "metric_list": [
            {"metric": metric, "aggregation": _aggregation(task, total), "higher_is_better": better}
            for metric, total in task.aggregation().items()
            if metric != SUBMISSION
            for better in [task.higher_is_better().get(metric, True)]
        ],
        "generation_kwargs": None if choices else generation(task.config.generation_kwargs),
        "target_delimiter": task.config.target_delimiter,
        "repeats": task.config.repeats,
        "num_fewshot": 0,  # lmms-eval's context has the examples already
    }
    made = ConfigurableTask(config=config)
    made._filters = [_Filter(ensemble, task) for ensemble in task._filters]
    return made


def _on_document(function: Callable[[dict[str, Any]], Any]) -> Callable[[Document], Any]:
    """A function of lmms-eval's, given a document as lmms-eval has it."""
    return lambda doc: function(_plain(doc))


def _plain(doc: Document) -> dict[str, Any]:
    return {key: value for key, value in doc.items() if key != "relevance_text"}


@dataclass
class _Filter:
    """lmms-eval's filters, called as lm-eval calls its own."""

    ensemble: Any
    task: Any

    def apply(self, instances: list[Any]) -> None:
        self.ensemble.apply(instances, self.task.task_docs)


# -- scoring --


def _scores(task: Any, doc: Document, results: Sequence[Any]) -> dict[str, Score | _Unscored]:
    """The score of a question in each of the task's metrics that it belongs to, by lmms-eval's `process_results`."""
    if task.OUTPUT_TYPE == "multiple_choice":
        # lmms-eval takes the smallest: its models answer with a loss, not with a log-likelihood.
        results = [(-likelihood, greedy) for likelihood, greedy in results]
    process = getattr(type(task).process_results, "__wrapped__", type(task).process_results)  # without its retries
    extra = {"full_docs": task.task_docs} if task.config.full_docs else {}
    with _guarded(task):
        found = process(task, _plain(doc), list(results), **extra)
        totals = task.aggregation()
        return {
            metric: _score(task, item, totals[metric])
            for metric, item in found.items()
            if metric in totals and metric != SUBMISSION
        }


def _score(task: Any, item: Any, total: Callable[..., Any]) -> Score | _Unscored:
    """What lmms-eval has of a question for one metric, as a number where it has one.

    That is the number itself, the entry that the task declares as its score, or the aggregation over this question.
    """
    value: Any = item.get(task.config.score_key) if isinstance(item, dict) else item
    if not _is_number(value):
        try:
            value = _aggregated(total, [item])
        except Exception:  # an aggregation that needs more than one question
            return _Unscored(item)
    if not _is_number(value):
        return _Unscored(item)
    score = Score(value)
    score.item = item
    return score


@dataclass
class _Unscored:
    """What a metric has of a question that is no number by itself."""

    item: Any

    def tolist(self) -> None:
        """The number that is stored of it: none."""


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and math.isfinite(value)) or (hasattr(value, "dtype") and value.ndim == 0)


def _aggregation(task: Any, total: Callable[..., Any]) -> Callable[[Sequence[Any]], Any]:
    """An aggregation of lmms-eval's over what `_scores` gives."""

    @functools.wraps(total)
    def aggregate(scores: Sequence[Any]) -> Any:
        with _guarded(task):
            return _aggregated(total, [score.item for score in scores])

    return aggregate


def _aggregated(total: Callable[..., Any], items: list[Any]) -> Any:
    """Call an aggregation, whose files (some write one for an evaluation server) go to a folder that is deleted."""
    import inspect

    if "args" not in inspect.signature(total).parameters:
        return total(items)
    with tempfile.TemporaryDirectory() as folder:
        return total(items, args=Namespace(output_path=folder))


def _overall(task: ConfigurableTask) -> str | None:
    """The first metric that every question belongs to; None if there is none.

    An answer that no rule can read is scored for questions from all over the data. So it also comes to light, before
    any question is asked, whether the answers are judged by a service.

    Raises:
        JudgedError: they are.
    """
    if task.OUTPUT_TYPE != "generate_until":
        return None
    docs, common = task.eval_docs, list(task.aggregation())
    try:
        for at in range(0, len(docs), max(1, len(docs) // TRIED)):
            scores = task.process_results(docs[at], ["?"])
            common = [metric for metric in common if metric in scores]
        for metric, score in scores.items():
            task.aggregation()[metric]([score])
    except JudgedError:
        raise
    except Exception:  # one question may be too few to be scored: scoring the run will say so
        return common[0] if 0 < len(common) < len(task.aggregation()) else None
    return common[0] if common else None


@contextlib.contextmanager
def _guarded(task: Any) -> Iterator[None]:
    """While the context is open, run functions of a task in silence, without a network, from one seed.

    Raises:
        JudgedError: a function asks a service.
    """
    resolve, state = socket.getaddrinfo, random.getstate()

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        raise NetworkError(host)

    socket.getaddrinfo = refuse
    random.seed(0)
    try:
        with _silent(), contextlib.redirect_stdout(io.StringIO()):
            yield
    except NetworkError as error:
        message = (
            f"'{task.config.task}' has its answers judged by a service on the network ({error}), which a run never "
            "asks; take a task that scores by rules"
        )
        raise JudgedError(Problem(message, NAME)) from None
    finally:
        socket.getaddrinfo = resolve
        random.setstate(state)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """While the context is open, lmms-eval logs nothing. Errors are raised, not logged."""
    try:
        from loguru import logger
    except ImportError:  # the import of lmms-eval will say so
        yield
        return
    logger.disable("")
    try:
        yield
    finally:
        logger.enable("")
