"""qapbench: quantization and vision-token pruning of multimodal LLMs, in one typed spec, measured honestly.

Names are imported when they are first used: `import qapbench` costs nothing, and `qapbench --help` needs no torch.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

# MKL splits a product by the number of threads, which moves the last bit of a sum: a run by two workers would not end
# with the bytes of a run by one. MKL reads this at its first product; it costs a few percent.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.2.0"

PUBLIC = {
    "errors": ("UserError",),
    "methods.affine": ("Grid", "Levels", "Rounding", "fake_quantize", "grouped", "round_through", "straight_through"),
    "methods.floating": ("FloatGrid", "FloatLevels"),
    "methods.decoder_pruner": ("DecoderPruner", "Stage", "even_stages"),
    "methods.fusing": ("fusion", "fusions"),
    "methods.kinds": (
        "Allocation",
        "Bits",
        "Fraction",
        "GroupSize",
        "allocation",
        "allocations",
        "metric",
        "metrics",
        "pruner",
        "pruners",
        "ptq",
        "ptqs",
        "quantizer",
        "quantizers",
    ),
    "methods.measure": ("ModelMetric",),
    "methods.pruner": ("Pruner",),
    "methods.scores": ("batched", "min_max", "top_k"),
    "methods.kronecker": ("Kronecker", "KroneckerHeads", "LearnedMatrix", "kronecker_by", "near_square"),
    "methods.normal_float": ("normal_float",),
    "methods.packed": ("NormalFloat", "PackedWeight", "kept_rounding", "packed_on", "packed_tensors"),
    "methods.formats": ("Format",),
    "methods.plans": ("LinearPlan", "Scaling", "TokenActivation", "Tokens", "Transform"),
    "methods.quantization": ("PTQ",),
    "methods.reads": ("FirstReads",),
    "methods.rotation": ("Rotated", "RotatedBoth", "Rotation", "rotated_by", "rotation_flops"),
    "methods.stiefel": ("descend",),
    "methods.tokens": ("RelevanceSign", "Selection", "VisionTokens"),
    "spec.run_spec": ("RunSpec",),
    "spec.sweep_spec": ("SweepSpec",),
    "quantize.calibration": (
        "AbsMaxObserver",
        "AnswerLoss",
        "Block",
        "CalibratedPTQ",
        "Calibration",
        "CalibrationResult",
        "CalibrationSamples",
        "Gradient",
        "Gram",
        "Group",
        "MeanAbs",
        "Rows",
    ),
    "quantize.install": ("installed_all",),
    "compression": ("compress",),
    "costing.amounts": ("Cost",),
    "costing.cost": ("cost",),
    "costing.prompt": ("Prompt",),
    "models.checkpoint_format": ("CheckpointFormat", "checkpoint_format"),
    "models.family": ("Family", "family"),
    "records.load": ("load_records", "results"),
    "records.record": ("Record",),
    "running": ("run",),
    "tasking.registry": ("task",),
}
"""The public names, by the module that defines them."""

DEPRECATED = {
    "AbsMax": "AbsMaxObserver",
    "Found": "CalibrationResult",
    "Share": "Fraction",
    "top": "top_k",
}
"""Names of version 0.1, which work for one more version and warn -> what replaces them."""

HOMES = {name: module for module, names in PUBLIC.items() for name in names}

if TYPE_CHECKING:
    from .compression import compress
    from .costing.amounts import Cost
    from .costing.cost import cost
    from .costing.prompt import Prompt
    from .errors import UserError
    from .methods.affine import Grid, Levels, Rounding, fake_quantize, grouped, round_through, straight_through
    from .methods.decoder_pruner import DecoderPruner, Stage, even_stages
    from .methods.floating import FloatGrid, FloatLevels
    from .methods.formats import Format
    from .methods.fusing import fusion, fusions
    from .methods.kinds import (
        Allocation,
        Bits,
        Fraction,
        GroupSize,
        allocation,
        allocations,
        metric,
        metrics,
        pruner,
        pruners,
        ptq,
        ptqs,
        quantizer,
        quantizers,
    )
    from .methods.kronecker import Kronecker, KroneckerHeads, LearnedMatrix, kronecker_by, near_square
    from .methods.measure import ModelMetric
    from .methods.normal_float import normal_float
    from .methods.packed import NormalFloat, PackedWeight, kept_rounding, packed_on, packed_tensors
    from .methods.plans import LinearPlan, Scaling, TokenActivation, Tokens, Transform
    from .methods.pruner import Pruner
    from .methods.quantization import PTQ
    from .methods.reads import FirstReads
    from .methods.rotation import Rotated, RotatedBoth, Rotation, rotated_by, rotation_flops
    from .methods.scores import batched, min_max, top_k
    from .methods.stiefel import descend
    from .methods.tokens import RelevanceSign, Selection, VisionTokens
    from .models.checkpoint_format import CheckpointFormat, checkpoint_format
    from .models.family import Family, family
    from .quantize.calibration import (
        AbsMaxObserver,
        AnswerLoss,
        Block,
        CalibratedPTQ,
        Calibration,
        CalibrationResult,
        CalibrationSamples,
        Gradient,
        Gram,
        Group,
        MeanAbs,
        Rows,
    )
    from .quantize.install import installed_all
    from .records.load import load_records, results
    from .records.record import Record
    from .running import run
    from .spec.run_spec import RunSpec
    from .spec.sweep_spec import SweepSpec
    from .tasking.registry import task


def __getattr__(name: str) -> Any:
    """A public name, imported from its module; a deprecated one with a warning."""
    if (new := DEPRECATED.get(name)) is not None:
        warnings.warn(f"qapbench.{name} is now qapbench.{new}; {name} goes in 0.3", DeprecationWarning, stacklevel=2)
        name = new
    if name not in HOMES:
        raise AttributeError(f"module 'qapbench' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


__all__ = [
    "PTQ",
    "AbsMaxObserver",
    "Allocation",
    "AnswerLoss",
    "Bits",
    "Block",
    "CalibratedPTQ",
    "Calibration",
    "CalibrationResult",
    "CalibrationSamples",
    "CheckpointFormat",
    "Cost",
    "DecoderPruner",
    "Family",
    "FirstReads",
    "FloatGrid",
    "FloatLevels",
    "Format",
    "Fraction",
    "Gradient",
    "Gram",
    "Grid",
    "Group",
    "GroupSize",
    "Kronecker",
    "KroneckerHeads",
    "LearnedMatrix",
    "Levels",
    "LinearPlan",
    "MeanAbs",
    "ModelMetric",
    "NormalFloat",
    "PackedWeight",
    "Prompt",
    "Pruner",
    "Record",
    "RelevanceSign",
    "Rotated",
    "RotatedBoth",
    "Rotation",
    "Rounding",
    "Rows",
    "RunSpec",
    "Scaling",
    "Selection",
    "Stage",
    "SweepSpec",
    "TokenActivation",
    "Tokens",
    "Transform",
    "UserError",
    "VisionTokens",
    "allocation",
    "allocations",
    "batched",
    "checkpoint_format",
    "compress",
    "cost",
    "descend",
    "even_stages",
    "fake_quantize",
    "family",
    "fusion",
    "fusions",
    "grouped",
    "installed_all",
    "kept_rounding",
    "kronecker_by",
    "load_records",
    "metric",
    "metrics",
    "min_max",
    "near_square",
    "normal_float",
    "packed_on",
    "packed_tensors",
    "pruner",
    "pruners",
    "ptq",
    "ptqs",
    "quantizer",
    "quantizers",
    "results",
    "rotated_by",
    "rotation_flops",
    "round_through",
    "run",
    "straight_through",
    "task",
    "top_k",
]
