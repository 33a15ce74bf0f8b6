"""`qapbench study sensitivity`: compares the effect of leaving out tokens with the scores that metrics give them."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qapbench.errors import Problem, UserError
from qapbench.hashing import digest_code
from qapbench.methods.kinds import metrics
from qapbench.methods.measure import Measure
from qapbench.models import Family, family_of
from qapbench.prune.first_reads import on_model
from qapbench.prune.prompt import PruningView
from qapbench.receipt import Receipt
from qapbench.records.store import Store, write_json
from qapbench.running.batches import BatchRunner
from qapbench.running.environment import environment
from qapbench.running.fingerprints import OF_PRUNING, about
from qapbench.running.notes import notes as record_notes
from qapbench.running.plan import Planned, prune_key
from qapbench.running.planner import Planner
from qapbench.running.prompt_encoder import PromptEncoder
from qapbench.running.session import Session
from qapbench.spec.run_spec import PruneSpec, RunSpec
from qapbench.tasking.questions import RefusedPictureError

from .leave_one_out import OcclusionEffect, Spliced, occlusion_effects, units_of
from .question import LetterQuestion, by_letter, find_questions, image_questions
from .study import STUDY, TARGETS, StudyRow, Summary, summarize

DIGITS = 6  # significant digits of a stored score


@dataclass(frozen=True)
class Study:
    """A study that is to be made. Questions that are already answered are read from its folder.

    Attributes:
        spec: the quantized run, without pruning.
        prunes: the pruning methods whose relevance is compared as well.
        sample: number of questions to ask.
        block: side of the square that is left out, in tokens.
        batch_size: number of omissions per forward pass.
    """

    spec: RunSpec
    prunes: tuple[PruneSpec, ...]
    sample: int
    block: int
    batch_size: int = 16

    def make(self, session: Session) -> Summary:
        """Ask the questions that are missing, write the summary and return it.

        Args:
            session: holds the model, and the folder of results.

        Raises:
            UserError: the model or the task does not fit, or the study's folder holds other questions.
        """
        settings, spec = session.settings, by_letter(self.spec)
        planner = Planner(settings.runs, settings.device)
        planned, task = planner.plan(spec), planner.task(spec)
        prunes = [prune.model_dump(mode="json") for prune in self.prunes]
        asked = {"sensitivity": [self.sample, self.block, metrics.names(), prunes]}
        content = self._content(planner, planned)
        digest = spec.digest(content, {**task.asked, "study": asked})
        folder = settings.runs / f"study-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(folder, StudyRow)
        chosen = self._sample(image_questions(task))
        started = time.perf_counter()
        with store.locked():
            had = {row.id for row in store.read()}
            if not had <= set(chosen):
                raise UserError(f"{store.path} holds other questions than this study asks; move it away")
            session.progress(self.spec.name, len(had), len(chosen))
            missing = [name for name in chosen if name not in had]
            if missing:
                questions = find_questions(session, spec, missing)
                for fresh, row in enumerate(self._ask(session, planner, planned, questions), start=1):
                    store.append([row])
                    session.progress(self.spec.name, len(had) + fresh, len(chosen))
            rows = store.arrange(lambda row: row.id, chosen)
            seconds = time.perf_counter() - started
            about = record_notes(self.spec, task, Receipt())
            summary = Summary(
                id=digest,
                name=self.spec.name,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                model=self.spec.model,
                task=task.name,
                quantization=_quantization(self.spec),
                spec=self.spec.model_dump(mode="json"),
                questions=len(rows),
                sample=self.sample,
                units=sum(len(row.effects["answer"]) for row in rows),
                block=self.block,
                changed=float(np.mean([np.mean(row.changed) for row in rows])),
                targets=TARGETS,
                predictors=summarize(rows, self.spec.seed),
                fingerprints=content,
                environment=environment(settings.device),
                timing={"seconds": round(seconds, 3), "questions": len(missing)},
                notes=list(dict.fromkeys([*about, *(note for row in rows for note in row.notes)])),
            )
            write_json(folder / STUDY, summary)
        return summary

    def _content(self, planner: Planner, planned: Planned) -> dict[str, str]:
        """Content hashes of everything that the study reads: the run's, those of the pruners, and of every metric."""
        content = dict(planned.fingerprints)
        for prune in self.prunes:
            pruned = planner.plan(planned.spec.model_copy(update={"prune": prune}))
            content |= about(pruned.fingerprints, OF_PRUNING)
        return content | {f"metric {entry.name}": digest_code(entry.target) for entry in metrics}

    def _sample(self, ids: Sequence[str]) -> list[str]:
        """Ids of the questions to ask, drawn by the spec's seed."""
        if len(ids) < 2:
            raise UserError(Problem("the study needs at least two questions with an image", ("task",)))
        drawn = random.Random(self.spec.seed).sample(range(len(ids)), min(self.sample, len(ids)))
        return [ids[place] for place in drawn]

    @torch.inference_mode()
    def _ask(
        self, session: Session, planner: Planner, planned: Planned, questions: Sequence[LetterQuestion]
    ) -> Iterator[StudyRow]:
        """Yield one row per question: the scores of its units, and the effects of leaving them out."""
        model, processor = session.model(planned.spec)
        full = Spliced(copy.deepcopy(model))  # a copy that stays in full precision
        views: dict[str, list[PruningView]] = {}
        with session.quantized(planned) as receipt:
            quantized, family = Spliced(model), family_of(model)
            prunings = {}
            for prune in self.prunes:
                one = planned.spec.model_copy(update={"prune": prune})
                key = str(prune_key(one))
                views[key] = []
                prunings[key] = session.pruning(one, views[key].append)
            encoder = PromptEncoder(family, processor, {k: p for k, p in prunings.items() if p is not None})
            runner = BatchRunner(family, processor)
            measures = _measures(family)
            for place, question in enumerate(questions):
                try:
                    inputs = encoder.inputs(question.question, question.question.prompt)
                except RefusedPictureError as error:
                    raise UserError(
                        f"{error}; a study needs all of its questions, so leave this one out of the data"
                    ) from None
                for spliced in (quantized, full):
                    spliced.start(inputs)
                if not place:
                    receipt.check()
                    quantized.check(inputs)
                    full.check(inputs)
                tokens = quantized.view.projected
                units = units_of(tokens.shape[1], quantized.view.grid, self.block)
                effect = occlusion_effects(quantized, full, inputs, units, question.ids, self.batch_size)
                scores = {f"metric {name}": measure(tokens)[0] for name, measure in measures.items()}
                for prune, (key, pruning) in zip(self.prunes, prunings.items(), strict=True):
                    relevance = _relevance(question, key, views[key], encoder, runner)
                    if relevance is not None and pruning is not None:
                        scores[f"relevance {prune.method.name}"] = relevance
                fallbacks = [note for one in prunings.values() if one for note in one.receipt.fallbacks]
                yield _row(question, scores, effect, units, list(dict.fromkeys(fallbacks)))


