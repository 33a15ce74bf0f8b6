"""Calibration samples before they meet a model's blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Sample = Mapping[str, Any]
"""A model's keyword arguments for one question (batch of one); `labels` and `relevance_text` may be among them."""
Found = dict[str, dict[str, Tensor]]
"""What a calibration found: for each linear, named tensors."""
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def _silent(what: str, done: int, total: int) -> None:
    return None


@dataclass(frozen=True)
class CalibrationSamples:
    """Samples, and what is to become of the result.

    Attributes:
        samples: one question each, text and image as the processor makes them.
        origin: where they come from, in words, for the receipt.
        cache: folder in which results are kept and looked for; None keeps nothing.
        fingerprints: content hashes of what the result depends on besides samples and spec: the model's files, its
            precision. A cache needs at least these.
        report: told how far it is.
        shorten: prunes a sample where the spec calibrates on pruned ones; by default the spec's own pruner does.
    """

    samples: Sequence[Any]
    origin: str = "given by the caller"
    cache: Path | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    report: Progress = _silent
    shorten: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None

    def digest(self) -> str:
        """SHA-256 of every sample's content."""
        total = hashlib.sha256()
        for sample in self.samples:
            for key, value in sorted(sample.items()) if isinstance(sample, Mapping) else [("", sample)]:
                total.update(f"{key}\0".encode())
                total.update(_content(value))
        return total.hexdigest()


def _content(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    flat = value.detach().cpu().contiguous()
    return f"{flat.dtype} {tuple(flat.shape)}\0".encode() + flat.flatten().view(torch.uint8).numpy().tobytes()
