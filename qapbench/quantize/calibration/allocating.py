"""Allocates bits to layers: measures how sensitive each is on the calibration samples, and lets a method choose."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.hashing import digest_code
from qapbench.methods.kinds import allocations
from qapbench.methods.plans import LinearPlan
from qapbench.models import Family
from qapbench.quantize.install import installed
from qapbench.quantize.receipts import AllocationUse
from qapbench.spec.overrides import check_fitting
from qapbench.spec.quantize_spec import QuantizeSpec

from .runner import Calibration

Units = dict[str, list[str]]
"""What gets bits of its own: a glob that fits these linears -> their names."""


def allocated(
    family: Family, spec: QuantizeSpec, linears: Mapping[str, nn.Linear], runner: Calibration
) -> tuple[QuantizeSpec, AllocationUse]:
    """The section with the allocated bits written as overrides, and how they came about.

    Args:
        family: the model.
        spec: a section with `allocate` and integer `weights`.
        linears: the linears in scope, by their name in the model.
        runner: runs the calibration samples.

    Raises:
        UserError: no linear is left to allocate bits to, or the mean cannot be reached.
    """
    asked = spec.allocate
    if asked is None:
        raise ValueError("the section allocates nothing")
    check_fitting(spec.overrides, linears)
    free = [name for name in linears if not any(one.fits(name) for one in spec.overrides)]
    units = units_of(family, free, asked.per)
    if not units:
        raise UserError("quantize.allocate: the overrides take all linears in scope, so there is none left")
    plans = [LinearPlan(spec.formats_with(bits).weights) for bits in asked.choices]

    def about() -> dict[str, object]:
        formats = [spec.formats_with(bits).weights for bits in asked.choices]
        plain = [None if one is None else one.model_dump() for one in formats]
        return {"allocate": digest_code(measured_errors), "weights": plain, "units": units}

    def measure() -> dict[str, dict[str, Tensor]]:
        errors = measured_errors(
            runner, {unit: [linears[name] for name in names] for unit, names in units.items()}, plans
        )
        return {unit: {"errors": row} for unit, row in zip(units, errors, strict=True)}

    found = runner.cached(about, measure)
    errors = torch.stack([found[unit]["errors"] for unit in units])
    sizes = [sum(linears[name].weight.numel() for name in names) for names in units.values()]
    method = allocations.create(asked.method.name, **asked.method.params)
    places = method(errors, asked.choices, sizes, spec.mean_bits)
    _check_places(str(asked.method), places, sizes, asked.choices, spec.mean_bits)
    bits = {unit: asked.choices[place] for unit, place in zip(units, places, strict=True)}
    use = AllocationUse(
        method=str(asked.method),
        bits_asked=spec.mean_bits,
        bits=sum(size * bits[unit] for unit, size in zip(units, sizes, strict=True)) / sum(sizes),
        choices=asked.choices,
        errors=dict(zip(units, errors.tolist(), strict=True)),
        overrides={unit: {"weights": {"bits": each}} for unit, each in bits.items()},
    )
    return spec.with_allocated(bits), use


def _check_places(
    method: str, places: Sequence[int], sizes: Sequence[int], choices: Sequence[int], mean: float
) -> None:
    """Check that a method chose for every unit, and within the mean.

    Raises:
        UserError: it did not.
    """
    listed = list(places)
    if len(listed) != len(sizes) or any(type(one) is not int or not 0 <= one < len(choices) for one in listed):
        what = f"for each of {len(sizes)} layers the index of its bits in {list(choices)}"
        raise UserError(f"quantize.allocate: '{method}' has to return {what}, got {listed}")
    reached = sum(size * choices[one] for size, one in zip(sizes, listed, strict=True)) / sum(sizes)
    if reached > mean + 1e-6:
        raise UserError(
            f"quantize.allocate: '{method}' takes {reached:g} bits per weight, more than the mean of {mean:g}"
        )


def units_of(family: Family, linears: Sequence[str], per: str) -> Units:
    """What gets bits of its own, in the order of the linears.

    Args:
        family: the model.
        linears: names of the linears.
        per: "layer" for the blocks of each part, where a linear outside of all stands by itself; "linear" for each.
    """
    names = {id(module): name for name, module in family.model.named_modules()}
    blocks = [names[id(block)] for part in family.parts for block in family.blocks(part)] if per == "layer" else []
    units: Units = {}
    for name in linears:
        home = next((block for block in blocks if name.startswith(f"{block}.")), None)
        units.setdefault(name if home is None else f"{home}.*", []).append(name)
    return units


def measured_errors(
    runner: Calibration, units: Mapping[str, Sequence[nn.Linear]], plans: Sequence[LinearPlan]
) -> Tensor:
    """How far the decoder's last states move if the weights of one unit alone are rounded: [units, plans] float64.

    The error of a token is ||h' - h||^2 / ||h||^2, where h is its state behind the last decoder layer; it is averaged
    over the tokens of each sample, then over samples. There is one forward pass for each unit, plan and sample.

    Args:
        runner: runs the samples.
        units: the linears of each unit.
        plans: the ways in which their weights are rounded.
    """
    exact = runner.last_states()
    errors = torch.zeros(len(units), len(plans), dtype=torch.float64)
    for row, linears in enumerate(units.values()):
        for column, plan in enumerate(plans):
            with contextlib.ExitStack() as stack:
                for linear in linears:
                    stack.enter_context(installed(linear, plan, originals=runner.originals))
                moved = runner.last_states()
            each = [relative_error(new, old) for new, old in zip(moved, exact, strict=True)]
            errors[row, column] = sum(each) / len(each)
    return errors


def relative_error(new: Tensor, old: Tensor) -> float:
    """Mean over tokens of ||new - old||^2 / ||old||^2, for states [T, D]."""
    off = (new.double() - old.double()).square().sum(dim=-1)
    size = old.double().square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float((off / size).mean())
