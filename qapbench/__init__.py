"""qapbench: quantization and vision-token pruning of multimodal LLMs, in one typed spec, measured honestly."""

from .affine import fake_quantize
from .compress import compress
from .errors import UserError
from .quantization import PTQ, Format, LinearPlan
from .run import run
from .spec import RunSpec, SweepSpec
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
from .tokens import Selection, VisionTokens

__all__ = [
    "PTQ",
    "Bits",
    "DecoderPruner",
    "Format",
    "GroupSize",
    "LinearPlan",
    "Pruner",
    "RunSpec",
    "Selection",
    "Share",
    "Stage",
    "SweepSpec",
    "UserError",
    "VisionTokens",
    "compress",
    "even_stages",
    "fake_quantize",
    "fusion",
    "fusions",
    "metric",
    "metrics",
    "min_max",
    "pruner",
    "pruners",
    "ptq",
    "ptqs",
    "quantizer",
    "quantizers",
    "run",
    "top",
]
