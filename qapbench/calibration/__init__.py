"""Calibration: samples through the model, block by block, observed; the result kept as safetensors."""

from .blocks import Block, Group
from .method import CalibratedPTQ
from .observers import AbsMax, Gram, MeanAbs, Observer, Rows
from .runner import Calibration, Gradient
from .samples import CalibrationSamples, Found, Sample

__all__ = [
    "AbsMax",
    "Block",
    "CalibratedPTQ",
    "Calibration",
    "CalibrationSamples",
    "Found",
    "Gradient",
    "Gram",
    "Group",
    "MeanAbs",
    "Observer",
    "Rows",
    "Sample",
]
