"""The backends, and the formats that each has a kernel for."""

from __future__ import annotations

from typing import Literal

from qapbench.errors import Problem, UserError
from qapbench.methods.formats import Format

Backend = Literal["simulate", "torchao"]


def check_backend(backend: Backend, weights: Format | None, activations: Format | None) -> None:
    """Check that a backend can compute with these formats.

    Args:
        backend: name of the backend.
        weights: format of the weights; None if they are not quantized.
        activations: format of the activations; None if they are not quantized.

    Raises:
        UserError: the backend has no kernel for them.
    """
    if backend == "simulate":
        return
    asked = "W{}A{}".format(*(f.bits if f else 16 for f in (weights, activations)))
    if not (_is_int8(weights) and _is_int8(activations)):
        message = (
            f"torchao runs W8A8, both sides `{{bits: 8, symmetric: true}}`; for {asked} as written only simulation "
            "exists: leave `backend` out"
        )
        raise UserError(Problem(message, ("backend",)))


def _is_int8(format: Format | None) -> bool:
    if format is None or format.format != "int":
        return False
    return format.bits == 8 and format.symmetric and format.group_size is None
