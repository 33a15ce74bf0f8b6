"""Makes a run's calibration samples: questions of the task, as keyword arguments of the model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qapbench.errors import Problem, UserError
from qapbench.prune.cutting import PER_TOKEN
from qapbench.quantize.calibration import CalibrationSamples
from qapbench.spec.run_spec import CalibrationSpec

from .images import decoded
from .lm import AskingLM
from .questions import ContinuationTokenizer, RefusedPictureError, processor_inputs
from .tasks import LoadedTask, quiet
from .text import unquoted

WHERE = ("quantize", "calibration")


def documents(task: LoadedTask, spec: CalibrationSpec) -> Sequence[Mapping[str, Any]]:
    """The documents to calibrate on: those that the task itself provides, or lm-eval's training split.

    Args:
        task: the run's task.
        spec: number of samples, seed and source.

    Raises:
        UserError: the task has no such documents, or fewer than asked for.
    """
    if (offer := getattr(task.docs, "calibration", None)) is not None:
        return offer(spec.samples, spec.seed, spec.data)
    if spec.data:
        message = f"lm-eval's task '{task.name}' has its own training split; leave `data` out"
        raise UserError(Problem(message, (*WHERE, "data")))
    with quiet():
        docs = task.task.training_docs() if task.task.has_training_docs() else None
    if docs is None:
        raise UserError(Problem(f"task '{task.name}' has no training split to calibrate on", WHERE))
    return [docs[index] for index in choose(len(docs), spec)]


def choose(available: int, spec: CalibrationSpec) -> list[int]:
    """Indices of the documents to calibrate on, in their order.

    Args:
        available: number of documents to choose from.
        spec: number of samples, and seed.

    Raises:
        UserError: more were asked for than there are.
    """
    if available < spec.samples:
        raise UserError(Problem(f"{spec.samples} asked for, but there are {available}", (*WHERE, "samples")))
    return random.Random(spec.seed).sample(range(available), spec.samples)


def samples(task: LoadedTask, spec: CalibrationSpec, processor: Any) -> CalibrationSamples:
    """The calibration samples: each question's prompt and answer in the run's form, with `labels` on the answer.

    Args:
        task: the run's task.
        spec: number of samples, seed and source.
        processor: its processor. Questions whose pictures it refuses are left out, which `origin` says.

    Raises:
        UserError: there are no such questions, or the processor refuses the pictures of all.
    """
    lm = AskingLM(processor, images=task.has_images)
    continuation_tokenizer = ContinuationTokenizer(processor)
    made: list[dict[str, Any]] = []
    refused: list[str] = []
    for doc in documents(task, spec):
        try:
            made.append(_sample(lm, continuation_tokenizer, task, doc))
        except RefusedPictureError as error:
            refused.append(error.why)
    if not made:
        raise UserError(Problem(f"none of {len(refused)} samples can be used: {refused[0]}", WHERE))
    images = sum(1 for sample in made if any(key.startswith("pixel_values") for key in sample))
    where = spec.data or f"{task.name}, its own calibration questions"
    without = f"; {len(refused)} left out, whose pictures the model's processor refuses" if refused else ""
    return CalibrationSamples(made, origin=f"{where}, seed {spec.seed}; {images} with an image{without}")


def _sample(
    lm: AskingLM, continuation_tokenizer: ContinuationTokenizer, task: LoadedTask, doc: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of one document: its prompt, its answer, and its images."""
    template = lm.apply_chat_template if lm.templated else None
    context = task.task.fewshot_context(doc, num_fewshot=0, apply_chat_template=lm.templated, chat_template=template)
    prompt, images = lm.as_prompt(context), task.shown(task.task.doc_to_image(doc))
    inputs = processor_inputs(lm.processor, prompt, [decoded(image) for image in images])
    answer = torch.tensor([continuation_tokenizer.spell(prompt, _answer(task, doc))])
    labels = torch.full_like(inputs["input_ids"], PER_TOKEN["labels"])
    inputs["labels"] = torch.cat([labels, answer], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["labels"])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    for key in PER_TOKEN.keys() & inputs.keys() - {"labels"}:
        inputs[key] = torch.cat([inputs[key], torch.full_like(answer, PER_TOKEN[key])], dim=1)
    if images:
        inputs["relevance_text"] = [doc.get("relevance_text") or unquoted(prompt)] * len(images)
    return inputs


def _answer(task: LoadedTask, doc: Mapping[str, Any]) -> str:
    """The text of the right answer."""
    target = task.task.doc_to_target(doc)
    return task.task.doc_to_choice(doc)[target] if isinstance(target, int) else str(target)
