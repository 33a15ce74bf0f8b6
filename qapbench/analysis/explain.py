"""`qapbench explain`: scores, kept tokens and answer of one question, pruned with and without sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qapbench.errors import Problem, UserError, nearest
from qapbench.methods.scores import min_max
from qapbench.models import family_of
from qapbench.prune.prompt import PruningView
from qapbench.running.batches import BatchRunner
from qapbench.running.notes import notes as record_notes
from qapbench.running.plan import prune_key
from qapbench.running.planner import Planner
from qapbench.running.prompt_encoder import PromptEncoder
from qapbench.running.session import Session
from qapbench.spec.run_spec import RunSpec

from .pictures import seen_image
from .question import LetterQuestion, by_letter, check_question, find_questions


@dataclass(frozen=True)
class Side:
    """One selection of tokens, and the answer that the compressed model gives with it.

    Attributes:
        name: label of the selection.
        relevance: [N] scores of all tokens in [0, 1]; None if the pruner has no relevance. For a pruner inside the
            decoder, these and the sensitivity are the scores of its first stage.
        sensitivity: [N] scores of all tokens in [0, 1]; None if the spec names no sensitivity.
        grid: (height, width) of the tokens; None if they form no grid.
        kept: indices of the kept tokens, ascending.
        merged: number of tokens that were made from several.
        stages: number of times that tokens were dropped inside the decoder; 0 for a pruner in front of it.
        answer: the most likely option.
        probabilities: probability of each option.
    """

    name: str
    relevance: Tensor | None
    sensitivity: Tensor | None
    grid: tuple[int, int] | None
    kept: list[int]
    merged: int
    stages: int
    answer: str
    probabilities: list[float]

    def to_json(self, options: Sequence[str]) -> dict[str, Any]:
        """The selection and the answer as plain data.

        Args:
            options: names of the options, in the order of `probabilities`.
        """
        probabilities = dict(zip(options, self.probabilities, strict=True))
        return {
            "name": self.name,
            "answer": self.answer,
            "kept": self.kept,
            "merged": self.merged,
            "probabilities": probabilities,
        }


@dataclass(frozen=True)
class Explanation:
    """Both selections of one question.

    Attributes:
        spec: the run that is explained.
        question: the question.
        image: the image as the model received it, after resizing and cropping.
        sides: the selection by relevance alone, then the one with the sensitivity fused in.
        notes: what a reader of the picture has to know.
    """

    spec: RunSpec
    question: LetterQuestion
    image: Image.Image
    sides: list[Side]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Scores, kept tokens and answers as plain data."""

        def scores(values: Tensor | None) -> list[float] | None:
            return None if values is None else [round(float(value), 6) for value in values]

        fused = self.sides[-1]
        return {
            "sample": self.question.id,
            "truth": self.question.truth,
            "grid": fused.grid,
            "relevance": scores(fused.relevance),
            "sensitivity": scores(fused.sensitivity),
            "notes": self.notes,
            "sides": [side.to_json(self.question.options) for side in self.sides],
        }


def choose_run(specs: Sequence[RunSpec], name: str | None) -> RunSpec:
    """The run to explain: the first that prunes with a sensitivity.

    Args:
        specs: the runs of a spec file.
        name: considers only runs of this name; None considers all.

    Raises:
        UserError: no run has that name, or none of them prunes with a sensitivity.
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


def explain(spec: RunSpec, sample: str, session: Session) -> Explanation:
    """Ask one question as the run does, twice: pruned by relevance alone, and with the sensitivity fused in.

    Args:
        spec: a run that prunes with a sensitivity.
        sample: id of a question with one image.
        session: holds the model. Its folder of runs also holds the stored calibrations.

    Raises:
        UserError: the spec names no sensitivity, there is no such question, or it cannot be explained.
    """
    fused, asked = spec.prune, by_letter(spec)
    if fused is None or fused.sensitivity is None:
        raise UserError(Problem("give a sensitivity to explain", ("prune", "sensitivity")))
    planner = Planner(session.settings.runs, session.settings.device)
    check_question(planner.task(asked), sample)  # before the model is loaded
    (question,) = find_questions(session, asked, [sample])
    semantic = fused.model_copy(update={"sensitivity": None, "fusion": None})
    sides: list[Side] = []
    notes: list[str] = []
    for name, prune in (("semantic only", semantic), (f"with {fused.sensitivity}", fused)):
        side, notes = _side(name, asked.model_copy(update={"prune": prune}), question, session, planner)
        sides.append(side)
    stages = max(side.stages for side in sides)
    if stages > 1:
        notes.append(f"Scores are those of the first of {stages} stages inside the decoder; the choice is the last's.")
    processor = session.model(asked)[1]
    return Explanation(spec, question, seen_image(question.image, processor.image_processor.to_dict()), sides, notes)


def _side(
    name: str, spec: RunSpec, asked: LetterQuestion, session: Session, planner: Planner
) -> tuple[Side, list[str]]:
    """One selection with its answer, and the notes that a record of such a run would have."""
    views: list[PruningView] = []
    question, key = asked.question, prune_key(spec)
    model, processor = session.model(spec)
    with session.quantized(planner.plan(spec)) as receipt, torch.inference_mode():
        family, pruning = family_of(model), session.pruning(spec, views.append)
        encoder = PromptEncoder(family, processor, {key: pruning} if key and pruning else {})
        runner = BatchRunner(family, processor, seed=spec.seed)
        texts = dict.fromkeys(instance.args[0] for instance in question.instances)
        rows = runner.rows(question, {text: encoder.encode(question, text, [key])[key] for text in texts})
        results = [runner.results([row], row.length)[0] for row in rows]
    outputs = [output for found, _ in results for output in found]
    images = [image for _, stored in results for image in stored]
    first = _only_view(views)
    scores = [None if s is None else min_max(s[None])[0] for s in (first.relevance, first.sensitivity)]
    shares = asked.shares(outputs)
    answer = asked.options[max(range(len(shares)), key=shares.__getitem__)]
    stages = sum(view.layer is not None for view in views)
    kept = images[0].kept if images[0].kept is not None else list(range(first.count))
    side = Side(name, scores[0], scores[1], first.grid, kept, images[0].merged, stages, answer, shares)
    fallbacks = [*receipt.fallbacks, *(pruning.receipt.fallbacks if pruning else [])]
    return side, record_notes(spec, session.task(spec), receipt.model_copy(update={"fallbacks": fallbacks}))


def _only_view(views: Sequence[PruningView]) -> PruningView:
    """The first stage's view of an image that the model encodes as a single view.

    Raises:
        UserError: the image is cut into tiles, or nothing is dropped.
    """
    first = [view for view in views if view.layer == views[0].layer]
    if not first:
        raise UserError(Problem("nothing is dropped: keep fewer tokens than the image has", ("prune", "keep")))
    if len(first) != 1:
        raise UserError("model: only an image that is a single view can be looked at, not one cut into tiles")
    return first[0]
