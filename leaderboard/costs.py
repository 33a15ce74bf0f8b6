"""What a row costs, as columns of the table; docs/cost.md has the definitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from qapbench.records.profile import Profile
from qapbench.records.record import Record

from .rows import Row

ALIKE = 0.02  # relative difference of layer means within which rows cost the same


class CostColumn(NamedTuple):
    """A column of costs.

    Attributes:
        head: its head in the table, in the CSV and on the chart's axis.
        hint: what it is, in a sentence.
        digits: digits that are shown.
    """

    head: str
    hint: str
    digits: int = 4


COSTS = {
    "layer_mean": CostColumn(
        "Layer mean", "vision tokens that a layer of the decoder receives, mean over layers, as measured"
    ),
    "tokens_share": CostColumn(
        "Tokens x layers, %", "vision tokens x layers, relative to those of a run that prunes nothing", 3
    ),
    "tflops": CostColumn(
        "TFLOPs", "of one prompt with one image: tower, projector, choosing tokens, and prefill of the language model"
    ),
    "flops_share": CostColumn("FLOPs, %", "the same relative to the model with nothing compressed", 3),
    "tbops": CostColumn("T BOPs", "the same x bits of weights x bits of activations / 256"),
    "kv_mb": CostColumn("KV MB", "the KV cache that the prompt leaves, in 10^6 bytes"),
    "weight_gb": CostColumn("Weights GB", "the weights as they are stored, in 10^9 bytes"),
    "ms": CostColumn("Measured ms", "of a prompt at batch 1, median (qapbench profile); none for simulated kernels", 3),
}
"""The columns by the name that they have in the JSON."""


def costs_of(record: Record, profile: Profile | None = None) -> dict[str, float]:
    """The costs of a record. One of an earlier version, which states none, has what follows from its tokens.

    Args:
        record: the record.
        profile: the run's profile; None if it was not measured. The time of a simulation is no cost of the row.
    """
    found: dict[str, float] = {}
    if (tokens := record.tokens) is not None:
        found["layer_mean"] = tokens.mean if tokens.layer_mean is None else tokens.layer_mean
        if tokens.available >= 1:
            found["tokens_share"] = 100 * found["layer_mean"] / tokens.available
    if (cost := record.cost) is not None:
        found |= {
            "tflops": cost.flops.prompt / 1e12,
            "flops_share": 100 * cost.flops_share,
            "tbops": cost.bops.prompt / 1e12,
            "kv_mb": cost.kv_bytes / 1e6,
            "weight_gb": cost.weight_bytes / 1e9,
        }
    if profile is not None and not profile.simulated:
        found["ms"] = 1e3 * profile.prompt.median
    return found


def cost_columns(rows: Sequence[Row]) -> dict[str, CostColumn]:
    """The columns that some row has."""
    return {name: column for name, column in COSTS.items() if any(name in row.costs for row in rows)}


def with_equal_costs(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the cost that they share with another: a layer mean, within two percent.

    So pruners in front of the decoder and inside it can be compared at equal cost. A row that no other one has the cost
    of has none to compare at.
    """
    groups: list[list[float]] = []
    means = sorted(row.costs["layer_mean"] for row in rows if "layer_mean" in row.costs)
    for mean in means:
        if groups and mean <= groups[-1][0] * (1 + ALIKE):
            groups[-1].append(mean)
        else:
            groups.append([mean])
    labels = {mean: f"{sum(group) / len(group):.4g} per layer" for group in groups if len(group) > 1 for mean in group}
    return [dataclasses.replace(row, equal_cost=labels.get(row.costs.get("layer_mean", -1.0), "")) for row in rows]
