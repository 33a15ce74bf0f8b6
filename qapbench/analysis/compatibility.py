"""Which pruner runs on which model family: found by running each on a tiny random model, not by declaration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch

from qapbench.compression import compress
from qapbench.errors import UserError, first_line
from qapbench.methods.kinds import pruners
from qapbench.models.family import families

KEEP = 5  # of the tiny models' 16 or 20 tokens a view
Outcome = Literal["runs", "refused", "failed"]


@dataclasses.dataclass(frozen=True)
class CompatibilityResult:
    """One pruner on one family.

    Attributes:
        reason: why it was refused or failed; "" where it runs.
        tokens: what the receipt measured in a forward pass and a `generate`.
        notes: what it did otherwise than on a CLIP tower.
    """

    family: str
    pruner: str
    outcome: Outcome
    reason: str = ""
    tokens: dict[str, float | int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_matrix() -> Iterator[CompatibilityResult]:
    """Every registered pruner on every family; a method's refusal is a result, its crash too."""
    for name in families.names():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = families.create(name).tiny()
        for pruner in pruners.names():
            yield _run(name, pruner, model, inputs)


@torch.inference_mode()
def _run(family: str, pruner: str, model: Any, inputs: dict[str, Any]) -> CompatibilityResult:
    try:
        with compress(model, {"prune": {"method": pruner, "keep": KEEP}}) as receipt:
            logits = model(**inputs).logits
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
    except UserError as error:
        return CompatibilityResult(family, pruner, "refused", first_line(error))
    except Exception as error:  # whatever a method may raise is what the matrix is to show
        return CompatibilityResult(family, pruner, "failed", f"{type(error).__name__}: {first_line(error)}")
    if not torch.isfinite(logits).all():
        return CompatibilityResult(family, pruner, "failed", "logits are not finite")
    return CompatibilityResult(family, pruner, "runs", tokens=receipt.tokens, notes=receipt.fallbacks)
