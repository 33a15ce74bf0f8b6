"""Many runs over the same questions of one model, what is equal computed once.

Questions are the outer loop and runs the inner one, within one model as quantized. So an image is seen once and
forgotten, and nothing grows with the number of questions but the cabinet, which has a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qapbench.compress import compress, pruned_calls
from qapbench.models import Family, family_of
from qapbench.prune import PrunedCalls
from qapbench.receipt import Receipt
from qapbench.shown import Shown

from .answering import Answerer, Row
from .cells import FLUSH, Cell, Clock, Result, recall
from .plan import Planned
from .questions import Question
from .sight import Cabinet, Look, Sight

Report = Callable[[str, int, int], None]
"""Called with (run name, questions answered, questions in all)."""


class Sweep:
    """Answers what cells miss.

    Args:
        questions: of the task, in the order of the work. The first one is where receipts are measured.
        cells: runs of this model and task.
        batch_size: questions that are taken up together; a forward pass holds no more tokens than as many unpruned
            prompts. It does not change any answer.
        runs: folder of the results, whose finished answers are used again.
        limit: bytes of shown prompts that may wait in memory for a later quantizer group; spill: folder for a file
            that holds them instead.
        calibrate: gives a quantizer group's calibration samples.
    """

    def __init__(
        self, model: Any, processor: Any, questions: Sequence[Question], cells: Sequence[Cell], runs: Path, *,
        batch_size: int = 1, seed: int = 0, limit: int = 1 << 30, spill: Path | None = None,
        report: Report | None = None, calibrate: Callable[[Planned], Any] | None = None,
    ) -> None:  # fmt: skip
        self.family = family_of(model)
        self.processor = processor
        self.questions = questions
        self.cells = cells
        self.runs = runs
        self.batch_size = batch_size
        self.report = report or (lambda name, done, total: None)
        self.calibrate = calibrate or (lambda planned: None)
        self.clock = Clock()
        self.clock.cells = cells
        self.cabinet = Cabinet(limit, spill)
        self.answerer = Answerer(self.family, processor, batch_size, seed)
        self._flushed = time.monotonic()
        for cell in cells:
            cell.open(questions[0])

    def answer(self, asked: Sequence[Question] | None = None) -> None:
        """Answer those questions, all where None, for every cell that has not.

        Raises:
            NotQuantizedError: a run asks for quantization that never reached a matmul.
        """
        asked = self.questions if asked is None else asked
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.planned.group, []).append(cell)
        self._report(self.cells)
        sights: dict[Any, Sight] = {}
        waiting = list(groups.values())
        while waiting:
            cells = waiting.pop(0)
            missing = [q for q in asked if any(q.place not in cell.have for cell in cells)]
            if missing:
                self._answer_group(cells, [cell for later in waiting for cell in later], missing, sights)

    # -- one model as quantized --

    def _answer_group(
        self, cells: list[Cell], later: list[Cell], missing: list[Question], sights: dict[Any, Sight]
    ) -> None:
        self.clock.cells = cells
        group = cells[0].planned.group
        known = recall(self.runs, group)
        before = _vision_side(self.family)
        spec = cells[0].spec.model_copy(update={"prune": None})
        with contextlib.ExitStack() as stack:
            with self.clock.stage("quantize"):
                samples = self.calibrate(cells[0].planned)
                receipt = stack.enter_context(compress(self.family.model, spec, self.processor, calibration=samples))
            stack.callback(self._flush, cells, force=True)
            own = group if _vision_side(self.family) != before or _touches_vision(spec) else None
            waiting = [cell for cell in later if own is None and not _touches_vision(cell.spec)]
            sight = sights.get(own) or self._sight([*cells, *waiting])
            sights[own] = sight
            for at in range(0, len(missing), self.batch_size):
                window = missing[at : at + self.batch_size]
                self._answer_window(window, cells, waiting, sight, receipt, known)

    def _sight(self, cells: Sequence[Cell]) -> Sight:
        """The eyes of all cells: every way of pruning once."""
        calls: dict[str, PrunedCalls] = {}
        for cell in cells:
            spec, look = cell.spec, cell.look
            if spec.prune is not None and look is not None and look not in calls:
                calls[look] = pruned_calls(self.family, spec.prune, Receipt(), self.processor, None, spec.text_tower)
        return Sight(self.family, self.processor, calls, self.clock.stage)

    def _answer_window(
        self, window: Sequence[Question], cells: list[Cell], later: list[Cell], sight: Sight, receipt: Receipt,
        known: dict[str, Result],
    ) -> None:  # fmt: skip
        shown = {question.place: self._show(question, cells, later, sight) for question in window}
        lengths = [_length(one) for views in shown.values() for by in views.values() for one in by.values()]
        longest = max(lengths, default=1)
        jobs: dict[str, tuple[list[Row], list[Cell]]] = {}
        wanted: list[tuple[Question, Cell, str]] = []
        for question in window:
            for cell in (cell for cell in cells if question.place not in cell.have):
                views = {prompt: by[cell.look] for prompt, by in shown[question.place].items()}
                rows = self.answerer.rows(question, views)
                key = _key(cell.planned.group, rows)
                wanted.append((question, cell, key))
                if question.place == self.questions[0].place:
                    known.pop(key, None)  # every receipt is measured on a pass of its own run
                if key not in known:
                    jobs.setdefault(key, (rows, []))[1].append(cell)
        first = [key for question, _, key in wanted if question.place == self.questions[0].place and key in jobs]
        fresh = {key: self._measured(*jobs.pop(key), longest, receipt, sight) for key in dict.fromkeys(first)}
        fresh |= self._compute(jobs, longest)
        payers: set[str] = set()
        for question, cell, key in wanted:
            outputs, images = fresh.get(key) or known[key]
            cell.computed += key in fresh and key not in payers
            payers.add(key)
            looks = [by[cell.look] for by in shown[question.place].values()]
            if all(one.inside is None for one in looks):  # equal content may have been chosen in another way
                images = [image for one in looks for image in one.images]
            cell.add(_answer(question, outputs, images[: len(question.images)], key))
        self._flush(cells)

    def _show(
        self, question: Question, cells: list[Cell], later: list[Cell], sight: Sight
    ) -> dict[str, dict[Look, Shown]]:
        """Each prompt of the question under the looks that miss it; later groups' looks go into the cabinet."""
        now = [cell for cell in cells if question.place not in cell.have]
        then = [cell for cell in later if question.place not in cell.have] if question.images else []
        found = {}
        for prompt in dict.fromkeys(instance.args[0] for instance in question.instances):
            name = (question.place, prompt)
            views = self.cabinet.get(name, self.family.model.device)
            lacking = dict.fromkeys(cell.look for cell in (*now, *then) if cell.look not in views)
            if any(cell.look in lacking for cell in now):
                self.clock.cells = [*now, *then]
                views |= sight.show(question, prompt, lacking)
                self.clock.cells = cells
            # What is chosen inside the decoder is the dense prompt and a promise: nothing to put away.
            kept = {c.look: views[c.look] for c in then if c.look in views and views[c.look].inside is None}
            self.cabinet.drop(name)
            if kept:
                with self.clock.stage("cabinet", then):
                    self.cabinet.put(name, kept)
            found[prompt] = views
        return found

    def _measured(self, rows: list[Row], cells: list[Cell], longest: int, receipt: Receipt, sight: Sight) -> Result:
        """Answer the first question on its own, and store what reached the matmuls meanwhile as these runs' receipt."""
        for line in receipt.linears:
            if line.part == "language":  # what the tower's linears got was measured when the image was seen
                line.calls, line.activation_bits, line.activation_levels = 0, None, None
        with self.clock.stage("measure", cells):
            result = _joined([self.answerer.results([row], longest)[0] for row in rows])
        receipt.check()  # a run that is not what its spec says ends here, not after hours
        for cell in cells:
            calls = sight.calls.get(cell.look) if cell.look else None
            cell.write_receipt(receipt, cell.planned.group, calls.receipt.fallbacks if calls else ())
        return result

    def _compute(self, jobs: dict[str, tuple[list[Row], list[Cell]]], longest: int) -> dict[str, Result]:
        """The result of each job, rows of equal length side by side."""
        fresh: dict[str, Result] = {}
        for name, wanted in (("text", False), ("dense", True), ("pruned", True)):
            part = {
                key: rows for key, (rows, cells) in jobs.items()
                if bool(rows[0].shown.features) == wanted and (not wanted or (name == "dense") == _is_whole(rows[0]))
            }  # fmt: skip
            sharers = [cell for key in part for cell in jobs[key][1]]
            if part:
                with self.clock.stage(name, sharers):
                    found = iter(self.answerer.results([row for rows in part.values() for row in rows], longest))
                    fresh |= {key: _joined([next(found) for _ in rows]) for key, rows in part.items()}
        return fresh

    # -- store --

    def _flush(self, cells: Sequence[Cell], force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._flushed >= FLUSH:
            with self.clock.stage("store"):
                for cell in cells:
                    cell.flush()
            self._report(cells)
            self._flushed = time.monotonic()

    def _report(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            self.report(cell.spec.name, len(cell.have), cell.planned.total)


def _answer(question: Question, outputs: list[Any], images: list[dict[str, Any]], key: str) -> dict[str, Any]:
    task, doc = question.place
    answer = {
        "task": task, "doc": doc, "id": question.id, "answer": question.answer(outputs), "outputs": outputs, "key": key,
    }  # fmt: skip
    return {**answer, "images": images} if images else answer


def _joined(results: Sequence[Result]) -> Result:
    """The results of a question's rows as one."""
    return [output for outputs, _ in results for output in outputs], [image for _, seen in results for image in seen]


def _key(group: str, rows: Sequence[Row]) -> str:
    """Hash of all that outputs depend on: the model as quantized, what it is shown, and what is asked of it."""
    total = hashlib.sha256(group.encode())
    for row in rows:
        total.update(json.dumps([row.options, row.tail, row.spelled, row.seed, row.shown.tag]).encode())
        for name, value in sorted(row.shown.inputs.items()):
            total.update(name.encode())
            _hash(total, value)
        for feature in row.shown.features:
            _hash(total, feature)
    return total.hexdigest()[:32]


def _hash(total: Any, value: Tensor) -> None:
    total.update(f"{tuple(value.shape)} {value.dtype}".encode())
    total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _length(shown: Shown) -> int:
    return int(shown.inputs["input_ids"].shape[1])


def _is_whole(row: Row) -> bool:
    return all("kept" not in image for image in row.shown.images)


def _touches_vision(spec: Any) -> bool:
    return spec.quantize is not None and bool({"vision", "projector"} & set(spec.quantize.scope))


def _vision_side(family: Family) -> list[tuple[int, int]]:
    """Which tensors the towers, the projector and the embeddings hold, to see whether quantization touched them."""
    roots = [family.parts["vision"], family.parts["projector"], family.model.get_input_embeddings()]
    return [(id(tensor), tensor._version) for root in roots for tensor in root.parameters()]
