"""What the pages of strategies say of model families and costs, found by running and counting.

    python -m website.facts           writes website/facts.json, in some minutes

It runs every pruner on the tiny model of every family, and a sample of the quantization methods, as
`qapbench list --matrix` does, and counts what every pruner costs on LLaVA-1.5-7B.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

import qapbench
from qapbench.analysis.compatibility import CompatibilityResult, run_matrix, run_ptq_matrix
from qapbench.files import replace_synced

FILE = Path(__file__).parent / "facts.json"
MODEL, KEEP = "llava-1.5-7b", 64


@functools.cache
def facts() -> dict[str, Any]:
    """What was found: "pruner" and "ptq" (outcome by name and family), and "cost" (numbers by pruner, "" is dense)."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def find() -> dict[str, Any]:
    """Run the matrices and count the costs."""
    found: dict[str, Any] = {"pruner": {}, "ptq": {}, "cost": {}}
    for cell in run_matrix():
        found["pruner"].setdefault(cell.pruner, {})[cell.family] = _outcome(cell)
    for name in ["", *qapbench.pruners.names()]:
        spec = {"prune": {"method": name, "keep": KEEP}} if name else {}
        cost = qapbench.cost(MODEL, spec)
        found["cost"][name] = {
            "layer_mean": round(cost.layer_mean, 1),
            "prefill": round(cost.flops.prefill / 1e12, 3),
            "selection": round(cost.flops.selection / 1e12, 4),
            "kv": round(cost.kv_bytes / 1e6, 1),
        }
    for cell in run_ptq_matrix(sample=True):
        if cell.outcome == "refused" and (cell.reason or "").startswith("prune."):
            continue  # by the pruner that it was tried with
        before = found["ptq"].setdefault(cell.ptq, {}).get(cell.family, "runs")
        if before == "runs" or cell.outcome == "failed":
            found["ptq"][cell.ptq][cell.family] = _outcome(cell)
    return found


def _outcome(cell: CompatibilityResult) -> str:
    return f"{cell.outcome}: {cell.reason}" if cell.reason else cell.outcome


def main() -> None:
    """Write what was found."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    replace_synced(FILE, f"{json.dumps(find(), indent=1, sort_keys=True)}\n".encode())


if __name__ == "__main__":
    main()
