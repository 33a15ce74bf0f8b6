"""Reads the results of runs: `load_records` as typed records, `results` as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qapbench.errors import UserError
from qapbench.receipt import LinearReceipt
from qapbench.visible import visible_logger

from .intact import damage, described, mending, read_scored_questions
from .record import RECORD, SCORED, NewerRecordError, Record, read_record
from .store import ANSWERS, answers_of

if TYPE_CHECKING:
    import pandas as pd

LOG = visible_logger(__name__)


def load_records(runs: str | Path = "runs", *, parts: bool = False) -> list[Record]:
    """Read every record below a folder of results, oldest first.

    A record that is damaged, or that a newer qapbench wrote, is left out with a warning that names its file. Results
    that `--fresh` set aside are not read.

    Args:
        runs: folder of the results.
        parts: whether to list also runs that serve others: those of one task that a run of several tasks consists of,
            whose scores are in the `parts` of that one record, and those on blank images, which define a stratum.
    """
    records = [record for _, record in _found(Path(runs))]
    inside = {part.run_id for record in records for part in record.parts or ()}
    inside |= {record.run_id for record in records if record.asked_blank}
    return [record for record in records if parts or record.run_id not in inside]


def _found(runs: Path) -> list[tuple[Path, Record]]:
    """The readable records below a folder and the folder of each, oldest first."""
    folders = sorted({path.parent for path in runs.glob(f"*/{RECORD}") if ".old" not in path.parent.name})
    found = []
    shared: dict[str, list[LinearReceipt]] = {}
    for folder in folders:
        try:
            found.append((folder, _sharing(read_record(folder), shared)))
        except UserError as error:
            how = "" if isinstance(error, NewerRecordError) else f"; {mending(folder)}"
            LOG.warning("left out: %s%s", "; ".join(map(str, error.problems[:3])), how)
    return sorted(found, key=lambda pair: pair[1].created)


def _sharing(record: Record, shared: dict[str, list[LinearReceipt]]) -> Record:
    """The record, with the list of linears of an earlier one if they are equal.

    The list makes up most of a record, and the runs of one quantized model have the same.

    Args:
        record: the record.
        shared: lists by their JSON, to which this record's is added.
    """
    linears = shared.setdefault(record.receipt.model_dump_json(include={"linears"}), record.receipt.linears)
    return record.model_copy(update={"receipt": record.receipt.model_copy(update={"linears": linears})})


def results(runs: str | Path | Iterable[Record] = "runs", by: Literal["run", "question"] = "run") -> pd.DataFrame:
    """The results below a folder as a table.

    Args:
        runs: folder of the results. With `by="run"`, also records.
        by: "run" gives one row per run: name, model, quantization, pruner, budget, measured tokens, the accuracy,
            interval and counts of every column, ECE and Brier's score where options have probabilities, seconds,
            receipt, and number of questions that could not be asked. "question" gives one row per question of each
            run: run_id, name, task, id, doc, answer, tokens (kept and merged, summed over its images; None without an
            image), and one column per score. A run of several tasks is there as its runs of one task each. A run whose
            answers or scores are damaged is left out with a warning.

    Raises:
        UserError: `by` is neither of them, or questions are asked for and `runs` is not a folder.
    """
    import pandas as pd

    if by == "run":
        records = load_records(runs) if isinstance(runs, str | Path) else list(runs)
        return pd.DataFrame([_row(record) for record in records])
    if by != "question":
        raise UserError(f"by='{by}': expected 'run' or 'question'")
    if not isinstance(runs, str | Path):
        raise UserError("by='question' reads the stored answers: name the folder of the results")
    rows: list[dict[str, Any]] = []
    for folder, record in _found(Path(runs)):
        if record.parts or record.asked_blank:
            continue
        try:
            rows += _questions(folder, record)
        except UserError as error:
            LOG.warning("left out: %s", error)
    return pd.DataFrame(rows)


def _row(record: Record) -> dict[str, Any]:
    spec = record.spec
    quantize, prune = (_mapping(spec.get(name)) for name in ("quantize", "prune"))
    row: dict[str, Any] = {
        "run_id": record.run_id,
        "name": record.name,
        "created": record.created,
        "model": spec.get("model"),
        "task": _task_name(record),
        "ptq": _name(quantize.get("method")),
        "weight_bits": _weight_bits(record, quantize),
        "activation_bits": _mapping(quantize.get("activations")).get("bits"),
        "pruner": record.labels.get("pruner") or _name(prune.get("method")),
        "sensitivity": record.labels.get("sensitivity") or _name(prune.get("sensitivity")),
        "fusion": record.labels.get("fusion") or _name(prune.get("fusion")),
        "keep": prune.get("keep"),
        "tokens": record.tokens.mean if record.tokens else None,
        "seed": spec.get("seed"),
    }
    for column in record.scores.columns:
        row[column.name] = column.value
        row |= {f"{column.name} {part}": getattr(column, part) for part in ("k", "n", "low", "high")}
    if confidence := record.scores.confidence:
        row |= {"ECE": confidence.ece, "Brier": confidence.brier}
    row |= {"unparsed": record.scores.unparsed.k, "seconds": record.timing.seconds}
    row |= {"receipt": record.receipt.summary, "stopped": record.stopped is not None}
    return row | {"unanswered": len(record.unanswered)}


def _task_name(record: Record) -> str | None:
    return record.task.name if record.task else _mapping(record.spec.get("task")).get("name")


def _weight_bits(record: Record, quantize: dict[str, Any]) -> float | None:
    """Bits of the weights: those of the spec, or the mean that was measured where linears have bits of their own."""
    if any(line.asked for line in record.receipt.linears):
        return record.receipt.mean_weight_bits
    return _mapping(quantize.get("weights")).get("bits")


def _mapping(value: Any) -> dict[str, Any]:
    """The value if it is a dictionary, else an empty one: a record may hold any plain data as its spec."""
    return value if isinstance(value, dict) else {}


def _name(item: Any) -> str | None:
    """Name of a registered item, from the plain data of a spec."""
    return next(iter(item), None) if isinstance(item, dict) else item


def _questions(folder: Path, record: Record) -> Iterator[dict[str, Any]]:
    """The rows of the questions of the run in a folder, which its record does not have a say in.

    Raises:
        UserError: the answers or scores are damaged.
    """
    wrong = damage(folder, record, moved=True).keys() & record.files.keys() & {ANSWERS, SCORED}
    if wrong:
        raise UserError(described(folder, [f"{name} is damaged" for name in sorted(wrong)]))
    try:
        answers = {answer.id: answer for answer in answers_of(folder).read()}
    except OSError as error:
        raise UserError(f"{folder / ANSWERS} cannot be read: {error.strerror}") from None
    for scored in read_scored_questions(folder):
        answer = answers.get(scored.id)
        images = (answer.images if answer else None) or []
        tokens = [image.available if image.kept is None else len(image.kept) + image.merged for image in images]
        yield {
            "run_id": record.run_id,
            "name": record.name,
            "task": _task_name(record),
            "id": scored.id,
            "doc": scored.doc,
            "answer": answer.answer if answer else None,
            "tokens": sum(tokens) if images else None,
            **scored.metrics,
        }
