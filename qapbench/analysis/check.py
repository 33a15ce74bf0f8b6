"""`qapbench leaderboard --check`: verifies that a record follows from the answers stored beside it.

It is meant for records that arrive by pull request, so nothing that a record names is run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qapbench.checkpoints.find import is_embedded
from qapbench.errors import Problem, UserError
from qapbench.receipt import Receipt
from qapbench.records.answer import Answer
from qapbench.records.intact import damage, lines_in_words, read_scored_questions
from qapbench.records.parts import ColumnScore, Unanswered
from qapbench.records.record import MOST, SCHEMA, SCORED, Record, read_record
from qapbench.records.store import ANSWERS, answers_of
from qapbench.records.tally import tally
from qapbench.running.notes import labels
from qapbench.running.refusals import most
from qapbench.running.several import joined
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.registry import own_tasks
from qapbench.tasking.tasks import LoadedTask, load_task

TOLERANCE = 1e-9
JOINED = ("run_id", "scores", "parts", "tokens", "fingerprints", "labels", "notes")
"""What of the record of several tasks follows from those of one task each."""
RUN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass
class CheckResult:
    """The result of a check that found no mismatch.

    Attributes:
        passed: what was verified, one sentence each.
        notes: the record's notes, which a reader of its numbers should know.
    """

    passed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"ok": True, "passed": self.passed, "notes": self.notes}


def check_record(path: Path, data: str | None = None) -> CheckResult:
    """Verify a record against the answers and scores that are stored beside it.

    No code that the record names is run: a spec with plugins is refused, and only tasks that come with this project are
    loaded.

    Args:
        path: record.json, or the folder that holds it.
        data: file of the task's data, if the path that the record names is not on this machine.

    Raises:
        UserError: the record does not match its answers. Every mismatch found is listed, up to a limit.
    """
    folder = path if path.is_dir() else path.parent
    record = read_record(path)
    if record.parts:
        return _check_several(record, folder, data)
    if not RUN_ID.fullmatch(record.run_id):
        raise UserError(Problem(f"expected 16 hexadecimal digits, got '{record.run_id[:40]}'", ("record", "run_id")))
    report = CheckResult([f"schema {SCHEMA}"])
    spec = _spec(record, data)
    task = load_task(spec.task, spec.seed)
    stored = answers_of(folder).scan()
    answers = stored.lines
    problems = [
        *(damage(folder, record, moved=True).values() if record.files else ()),
        *_check_identity(record, spec, task, folder),
        *([f"{ANSWERS} is damaged in {lines_in_words(stored.damaged)}"] if stored.damaged else ()),
        *_check_answers(answers, task, folder, record.unanswered),
    ]
    if not problems:
        report.passed += [f"run id follows from spec, data and fingerprints ({record.run_id})"]
        which = f"; {len(record.unanswered)} could not be asked" if record.unanswered else ""
        report.passed += [f"{len(answers)} stored answers, one for each question{which}"]
        problems += _check_scores(record, task, answers, folder)
        problems += _check_receipt(record, spec, answers)
    if problems:
        more = [f"and {len(problems) - MOST} more"] if len(problems) > MOST else []
        raise UserError([Problem(f"{path}: {what}") for what in (*problems[:MOST], *more)])
    report.passed += ["counts of every column are those of the stored answers", f"receipt: {record.receipt.summary}"]
    report.notes += record.notes
    return report


def _check_several(record: Record, folder: Path, data: str | None) -> CheckResult:
    """Verify the record of a run of several tasks: that those of one task each are right, and it follows from them."""
    report, problems, own = CheckResult(), list[Problem](), list[Record]()
    for part in record.parts or ():
        if not RUN_ID.fullmatch(part.run_id):
            raise UserError(Problem(f"expected 16 hexadecimal digits, got '{part.run_id[:40]}'", ("record", "parts")))
        place = folder.resolve().parent / part.run_id
        try:
            found = check_record(place, data)
            report.passed += [f"{part.label}: {line}" for line in found.passed]
            own.append(read_record(place))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    listed = record.spec.get("task")
    specs = [{**part.spec, "task": listed, "name": record.name} for part in own]
    made = joined(RunSpec.parse(specs[0]), [_spec(part, data) for part in own], own)
    differing = [name for name in JOINED if getattr(record, name) != getattr(made, name)]
    if differing:
        raise UserError([Problem(f"{folder}: {name} does not follow from the runs of its tasks") for name in differing])
    if folder.resolve().name != record.run_id:
        raise UserError(Problem(f"{folder}: the folder must be named by the run's id, {record.run_id}"))
    report.passed.append("the scores by task are those of the runs of one task each")
    report.notes += record.notes
    return report


def _spec(record: Record, data: str | None) -> RunSpec:
    """The record's spec, parsed without running anything that it names.

    Args:
        data: path of the task's data that replaces the record's own.
    """
    raw = dict(record.spec)
    if raw.get("plugins"):
        raise UserError(
            "record.spec.plugins: a record with plugin files cannot be verified; add the strategy here first"
        )
    asked = raw.get("task")
    elsewhere = isinstance(asked, dict) and (asked.get("from") or asked.get("include_path"))
    if not isinstance(asked, dict) or elsewhere or asked.get("name") not in own_tasks():
        raise UserError(f"record.spec.task: only {', '.join(sorted(own_tasks()))} can be verified")
    if data is not None:
        raw["task"] = {**asked, "data": data}
    elif asked.get("data") and not Path(str(asked["data"])).is_file():
        raise UserError(f"record.spec.task.data: '{asked['data']}' is not on this machine; name the file with --data")
    return RunSpec.parse(raw)


def _check_identity(record: Record, spec: RunSpec, task: LoadedTask, folder: Path) -> list[str]:
    """Mismatches between the record's id, labels and notes and what its spec and data come to."""
    problems = []
    if task.fingerprint != record.fingerprints.get("data"):
        problems.append("fingerprints.data is not that of the data here: the questions differ")
    if spec.digest(record.fingerprints, task.asked) != record.run_id:
        problems.append("run_id does not follow from spec and fingerprints: something was changed, or the data differ")
    if record.labels and record.labels != labels(spec):
        problems.append("labels are not those of the spec")
    standing_in = bool(task.stand_in) or is_embedded(spec.model)
    if standing_in and not any("stand-in" in note.lower() for note in record.notes):
        problems.append("notes: the model or the data are an embedded stand-in, and no note says so")
    if folder.resolve().name != record.run_id:
        problems.append(f"the folder must be named by the run's id, {record.run_id}")
    return problems