def _measures(family: Family) -> dict[str, Measure]:
    """All metrics that can be had on a model, by name."""
    found = {}
    for name in metrics.names():
        with contextlib.suppress(UserError):  # a metric that looks at linears which this model does not have
            found[name] = on_model(metrics.create(name), family)
    return found


def _relevance(
    asked: LetterQuestion, key: str, views: list[PruningView], encoder: PromptEncoder, runner: BatchRunner
) -> Tensor | None:
    """[N] relevance of every token as the pruner computes it; None if it has none.

    For a pruner inside the decoder it is the relevance at the first stage.
    """
    views.clear()
    question = asked.question
    prompt = encoder.encode(question, question.prompt, [key])[key]
    if prompt.inside is not None:
        runner.results(runner.rows(question, {question.prompt: prompt}), 1)
    return views[0].relevance if views else None


def _row(
    question: LetterQuestion,
    scores: dict[str, Tensor],
    effect: OcclusionEffect,
    units: list[Tensor],
    notes: list[str],
) -> StudyRow:
    """The row of one question; a unit's score is the mean over its tokens."""
    by_unit = {
        name: _short(torch.stack([values.double().cpu()[unit].mean() for unit in units]))
        for name, values in scores.items()
    }
    return StudyRow(
        id=question.id,
        scores=by_unit,
        effects={name: _short(getattr(effect, name)) for name in TARGETS},
        changed=effect.changed.int().tolist(),
        notes=[f"Fallback: {note}" for note in notes],
    )


def _short(values: Tensor) -> list[float]:
    """The values, rounded to DIGITS significant digits."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _quantization(spec: RunSpec) -> str:
    return spec.quantize.label if spec.quantize else "full precision"


def studies_of(specs: Sequence[RunSpec], sample: int, block: int = 1, batch_size: int = 16) -> list[Study]:
    """One study per (model, task, quantization) of a sweep, each with the pruning methods of that group.

    The studied model receives all tokens. A calibration that would prune therefore uses the whole samples.

    Args:
        specs: the runs of the sweep.
        sample: number of questions to ask.
        block: side of the square that is left out, in tokens.
        batch_size: number of omissions per forward pass.

    Raises:
        UserError: no run of the sweep is quantized.
    """
    groups: dict[str, tuple[RunSpec, dict[str, PruneSpec]]] = {}
    for spec in specs:
        if spec.quantize:
            alone = _alone(spec)
            _, prunes = groups.setdefault(alone.canonical(), (alone, {}))
            if spec.prune:
                method = spec.prune.method
                prunes[json.dumps([method.name, method.params], sort_keys=True)] = spec.prune
    if not groups:
        raise UserError(Problem("the study is about a quantized model: give `quantize`", ("quantize",)))
    return [Study(alone, tuple(prunes.values()), sample, block, batch_size) for alone, prunes in groups.values()]


def _alone(spec: RunSpec) -> RunSpec:
    """The quantized run without pruning, named by its model and quantization."""
    quantize = spec.quantize
    if quantize is not None and quantize.calibration is not None and quantize.calibration.pruned:
        calibration = quantize.calibration.model_copy(update={"pruned": False})
        quantize = quantize.model_copy(update={"calibration": calibration})
    name = f"{Path(spec.model).name} {_quantization(spec)}"
    return spec.model_copy(update={"prune": None, "quantize": quantize, "name": name})
