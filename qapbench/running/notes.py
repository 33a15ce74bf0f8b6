"""The parts of a record that are written for readers: labels, notes, and the accuracy of guessing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qapbench.checkpoints.find import find_checkpoint
from qapbench.methods.fusing import fusions
from qapbench.methods.kinds import metrics, pruners
from qapbench.methods.registry import Registry
from qapbench.receipt import Receipt
from qapbench.records.parts import ReceiptRecord, Unanswered
from qapbench.spec.items import Item
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.outline import TaskOutline

SHOWN = 5  # questions that a note names


def chance(task: TaskOutline) -> float | None:
    """Expected accuracy of guessing: the mean of 1 / number of choices.

    None if some question does not list its choices.
    """
    listed = [doc.get("choices") for doc in (task.docs[i] for i in range(task.count))]
    sizes = [len(choices) for choices in listed if isinstance(choices, list) and choices]
    return sum(1 / size for size in sizes) / len(sizes) if sizes and len(sizes) == len(listed) else None


def labels(spec: RunSpec) -> dict[str, str]:
    """Labels of the run's pruner, sensitivity and fusion for a table.

    Parameters are shown if they differ from the default.
    """
    items: dict[str, tuple[Registry[Any], Item | None]] = {}
    if spec.prune:
        items |= {"pruner": (pruners, spec.prune.method), "sensitivity": (metrics, spec.prune.sensitivity)}
        items |= {"fusion": (fusions, spec.prune.fusion)}
    shown = {}
    for name, (registry, item) in items.items():
        if item:
            fields = registry.entry(item.name).params.model_fields
            other = {key: value for key, value in item.params.items() if fields[key].default != value}
            inner = ", ".join(f"{key} {value}" for key, value in other.items())
            shown[name] = f"{item.name} ({inner})" if inner else item.name
    return shown


def notes(spec: RunSpec, task: TaskOutline, receipt: Receipt, unanswered: Sequence[Unanswered] = ()) -> list[str]:
    """What a reader of the numbers has to know: stand-ins for model or data, questions left out, and fallbacks.

    Args:
        spec: the run.
        task: the run's task.
        receipt: the run's receipt, whose fallbacks are listed.
        unanswered: the questions that could not be asked.
    """
    said: list[str] = []
    checkpoint = find_checkpoint(spec.model)
    if checkpoint.embedded:
        said.append(
            f"Embedded stand-in model: {spec.model} was trained by this project on procedural questions; "
            "its numbers say nothing about LLaVA-7B."
        )
        if checkpoint.status:
            said.append(f"Stand-in model: {checkpoint.status}")
        if not task.embedded:
            said.append(f"{spec.model} was never trained for {task.name}: expect accuracy near chance.")
    if task.stand_in:
        said.append(f"Stand-in data: {task.stand_in}")
    if receipt.transparent:
        said.append(_transparent(receipt, spec.task.background))
    if receipt.too_long:
        said.append(
            f"Long prompts: {counted(receipt.too_long, 'question')} beyond the {receipt.positions} positions that the "
            f"model was made for (the longest needs {receipt.longest}), counted after pruning in front of the decoder."
        )
    if unanswered:
        said.append(_left_out(unanswered))
    return said + [f"Fallback: {what}" for what in receipt.fallbacks]


def _left_out(unanswered: Sequence[Unanswered]) -> str:
    """A sentence on the questions that could not be asked, of which the first few are named."""
    listed = ", ".join(f"'{one.id}'" for one in unanswered[:SHOWN])
    more = f" and {len(unanswered) - SHOWN} more" if len(unanswered) > SHOWN else ""
    return (
        f"Not answered: {counted(len(unanswered), 'question')} whose pictures the model's processor refuses "
        f"({listed}{more}). The scores are of the others."
    )


def _transparent(receipt: Receipt, background: str | None) -> str:
    """A sentence on the images with transparent pixels, and on the colour that these have."""
    colour = f"are put on {background} (task.background)"
    if background is None:
        colour = (
            "have the colour that is stored below them, often black, as in LLaVA's code (`task.background: white` puts "
            "them on white)"
        )
    return f"Transparent pictures: {receipt.transparent} of {counted(receipt.images, 'image')}; their pixels {colour}."


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 question" or "2 questions"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def receipt_record(receipt: Receipt) -> ReceiptRecord:
    """The receipt in the form in which a record holds it."""
    return ReceiptRecord.model_validate(receipt.to_json())