def _check_answers(answers: list[Answer], task: LoadedTask, folder: Path, unanswered: list[Unanswered]) -> list[str]:
    """Whether the stored answers cover each question of the task exactly once, under the id that the data give it.

    Args:
        answers: the stored answers.
        task: the task.
        folder: the run's folder.
        unanswered: the questions that the record says could not be asked.
    """
    if not answers:
        return [f"{ANSWERS} is missing or empty in {folder}"]
    told = [one.doc for one in unanswered]
    if sorted([*told, *(answer.doc for answer in answers)]) != list(range(task.count)):
        return [f"{ANSWERS} does not answer each of the {task.count} questions once"]
    if len(unanswered) > most(task.count):
        return [f"unanswered: {len(unanswered)} questions, where a run may leave out {most(task.count)}"]
    if any(not task.images(doc) for doc in told):
        return ["unanswered: a question without an image can be asked of every model"]
    named: list[tuple[str, int, str]] = [(ANSWERS, one.doc, one.id) for one in answers]
    named += [("unanswered", one.doc, one.id) for one in unanswered]
    wrong = [
        f"{where}: question {doc} has another id in the data" for where, doc, name in named if name != task.ids[doc]
    ]
    return wrong[:1]


def _check_scores(record: Record, task: LoadedTask, answers: list[Answer], folder: Path) -> list[str]:
    """Score every stored answer again, in the form in which lm-eval hands it to the task, and compare the counts."""
    rows = {}
    for answer in answers:
        try:
            outputs = [output if isinstance(output, str) else tuple(output) for output in answer.outputs]
            rows[answer.doc] = task.task.process_results(task.docs[answer.doc], outputs)
        except (TypeError, ValueError, IndexError):
            return [f"{ANSWERS}: the outputs of '{answer.id}' cannot be scored"]
    scores = tally((rows[doc] for doc in sorted(rows)), task.columns, task.unavailable).to_json()
    given = {column.name: column for column in record.scores.columns}
    problems = []
    for column in scores["columns"]:
        mine = given.pop(column["name"], None)
        if mine is None:
            problems.append(f"scores: column {column['name']} is missing")
        elif (mine.k, mine.n) != (column.get("k"), column.get("n")) and "k" in column:
            counts = f"{mine.k} of {mine.n}, the stored answers give {column['k']} of {column['n']}"
            problems.append(f"scores: {column['name']} says {counts}")
        elif "k" in column:
            problems += _check_derived(mine, column)
    problems += [f"scores: the task has no column {name}" for name in given]
    unparsed = record.scores.unparsed
    if (unparsed.k, unparsed.n) != (scores["unparsed"]["k"], scores["unparsed"]["n"]):
        problems.append(f"scores: unparsed says {unparsed.k}, the stored answers give {scores['unparsed']['k']}")
    return problems + _check_scored(rows, task, folder)


