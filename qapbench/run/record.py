"""The record of a run: what stands in it, and reading it back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qapbench.checkpoints import find_checkpoint
from qapbench.errors import UserError
from qapbench.items import Item
from qapbench.receipt import Receipt
from qapbench.registry import Registry
from qapbench.spec import RunSpec
from qapbench.strategy import fusions, metrics, pruners

from .tasks import LoadedTask

LOG = logging.getLogger(__name__)
SCHEMA = 1
RECORD, SCORED = "record.json", "scored.jsonl"
Record = dict[str, Any]


def read_record(folder: Path) -> Record:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {error}") from error


def read_records(runs: Path) -> list[Record]:
    """Every record below a folder of results, oldest first; what is not a record of ours is left out."""
    folders = sorted({path.parent for path in runs.glob(f"*/{RECORD}") if ".old" not in path.parent.name})
    found = []
    for folder in folders:
        record = read_record(folder)
        if isinstance(record, dict) and {"run_id", "created", "scores", "name"} <= record.keys():
            found.append(record)
        else:
            LOG.warning("%s is not a record of a run; left out", folder / RECORD)
    return sorted(found, key=lambda record: str(record["created"]))


def named(record: Record, name: str) -> Record:
    """The record under a run's name; where it stopped early, the name says so wherever it is shown."""
    why = record.get("stopped")
    return {**record, "name": f"{name} (stopped: {why['asked']} of {why['of']})" if why else name}


def write_scored(path: Path, samples: list[dict[str, Any]]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(sample, sort_keys=True) + "\n" for sample in samples), encoding="utf-8")
    draft.replace(path)


def chance(task: LoadedTask) -> float | None:
    """Accuracy of guessing, mean of 1 / number of choices; None where questions do not list theirs."""
    listed = [doc.get("choices") for doc in (task.docs[i] for i in range(task.count))]
    sizes = [len(choices) for choices in listed if isinstance(choices, list) and choices]
    return sum(1 / size for size in sizes) / len(sizes) if sizes and len(sizes) == len(listed) else None


def labels(spec: RunSpec) -> dict[str, str]:
    """The items of the spec as a table shows them: parameters only where they differ from the default."""
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


def notes(spec: RunSpec, task: LoadedTask, receipt: Receipt) -> list[str]:
    """What a reader of the numbers has to know."""
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
