"""`cost(model, spec, prompt)`: what one prompt costs under a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qapbench.receipt import LinearReceipt
from qapbench.spec.run_spec import RunSpec

from .amounts import Cost
from .budget import resolved
from .count import counted
from .known import costed_model
from .prompt import Prompt
from .tokens import MeasuredTokens


def cost(
    model: Any,
    spec: RunSpec | Mapping[str, Any] | None = None,
    prompt: Prompt | None = None,
    *,
    receipt: Sequence[LinearReceipt] = (),
    tokens: MeasuredTokens | None = None,
) -> Cost:
    """What one prompt costs a model under a spec. No weight is read.

    Args:
        model: a loaded model; a config, as a mapping or as transformers has it; the name or the hub id of a well-known
            checkpoint, such as "llava-1.5-7b"; an embedded model or a checkpoint folder.
        spec: a RunSpec, or a mapping with `quantize`, `prune` or both, as in a spec file; None for the model as it is.
        prompt: the prompt; None for one image and 64 text tokens.
        receipt: the linears of a run's receipt. They say which of them were quantized, and in how many bits.
        tokens: visual tokens as they were measured; None follows them from the spec.

    Raises:
        UserError: the model is not known, or the spec has mistakes or does not fit the model.
    """
    given = _run_spec(spec)
    prompt = Prompt() if prompt is None else prompt
    costed = costed_model(model, given.dtype, given.text_tower)
    prune = resolved(given.prune, costed, given.quantize) if given.prune else None
    return counted(costed, given.quantize, prune, prompt, receipt, tokens)


def _run_spec(spec: RunSpec | Mapping[str, Any] | None) -> RunSpec:
    """The spec, with a model and a task that nobody reads if it has none."""
    if isinstance(spec, RunSpec):
        return spec
    return RunSpec.parse({"model": "given", "task": "none", **(spec or {})})
