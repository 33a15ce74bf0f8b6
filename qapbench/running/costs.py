"""What the prompts of a run cost, by its model's config and by what its receipt measured."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from qapbench.costing.amounts import Cost
from qapbench.costing.budget import reached, resolved
from qapbench.costing.cost import cost
from qapbench.costing.known import costed_model
from qapbench.costing.prompt import Prompt
from qapbench.costing.tokens import MeasuredTokens
from qapbench.errors import UserError
from qapbench.receipt import Receipt
from qapbench.records.parts import BudgetUse, CostRecord, StageCost
from qapbench.spec.run_spec import RunSpec


def run_cost(spec: RunSpec, receipt: Receipt, dtype: str) -> CostRecord | None:
    """What one prompt of a run costs: one image with the mean numbers of tokens, and as much text as `Prompt` has.

    So runs on different tasks can be compared. Its image has the size of `Prompt`, except where the number of tokens
    follows the size of the image: there it has as many as the images had in the mean.

    Args:
        spec: the run.
        receipt: its receipt, with the tokens of all images and the bits of every linear.
        dtype: name of the dtype that the model was loaded in.

    Returns:
        The cost; None if the model's kind has no cost model, or its config does not say all.
    """
    counted = receipt.tokens
    prompt = Prompt() if counted else Prompt(images=())
    plain = spec.model_copy(update={"quantize": None, "prune": None, "dtype": dtype})
    try:
        dense = cost(spec.model, plain, prompt)
        if counted and counted["available"] != dense.available:
            resized = _of_as_many(dense, counted["available"])
            dense, prompt = cost(spec.model, plain, resized), resized
        given = spec.model_copy(update={"dtype": dtype})
        found = cost(spec.model, given, prompt, receipt=receipt.linears, tokens=_measured(receipt))
    except UserError:
        return None
    asked, budget = spec.prune.budget if spec.prune else None, None
    if spec.prune and asked is not None:
        keep = resolved(spec.prune, costed_model(spec.model, dtype, spec.text_tower), spec.quantize).keep
        budget = BudgetUse(cost=asked.name, asked=asked.value, keep=keep, reached=reached(asked.name, found, dense))
    flops, bops = asdict(found.flops), asdict(found.bops)
    return CostRecord(
        text=prompt.text,
        image=prompt.images[0] if prompt.images else None,
        available=found.available,
        layer_mean=found.layer_mean,
        tokens_share=found.tokens_share,
        flops=StageCost(**flops),
        bops=StageCost(**bops),
        flops_share=found.flops.prompt / dense.flops.prompt,
        weight_bytes=found.weight_bytes,
        kv_bytes=found.kv_bytes,
        activation_bytes=found.activation_bytes,
        budget=budget,
    )


def _of_as_many(dense: Cost, available: float) -> Prompt:
    """The prompt of a cost with an image of the size that gives about so many tokens."""
    (size,) = dense.prompt.images
    factor = math.sqrt(available / dense.available) if dense.available else 1.0
    return replace(dense.prompt, images=((max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)),))


def _measured(receipt: Receipt) -> MeasuredTokens | None:
    """The visual tokens of a receipt's mean image; None if it has none."""
    number = receipt.images
    if not number:
        return None
    layers = receipt.layers or [receipt.kept + receipt.merged]
    return MeasuredTokens(
        receipt.available / number, tuple(count / number for count in layers), receipt.separators / number
    )
