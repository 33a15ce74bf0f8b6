"""The parts of a record that are written for readers: labels, notes, and the accuracy of guessing."""

from __future__ import annotations

from typing import Any

from qapbench.checkpoints.find import find_checkpoint
from qapbench.methods.kinds import fusions, metrics, pruners
from qapbench.methods.registry import Registry
from qapbench.receipt import Receipt
from qapbench.records.record import ReceiptRecord
from qapbench.spec.items import Item
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.outline import TaskOutline


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


def notes(spec: RunSpec, task: TaskOutline, receipt: Receipt) -> list[str]:
    """What a reader of the numbers has to know: stand-ins for model or data, and fallbacks.

    Args:
        spec: the run.
        task: the run's task.
        receipt: the run's receipt, whose fallbacks are listed.
    """
    said = []
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
    return said + [f"Fallback: {what}" for what in receipt.fallbacks]


def receipt_record(receipt: Receipt) -> ReceiptRecord:
    """The receipt in the form in which a record holds it."""
    return ReceiptRecord.model_validate(receipt.to_json())
