"""Content hashes of everything that a run reads. They are part of the run's identity (docs/identity.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qapbench.checkpoints.find import find_checkpoint
from qapbench.errors import Problem, UserError
from qapbench.hashing import code_files, digest_code, digest_files, digest_tree, library_versions
from qapbench.methods.fusing import fusions
from qapbench.methods.kinds import allocations, metrics, pruners, ptqs
from qapbench.methods.registry import Entry
from qapbench.models.checkpoint_format import format_of
from qapbench.models.family import default_tower, families
from qapbench.models.loading import precision, read_config
from qapbench.models.relevance import QuestionReader, find_tower
from qapbench.models.relevance_sign import WITHOUT_TOWER, tower_sign
from qapbench.spec.items import created
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.outline import TaskOutline

WHERE = {"ptq": ("quantize", "method"), "allocation": ("quantize", "allocate"), "pruner": ("prune", "method")}
"""Where a spec names items of a kind; those of other kinds stand under `prune` by their own names."""
CACHE = Path(__file__).parents[1] / "quantize" / "kv_cache.py"  # read and not imported: a plan loads no transformers
TOWER = "text_tower"  # name of the fingerprint of a text tower's checkpoint
OF_TEXT = (
    *("model", "precision", "ptq", "allocation", "kv", "calibration"),
    *("family", "vision", "library", "data", "task"),
)
"""First words of the fingerprints that answers to questions without an image depend on."""
OF_PRUNING = ("pruner", "metric", "fusion", "text_tower", "plugin")
"""First words of the fingerprints that the selection of tokens depends on."""


def fingerprints(
    spec: RunSpec, task: TaskOutline, device: torch.device, fetch: bool = True, calibration: str = ""
) -> dict[str, str]:
    """Content hashes of everything that a run reads, by what they are of.

    They identify content whose names and paths in a spec may change.

    Args:
        spec: the run.
        task: the run's task.
        device: the device that the run will use.
        fetch: whether checkpoints may be downloaded.
        calibration: hash of the source of the calibration samples; "" if nothing is calibrated.

    Raises:
        UserError: the model cannot be found, or a strategy has no source code to hash.
    """
    folder = find_checkpoint(spec.model, "model", fetch).folder
    config = read_config(spec, fetch)
    found = {"model": digest_tree(folder), "data": task.fingerprint}
    found["precision"] = f"{precision(spec, device)} on {device.type}"
    if calibration:
        found["calibration"] = calibration
    model_type = str(config.get("model_type"))
    if format := format_of(config):
        found["vision tower"] = digest_tree(format(folder, config).companion(fetch))
        found["family format"] = digest_code(format)
    if model_type in families:
        found[f"family {model_type}"] = digest_code(families.entry(model_type).target)
    for kind, entry in used_items(spec):
        try:
            found[f"{kind} {entry.name}"] = digest_code(entry.target)
        except UserError as error:
            where = WHERE.get(kind, ("prune", kind))
            raise UserError(Problem(f"{kind} '{entry.name}': {error}", where)) from None
    for name in created(ptqs, spec.quantize.method).used_metrics if spec.quantize else ():
        found[f"ptq metric {name}"] = digest_code(metrics.entry(name).target)
    if spec.quantize and spec.quantize.kv:
        found["kv cache"] = digest_files(code_files(CACHE, "qapbench.quantize.kv_cache"))
    for index, plugin in enumerate(spec.plugins):
        path = Path(plugin)
        found[f"plugin {index} {path.name}"] = digest_files(code_files(path.resolve(), "plugin"))
    if task.code:
        found[f"task {task.name}"] = task.code
    if needs_tower(spec):
        tower, reason = find_tower(spec.text_tower, str(folder), default_tower(config), fetch)
        # Without a tower the language model embeds the question's own words.
        found[TOWER] = digest_tree(tower) if tower else f"none, own words: {reason}"
        found["text_tower sign"] = (tower_sign(tower) if tower else WITHOUT_TOWER).value
    return {**found, **library_versions()}


def needs_tower(spec: RunSpec) -> bool:
    """Whether the run's pruner compares the image with the question in a joint embedding space."""
    if spec.prune is None:
        return False
    return bool(created(pruners, spec.prune.method).front_needs & QuestionReader.FIELDS - {"prompt_embeds"})


def used_items(spec: RunSpec) -> list[tuple[str, Entry[Any]]]:
    """The registered items that a run names, as (kind, entry)."""
    items: list[tuple[Any, Any]] = []
    if spec.quantize:
        items.append((ptqs, spec.quantize.method))
        items.append((allocations, spec.quantize.allocate.method if spec.quantize.allocate else None))
    if spec.prune:
        items += [(pruners, spec.prune.method), (metrics, spec.prune.sensitivity), (fusions, spec.prune.fusion)]
    return [(registry.kind, registry.entry(item.name)) for registry, item in items if item]


def about(content: dict[str, str], kinds: tuple[str, ...]) -> dict[str, str]:
    """The fingerprints whose first word is one of `kinds`.

    Args:
        content: a run's fingerprints.
        kinds: first words, such as `OF_TEXT`.
    """
    return {key: value for key, value in content.items() if key.split()[0] in kinds}
