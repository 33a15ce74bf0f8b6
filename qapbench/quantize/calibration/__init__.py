"""Calibration: samples run through the model block by block, observers of its linears, results kept as safetensors."""

from .blocks import Block, Group
from .gradients import Gradient
from .losses import AnswerLoss
from .method import CalibratedPTQ
from .observers import AbsMaxObserver, Gram, MeanAbs, Observer, Rows
from .runner import Calibration
from .samples import CalibrationResult, CalibrationSamples, Sample

__all__ = [
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
    "Observer",
    "Rows",
    "Sample",
]
