"""`qapbench explain`: what one question's pruning sees and keeps, with and without sensitivity, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qapbench.compress import compress
from qapbench.errors import Problem, UserError, nearest
from qapbench.run.loading import load_model
from qapbench.run.record import notes as record_notes
from qapbench.run.tasks import load_task
from qapbench.spec import RunSpec

from .pictures import seen_image
from .question import Look, Looker, Question, find_question


@dataclass(frozen=True)
class Side:
    """One choice of tokens: the option that the compressed model then answers, and the probability of each."""

    name: str
    look: Look
    answer: str
    probabilities: list[float]


@dataclass(frozen=True)
class Explanation:
    """Meaning alone first, then the fused choice; `image` as the model saw it."""

    spec: RunSpec
    question: Question
    image: Image.Image
    sides: list[Side]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        def scores(values: torch.Tensor | None) -> list[float] | None:
            return None if values is None else [round(float(value), 6) for value in values]

        fused = self.sides[-1].look
        return {
            "sample": self.question.id, "truth": self.question.truth, "grid": fused.grid,
            "relevance": scores(fused.relevance), "sensitivity": scores(fused.sensitivity), "notes": self.notes,
            "sides": [
                {"name": side.name, "answer": side.answer, "kept": side.look.selection.indices[0].tolist(),
                 "merged": side.look.selection.budget - side.look.selection.indices.shape[1],
                 "probabilities": dict(zip(self.question.options, side.probabilities, strict=True))}
                for side in self.sides
            ],
        }  # fmt: skip


def choose_run(specs: Sequence[RunSpec], name: str | None) -> RunSpec:
    """The run with that name; without one the first that prunes with a sensitivity.

    Raises:
        UserError: there is none.
    """
    if name is not None:
        found = [spec for spec in specs if spec.name == name]
        if not found:
            raise UserError(f"--row: no run '{name}' in the spec; {nearest(name, [spec.name for spec in specs])}")
        specs = found
    for spec in specs:
        if spec.prune and spec.prune.sensitivity:
            return spec
    which = f"'{name}' does not prune" if name else "no run of the spec prunes"
    message = f"explain needs a sensitivity, and {which} with one; try --set prune.sensitivity=combined"
    raise UserError(Problem(message, ("prune", "sensitivity")))


def explain(spec: RunSpec, sample: str, device: torch.device, trust_remote_code: bool = False) -> Explanation:
    """Look at one question as the spec's pruning does, and answer it twice.

    Raises:
        UserError: no such question, or one that cannot be explained.
    """
    fused = spec.prune
    if fused is None or fused.sensitivity is None:
        raise UserError(Problem("give a sensitivity to explain", ("prune", "sensitivity")))
    task = load_task(spec.task, spec.seed)
    if sample not in task.ids:  # before the model is loaded
        raise UserError(Problem(f"no question '{sample}' in {task.name}; {nearest(sample, task.ids)}", ("sample",)))
    model, processor = load_model(spec, device, trust_remote_code)
    question = find_question(task, processor, sample)
    semantic = fused.model_copy(update={"sensitivity": None, "fusion": None})
    sides: list[Side] = []
    notes: list[str] = []
    for name, prune in (("semantic only", semantic), (f"with {fused.sensitivity}", fused)):
        looker = Looker(model, processor, spec)
        with compress(model, spec.model_copy(update={"prune": None}), processor):
            look = looker.look(question, prune)
        with compress(model, spec.model_copy(update={"prune": prune}), processor) as receipt:
            sides.append(_answered(name, look, model, processor, question))
        notes = record_notes(spec, task, receipt)
    image = seen_image(question.image, processor.image_processor)
    return Explanation(spec, question, image, sides, notes)


@torch.inference_mode()
def _answered(name: str, look: Look, model: Any, processor: Any, question: Question) -> Side:
    inputs = question.inputs(processor, model.device)
    logits = model(**inputs, relevance_text=[question.relevance_text], logits_to_keep=1).logits[0, -1]
    probabilities = question.probabilities(logits.float()).tolist()
    answer = question.options[max(range(len(probabilities)), key=probabilities.__getitem__)]
    return Side(name, look, answer, probabilities)


def save(explanation: Explanation, path: Path) -> None:
    """Draw and write the picture."""
    from .drawing import draw

    path.parent.mkdir(parents=True, exist_ok=True)
    draw(explanation).save(path)
