"""Scores outputs that are already stored in a file, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError
from qapbench.records.answer import Answer
from qapbench.records.tally import Scores, tally
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.registry import TaskSource
from qapbench.tasking.scores import score
from qapbench.tasking.tasks import LoadedTask, load_task
from qapbench.visible import visible_logger

LOG = visible_logger(__name__)
SHOWN = 5  # ids that a message lists
WHERE = ("file",)


def score_file(path: str | Path, task: TaskSpec, seed: int = 0) -> Scores:
    """Score the outputs in a file.

    Three formats are read: LLaVA's result file (`{"outputs": {id: text}}`), LLaVA's answers (JSON lines with
    `question_id` and `text`), and our own (JSON lines with `id` and `answer`). If the task spec names no parser,
    LLaVA's files are read with the parser that the task names for them. If a question has several outputs, the last one
    counts.

    Args:
        path: the file of outputs.
        task: the task that was asked. Its data hold the right answers.
        seed: of parsers that guess.

    Returns:
        The scores. A question without an output counts as wrong; an output without a question is left out.

    Raises:
        UserError: the file is empty, torn or in another format, or it answers none of the task's questions.
    """
    path = Path(path)
    outputs, own = read_outputs(path)
    loaded = load_task(task.model_copy(update={"answers": "generate"}), seed)
    if not own and task.parser is None and loaded.stored_parser:
        parser = {"answers": "generate", "parser": loaded.stored_parser}
        loaded = load_task(task.model_copy(update=parser), seed)
    if loaded.letter:
        message = f"the task '{loaded.name}' compares likelihoods; there is no text to score"
        raise UserError(Problem(message, ("task", "name")))
    known = set(loaded.ids)
    strangers = [] if task.limit else [name for name in outputs if name not in known]
    if not known & outputs.keys():
        message = f"{path}: no id of the {len(outputs)} outputs is in the data ({_few(outputs)}; "
        raise UserError(Problem(f"{message}the data have {_few(loaded.ids)})", WHERE))
    if strangers and getattr(loaded.docs, "numbered", False):
        message = f"{path}: {len(strangers)} of {len(outputs)} ids are not in the data, which have no `pid` and are "
        raise UserError(Problem(f"{message}numbered by row; name data that have the column", WHERE))
    if strangers:
        LOG.warning("%s: %d outputs are not in the data: %s", path, len(strangers), _few(strangers))
    if isinstance(loaded.source, TaskSource):
        scores = tally(_rows(loaded, outputs), loaded.columns, loaded.unavailable)
    else:
        scores = _by_lm_eval(loaded, outputs, seed)
    missing = len(known - outputs.keys())
    return Scores(scores.columns, scores.unparsed, missing=missing, unknown=len(strangers))


def _by_lm_eval(loaded: LoadedTask, outputs: dict[str, str], seed: int) -> Scores:
    """The scores of a task of lm-eval's, with its own filters and aggregation functions.

    A metric that is one figure over all questions is that of the questions with an output.
    """
    repeats = int(loaded.task.get_config("repeats") or 1)
    answers = [
        Answer(task=loaded.name, doc=doc, id=name, answer=outputs[name], outputs=[outputs[name]] * repeats)
        for doc, name in enumerate(loaded.ids)
        if name in outputs
    ]
    found = score(answers, loaded, None, seed, [answer.doc for answer in answers])
    counted = [name for name in found.columns if name not in found.figures]
    missing = [dict.fromkeys(counted, 0.0)] * (len(loaded.ids) - len(answers))
    return tally([*(question.metrics for question in found.questions), *missing], found.columns, {}, found.figures)


def _rows(loaded: LoadedTask, outputs: dict[str, str]) -> Iterable[dict[str, Any]]:
    """The scores of each question of a registered task, in the order of the task."""
    for name, doc in zip(loaded.ids, loaded.docs, strict=False):
        row = loaded.task.process_results(doc, [outputs.get(name, "")])
        # A question without an output is not parsed: a parser that guesses could be right by chance.
        yield row if name in outputs else dict.fromkeys(row, 0.0)


def read_outputs(path: Path) -> tuple[dict[str, str], bool]:
    """Read a file of outputs.

    Returns:
        Question id -> text, and whether the file is in our own format.

    Raises:
        UserError: the file is empty, torn or in another format; the error names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(Problem(f"{path}: cannot be read ({reason})", WHERE)) from None
    if not text.strip():
        raise UserError(Problem(f"{path}: empty", WHERE))
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        whole, torn = None, error
    except RecursionError:
        raise UserError(Problem(f"{path}: nested too deeply", WHERE)) from None
    if isinstance(whole, dict) and "outputs" in whole:
        return _result_file(path, whole["outputs"]), False
    if whole is None and text.lstrip().startswith("{\n"):
        raise UserError(Problem(f"{path}: not complete JSON ({torn.msg})", WHERE, line=torn.lineno))
    if whole is not None and not (isinstance(whole, dict) and whole.keys() & {"id", "question_id"}):
        raise UserError(Problem(f"{path}: neither a result file with `outputs` nor JSON lines", WHERE))
    return _lines(path, text)


def _result_file(path: Path, outputs: Any) -> dict[str, str]:
    if not isinstance(outputs, dict) or not all(isinstance(value, str) for value in outputs.values()):
        raise UserError(Problem(f"{path}: `outputs` is not a map from id to text", WHERE))
    if not outputs:
        raise UserError(Problem(f"{path}: `outputs` is empty", WHERE))
    return outputs


def _lines(path: Path, text: str) -> tuple[dict[str, str], bool]:
    """The outputs of a file of JSON lines, and whether it is in our own format."""
    outputs: dict[str, str] = {}
    own = False
    # `splitlines` would also split at Unicode line separators, which JSON leaves unescaped in an answer.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{path}: not a complete JSON object ({error.msg})"
            raise UserError(Problem(message, WHERE, line=number)) from None
        name, answer, own = _record(record)
        if not isinstance(name, str | int) or not isinstance(answer, str):
            message = f"{path}: needs `id` and `answer`, or `question_id` and `text`"
            raise UserError(Problem(message, WHERE, line=number))
        outputs[str(name)] = answer
    return outputs, own


def _record(record: Any) -> tuple[Any, Any, bool]:
    if not isinstance(record, dict):
        return None, None, False
    if "question_id" in record:
        return record["question_id"], record.get("text"), False
    return record.get("id"), record.get("answer"), True


def _few(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    listed = [name for name, _ in zip(names, range(SHOWN + 1), strict=False)]
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
