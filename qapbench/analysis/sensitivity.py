"""`qapbench study sensitivity`: leave tokens out one by one, measure the harm, ask every metric for its scores."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qapbench.compress import compress
from qapbench.errors import Problem, UserError
from qapbench.receipt import Receipt
from qapbench.run.environment import environment
from qapbench.run.loading import fingerprints, load_model
from qapbench.run.record import notes as record_notes
from qapbench.run.store import Store, write_json
from qapbench.run.tasks import load_task
from qapbench.spec import PruneSpec, RunSpec
from qapbench.strategy import metrics, pruners

from .drops import Harm, Spliced, harm_of, units_of
from .question import Looker, Question, find_question, image_questions
from .study import STUDY, TARGETS, Summary, summarize

DIGITS = 6  # significant digits of a stored score
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Study:
    """A study before it is made: what of it is answered already lies in its folder.

    Attributes:
        spec: the quantized run without pruning; prunes: whose relevance is asked as well.
    """

    spec: RunSpec
    prunes: tuple[PruneSpec, ...]
    sample: int
    block: int
    device: torch.device
    trust_remote_code: bool = False
    batch_size: int = 16

    def make(self, runs: Path, report: Report = lambda name, done, total: None) -> Summary:
        """Ask the questions that are missing, write the summary and return it.

        Raises:
            UserError: the model, the task or the sample do not fit.
        """
        task = load_task(self.spec.task, self.spec.seed)
        names = metrics.names()
        labels = [prune.method.name for prune in self.prunes]
        content = fingerprints(self.spec, task.fingerprint, self.device)
        asked = {"sensitivity": [self.sample, self.block, names, [str(p.method.params) for p in self.prunes], labels]}
        digest = self.spec.digest(content, {**task.asked, "study": asked})
        folder = runs / f"study-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(folder)
        chosen = self._sample(image_questions(task))
        started = time.perf_counter()
        with store.locked():
            rows = store.read()[: len(chosen)]
            if [row.get("id") for row in rows] != chosen[: len(rows)]:
                raise UserError(f"{store.path} holds other questions than this study asks; move it away")
            store.keep(len(rows))
            report(self.spec.name, len(rows), len(chosen))
            fresh = len(chosen) - len(rows)
            if fresh:
                model, processor = load_model(self.spec, self.device, self.trust_remote_code)
                questions = (find_question(task, processor, name) for name in chosen[len(rows) :])
                for row in self._ask(model, processor, questions, names):
                    store.append([row])
                    rows.append(row)
                    report(self.spec.name, len(rows), len(chosen))
            seconds = time.perf_counter() - started
            summary = Summary(
                id=digest, name=self.spec.name, created=datetime.now(UTC).isoformat(timespec="seconds"),
                model=self.spec.model, task=task.name, quantization=_quantization(self.spec),
                spec=self.spec.model_dump(mode="json"), questions=len(rows), sample=self.sample,
                units=sum(len(row["harm"]["answer"]) for row in rows), block=self.block,
                changed=float(np.mean([np.mean(row["changed"]) for row in rows])), targets=TARGETS,
                predictors=summarize(rows, self.spec.seed), fingerprints=content,
                environment=environment(self.device),
                timing={"seconds": round(seconds, 3), "questions": fresh},
                notes=_notes(record_notes(self.spec, task, Receipt()), rows),
            )  # fmt: skip
            write_json(folder / STUDY, summary.model_dump(mode="json"))
        return summary

    def _sample(self, ids: Sequence[str]) -> list[str]:
        if len(ids) < 2:
            raise UserError(Problem("the study needs at least two questions with an image", ("task",)))
        drawn = random.Random(self.spec.seed).sample(range(len(ids)), min(self.sample, len(ids)))
        return [ids[place] for place in drawn]

    @torch.inference_mode()
    def _ask(
        self, model: Any, processor: Any, questions: Iterator[Question], names: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """The row of each question: every score and every harm of its units."""
        full = Spliced(copy.deepcopy(model))  # the twin that stays in full precision
        with compress(model, self.spec.model_copy(update={"prune": None}), processor) as receipt:
            quantized = Spliced(model)
            looker = Looker(model, processor, self.spec)
            for place, question in enumerate(questions):
                inputs = question.inputs(processor, self.device)
                quantized.start(inputs)
                full.start(inputs)
                if not place:
                    receipt.check()
                    quantized.check(inputs)
                    full.check(inputs)
                tokens = quantized.seen.projected
                units = units_of(tokens.shape[1], quantized.seen.grid, self.block)
                harm = harm_of(quantized, full, inputs, units, question.ids, self.batch_size)
                scores = {f"metric {name}": metrics.create(name)(tokens)[0] for name in names}
                for prune in self.prunes:
                    seen = looker.tokens(question, prune)
                    relevance = pruners.create(prune.method.name, **prune.method.params).relevance(seen)
                    if relevance is not None:
                        scores[f"relevance {prune.method.name}"] = relevance[0]
                yield _row(question, scores, harm, units, looker.receipt.fallbacks)


def _notes(about: list[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*about, *(note for row in rows for note in row.get("notes", []))]))


def _row(
    question: Question, scores: dict[str, Tensor], harm: Harm, units: list[Tensor], notes: list[str]
) -> dict[str, Any]:
    by_unit = {
        name: _short(torch.stack([values.double().cpu()[unit].mean() for unit in units]))
        for name, values in scores.items()
    }
    row = {
        "id": question.id, "scores": by_unit,
        "harm": {name: _short(getattr(harm, name)) for name in TARGETS}, "changed": harm.changed.int().tolist(),
    }  # fmt: skip
    return {**row, "notes": [f"Fallback: {note}" for note in notes]} if notes else row


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _quantization(spec: RunSpec) -> str:
    return spec.quantize.label if spec.quantize else "full precision"


def studies_of(specs: Sequence[RunSpec], **options: Any) -> list[Study]:
    """One study for each (model, task, quantization) of a sweep, which asks the relevance of each of its pruners.

    Args:
        options: of Study.

    Raises:
        UserError: nothing in the sweep is quantized.
    """
    groups: dict[str, list[RunSpec]] = {}
    for spec in specs:
        if spec.quantize:
            alone = spec.model_copy(update={"prune": None})
            groups.setdefault(alone.canonical(), []).append(spec)
    if not groups:
        raise UserError(Problem("the study is about a quantized model: give `quantize`", ("quantize",)))
    studies = []
    for members in groups.values():
        first = members[0]
        alone = first.model_copy(update={"prune": None, "name": f"{Path(first.model).name} {_quantization(first)}"})
        prunes = {json.dumps([p.method.name, p.method.params], sort_keys=True): p for m in members if (p := m.prune)}
        studies.append(Study(alone, tuple(prunes.values()), **options))
    return studies
