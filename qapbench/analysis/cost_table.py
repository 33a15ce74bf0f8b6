"""A table of costs for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from qapbench.costing.amounts import Cost
from qapbench.costing.devices import Device
from qapbench.costing.prompt import Prompt

from .fitting import fitted


def cost_table(
    costs: Sequence[tuple[str, Cost]], dense: Mapping[str, Cost], device: Device | None = None, width: int = 200
) -> Table:
    """A table with one row per run.

    Args:
        costs: name of each run and its cost.
        dense: for each model, its cost in full precision with every token.
        device: also say the least times of the prompt and of a decoded token on this device.
        width: characters per line.
    """
    prompt = costs[0][1].prompt if costs else Prompt()
    several = len(dense) > 1
    heads = ["tokens", "x layers", "TFLOPs", "of dense", "T BOPs", "token GFLOPs", "weights GB", "KV MB"]
    heads += ["prompt >= ms", "token >= ms"] * (device is not None)
    rows = []
    for name, one in costs:
        flops, bops = one.flops, one.bops
        cells = [
            f"{one.layer_mean:.4g}",
            f"{100 * one.tokens_share:.1f} %",
            f"{flops.prompt / 1e12:.4g}",
            f"{100 * flops.prompt / dense[one.model].flops.prompt:.1f} %",
            f"{bops.prompt / 1e12:.4g}",
            f"{flops.decode / 1e9:.4g}",
            f"{one.weight_bytes / 1e9:.4g}",
            f"{one.kv_bytes / 1e6:.4g}",
        ]
        if device is not None:
            bounds = one.bounds(device)
            first = sum(bound.seconds for stage, bound in bounds.items() if stage != "decode")
            cells += [f"{1e3 * first:.3g}", f"{1e3 * bounds['decode'].seconds:.3g} ({bounds['decode'].limit})"]
        rows.append([name, *[one.model] * several, *cells])
    sizes = ", ".join(f"{width} x {height}" for height, width in prompt.images) or "no image"
    notes = [f"{prompt.text} text tokens, image of {sizes} pixels, batch {prompt.batch}"]
    notes += [
        "tokens: visual ones, mean over layers; x layers: their share of tokens x layers; dense: nothing compressed"
    ]
    if device is not None:
        notes.append(f"least times on {device.name} ({device.source}): nothing can be faster")
    return fitted("Cost of one prompt", ["run", *["model"] * several, *heads], rows, notes, width)
