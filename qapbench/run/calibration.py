"""Calibration samples of a run: questions that the task offers for it, as the model takes them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from qapbench.calibration import CalibrationSamples
from qapbench.checkpoints import digest_file
from qapbench.errors import Problem, UserError
from qapbench.prune import PER_TOKEN
from qapbench.receipt import Receipt
from qapbench.spec import CalibrationSpec

from .lm import CompressedLM, Question
from .store import Store
from .tasks import LoadedTask, quiet

WHERE = ("quantize", "calibration")


def fingerprint(task: LoadedTask, spec: CalibrationSpec) -> str:
    """What the samples are drawn from: the file's content, or the version of the task's own source."""
    if spec.data:
        file = Path(spec.data).expanduser()
        if not file.is_file():
            raise UserError(Problem(f"{spec.data}: no such file (a parquet file of questions)", (*WHERE, "data")))
        return digest_file(file)
    return getattr(task.docs, "calibration_version", "") or task.fingerprint


def documents(task: LoadedTask, spec: CalibrationSpec) -> Sequence[Mapping[str, Any]]:
    """The questions: the task's own offer, or lm-eval's training split.

    Raises:
        UserError: the task offers none, or fewer than asked for.
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
    """Which of so many questions, in which order."""
    if available < spec.samples:
        raise UserError(Problem(f"{spec.samples} asked for, but there are {available}", (*WHERE, "samples")))
    return random.Random(spec.seed).sample(range(available), spec.samples)


def samples(task: LoadedTask, spec: CalibrationSpec, model: Any, processor: Any) -> CalibrationSamples:
    """Each question's prompt and answer as the run itself would put them, with `labels` on the answer."""
    # `pruning` is set so that the inputs carry what a pruner weighs the image with.
    lm = CompressedLM(model, processor, Receipt(pruning="calibration"), Store(Path()), batch_size=1)
    made = [_sample(lm, task, doc) for doc in documents(task, spec)]
    images = sum(1 for sample in made if _has_image(sample))
    where = spec.data or f"{task.name}, its own calibration questions"
    return CalibrationSamples(made, origin=f"{where}, seed {spec.seed}; {images} with an image")


def _has_image(sample: Mapping[str, Any]) -> bool:
    return any(key.startswith("pixel_values") for key in sample)


def _sample(lm: CompressedLM, task: LoadedTask, doc: Mapping[str, Any]) -> dict[str, Any]:
    templated = bool(getattr(lm.processor, "chat_template", None))
    prompt = task.task.fewshot_context(
        doc, num_fewshot=0, apply_chat_template=templated, chat_template=lm.apply_chat_template if templated else None
    )
    images = task.task.doc_to_image(doc) or []
    instance = Instance("loglikelihood", doc, (prompt, "", {"visual": images}), 0, (task.name, 0, 1))
    inputs = lm._inputs([Question([instance])], [prompt])
    answer = torch.tensor([lm._spell(prompt, _answer(task, doc))], device=lm.model.device)
    labels = torch.full_like(inputs["input_ids"], PER_TOKEN["labels"])
    inputs["labels"] = torch.cat([labels, answer], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    for key in PER_TOKEN.keys() & inputs.keys() - {"labels"}:
        inputs[key] = torch.cat([inputs[key], torch.full_like(answer, PER_TOKEN[key])], dim=1)
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def _answer(task: LoadedTask, doc: Mapping[str, Any]) -> str:
    target = task.task.doc_to_target(doc)
    return task.task.doc_to_choice(doc)[target] if isinstance(target, int) else str(target)
