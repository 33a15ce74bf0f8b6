"""Calibration samples, and the type of calibration results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qapbench.progress import ProgressCallback, silent

Sample = Mapping[str, Any]
"""Keyword arguments of the model for one question (batch of one), optionally with `labels` and `relevance_text`."""
CalibrationResult = dict[str, dict[str, Tensor]]
"""Result of a calibration: for each linear, tensors by name."""


@dataclass(frozen=True)
class CalibrationSamples:
    """Samples for calibration, with what is needed to run them and to keep the result.

    Attributes:
        samples: one question each, with text and image as the processor makes them.
        origin: where the samples come from, in words, for the receipt.
        cache: folder in which results are kept and looked up; None keeps nothing.
        fingerprints: content hashes of what the result depends on besides samples and spec, such as the model's files
            and its precision. A cache needs at least these two.
        report: called with the progress.
        shorten: prunes a sample, if the spec calibrates on pruned ones; None stands for the spec's own pruner.
    """

    samples: Sequence[Any]
    origin: str = "given by the caller"
    cache: Path | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    report: ProgressCallback = silent
    shorten: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None

    def digest(self) -> str:
        """SHA-256 of the content of all samples."""
        total = hashlib.sha256()
        for sample in self.samples:
            for key, value in sorted(sample.items()) if isinstance(sample, Mapping) else [("", sample)]:
                total.update(f"{key}\0".encode())
                total.update(_content(value))
        return total.hexdigest()


def _content(value: Any) -> bytes:
    """Bytes that identify a value: for a tensor its dtype, shape and data, else its `repr`."""
    if not isinstance(value, Tensor):
        return repr(value).encode()
    flat = value.detach().cpu().contiguous()
    return f"{flat.dtype} {tuple(flat.shape)}\0".encode() + flat.flatten().view(torch.uint8).numpy().tobytes()
