"""qapbench: quantization and vision-token pruning of multimodal LLMs, in one typed spec, measured honestly."""

import os

# MKL splits a product by the number of threads, which moves the last bit of a sum: a run by two workers would not end
# with the bytes of a run by one. MKL reads this at its first product; it costs a few percent.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from .affine import Grid, Levels, fake_quantize, grouped, round_through
from .calibration import (
    AbsMax,
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationSamples,
    Found,
    Gradient,
    Gram,
    Group,
    MeanAbs,
    Rows,
)
from .compress import compress
from .errors import UserError
from .install import installed_all
from .normal_float import normal_float
from .quantization import PTQ, Format, LinearPlan, Scaling, TokenActivation, Tokens, Transform
from .rotation import Rotation
from .run import run
from .spec import RunSpec
from .strategy import (
    Bits,
    DecoderPruner,
    GroupSize,
    Pruner,
    Share,
    Stage,
    even_stages,
    fusion,
    fusions,
    metric,
    metrics,
    min_max,
    pruner,
    pruners,
    ptq,
    ptqs,
    quantizer,
    quantizers,
    top,
)
from .sweepspec import SweepSpec
from .tokens import Selection, VisionTokens

__all__ = [
    "PTQ",
    "AbsMax",
    "Bits",
    "Block",
    "CalibratedPTQ",
    "Calibration",
    "CalibrationSamples",
    "DecoderPruner",
    "Format",
    "Found",
    "Gradient",
    "Gram",
    "Grid",
    "Group",
    "GroupSize",
    "Levels",
    "LinearPlan",
    "MeanAbs",
    "Pruner",
    "Rotation",
    "Rows",
    "RunSpec",
    "Scaling",
    "Selection",
    "Share",
    "Stage",
    "SweepSpec",
    "TokenActivation",
    "Tokens",
    "Transform",
    "UserError",
    "VisionTokens",
    "compress",
    "even_stages",
    "fake_quantize",
    "fusion",
    "fusions",
    "grouped",
    "installed_all",
    "metric",
    "metrics",
    "min_max",
    "normal_float",
    "pruner",
    "pruners",
    "ptq",
    "ptqs",
    "quantizer",
    "quantizers",
    "round_through",
    "run",
    "top",
]