def _check_derived(mine: ColumnScore, column: dict[str, Any]) -> list[str]:
    """Whether accuracy and interval of a column follow from its counts.

    Args:
        mine: the column as the record has it.
        column: the same column, computed from the stored answers.
    """
    names = [name for name in ("accuracy", "low", "high") if getattr(mine, name) is not None]
    off = [name for name in names if not _close(getattr(mine, name), column[name])]
    return [f"scores: {mine.name}.{name} does not follow from k and n" for name in off]


def _check_scored(rows: dict[int, dict[str, Any]], task: LoadedTask, folder: Path) -> list[str]:
    """Whether scored.jsonl, which paired comparisons read, holds the same scores."""
    if not (folder / SCORED).exists():
        return [f"{SCORED} is missing"]
    try:
        stored = {scored.id: scored.metrics for scored in read_scored_questions(folder)}
    except UserError as error:
        return [str(error)]
    names = (*task.columns, "unparsed")
    expected = {task.ids[doc]: {n: row[n] for n in names if n in row} for doc, row in rows.items()}
    return [] if stored == expected else [f"{SCORED} does not hold the scores of the stored answers"]


def _check_receipt(record: Record, spec: RunSpec, answers: list[Answer]) -> list[str]:
    """Whether the receipt shows what the spec asks for, and its token counts are those of the stored answers."""
    problems = []
    planned = [line for line in record.receipt.linears if line.planned]
    if spec.quantize:
        if not planned:
            problems.append("receipt: the spec quantizes, the receipt names no linear")
        for side, what in enumerate(("weights", "activations")):
            wanted = [(line, spec.quantize.formats_of(line.name).bits[side]) for line in planned]
            if spec.quantize.allocate:
                wanted = [(line, (line.asked or (16, 16))[side]) for line in planned]
            asked = [(line, bits) for line, bits in wanted if bits < 16]
            reached = [
                ((line.weight_bits, line.activation_bits)[side], bits) for line, bits in asked if line.calls or not side
            ]
            if asked and (not reached or any(got is None or got > bits for got, bits in reached)):
                problems.append(f"receipt: {what} of some linear did not reach {max(b for _, b in asked)} bits")
        if spec.quantize.kv and (record.receipt.kv is None or not record.receipt.kv.tokens):
            problems.append("receipt: the spec quantizes the KV cache, the receipt shows none")
    counted = Receipt()
    beyond = [answer.positions for answer in answers if answer.positions is not None]
    counted.recount((image for answer in answers for image in answer.images or []), beyond)
    given = record.tokens.model_dump() if record.tokens else {}
    if any(not _close(given.get(name), value) for name, value in counted.tokens.items()):
        problems.append("tokens are not those of the stored answers")
    if counted.transparent != record.receipt.transparent:
        said = f"{record.receipt.transparent} transparent pictures, the stored answers give {counted.transparent}"
        problems.append(f"receipt: {said}")
    if (counted.too_long, counted.longest) != (record.receipt.too_long, record.receipt.longest):
        said = f"{record.receipt.too_long} prompts are too long, the stored answers give {counted.too_long}"
        problems.append(f"receipt: {said}")
    if spec.prune and counted.most is not None:
        keep, budget = spec.prune.keep, record.cost.budget if record.cost else None
        if spec.prune.budget is not None:
            keep = budget.keep if budget else counted.most
        few = counted.most < min(keep, counted.available // counted.images)
        many = counted.most > keep and spec.prune.per == "image"  # with `per: tile`, every tile may keep that many
        if few or many:
            problems.append(f"tokens: the spec keeps {keep}, the stored answers up to {counted.most}")
    return problems


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
