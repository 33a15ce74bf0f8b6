"""The compatibility matrix of pruners and model families, measured by running each pruner on a tiny random model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch

from qapbench.compression import compress
from qapbench.errors import UserError, first_line
from qapbench.methods.kinds import pruners
from qapbench.models.family import families

KEEP = 5  # budget; a view of a tiny model has 16 or 20 tokens
Outcome = Literal["runs", "refused", "failed"]


@dataclasses.dataclass(frozen=True)
class CompatibilityResult:
    """The outcome of one pruner on one model family.

    Attributes:
        family: name of the model family.
        pruner: name of the pruner.
        outcome: "runs", "refused" (by a UserError), or "failed" (by any other error, or with logits that are not
            finite).
        reason: why it was refused or failed; "" if it runs.
        tokens: token counts of the receipt over one forward pass and one `generate`.
        notes: the receipt's fallbacks, that is, what was done otherwise than on a CLIP tower.
    """

    family: str
    pruner: str
    outcome: Outcome
    reason: str = ""
    tokens: dict[str, float | int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return dataclasses.asdict(self)


def run_matrix() -> Iterator[CompatibilityResult]:
    """Run every registered pruner on every model family and yield one result each.

    A pruner that refuses a model, or crashes on it, is a result too.
    """
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
    except Exception as error:  # the matrix reports every error that a method raises
        return CompatibilityResult(family, pruner, "failed", f"{type(error).__name__}: {first_line(error)}")
    if not torch.isfinite(logits).all():
        return CompatibilityResult(family, pruner, "failed", "logits are not finite")
    return CompatibilityResult(family, pruner, "runs", tokens=receipt.tokens, notes=receipt.fallbacks)
