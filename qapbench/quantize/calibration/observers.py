"""Observers of a linear's inputs: statistics collected while calibration samples pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Observer = Callable[[Tensor, Tensor], None]
"""Called with one sample's tokens without padding, x [T, in], and vision [T] bool, True for visual tokens."""


class AbsMaxObserver:
    """Largest absolute value of each channel, over all tokens and over the tokens of each modality.

    Attributes:
        vision: [in] float32, over visual tokens; zeros if there were none.
        text: [in] float32, over all other tokens; zeros if there were none.
    """

    def __init__(self) -> None:
        self.vision: Tensor
        self.text: Tensor
        self._seen = False

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        if not self._seen:
            self.vision, self.text = x.new_zeros(2, x.shape[-1], dtype=torch.float32)
            self._seen = True
        size = x.float().abs()
        if vision.any():
            self.vision = torch.maximum(self.vision, size[vision].amax(dim=0))
        if not vision.all():
            self.text = torch.maximum(self.text, size[~vision].amax(dim=0))

    @property
    def value(self) -> Tensor:
        """[in] float32, over all tokens."""
        return torch.maximum(self.vision, self.text)


class MeanAbs:
    """Mean absolute value of each channel over all tokens.

    Attributes:
        total: [in] float64 sum of absolute values.
        tokens: number of tokens.
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.tokens = 0

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        self.total = self.total + x.double().abs().sum(dim=0)
        self.tokens += len(x)

    @property
    def value(self) -> Tensor:
        """[in] float32 mean."""
        return torch.as_tensor(self.total / max(self.tokens, 1), dtype=torch.float32)


class Gram:
    """Gram matrix of the inputs: the sum of x x^T over all tokens.

    Attributes:
        value: [in, in] float32.
        samples: number of samples in the sum.
    """

    def __init__(self) -> None:
        self.value: Tensor
        self.samples = 0

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        rows = x.float()
        product = rows.mT @ rows
        if self.samples:
            self.value += product
        else:
            self.value = product
        self.samples += 1


class Rows:
    """Input rows of at most `limit` tokens, spread evenly over the samples and kept in host memory.

    Args:
        limit: number of tokens to keep in total.
        samples: number of samples to come. Each contributes the same number of tokens, if it has enough.

    Attributes:
        share: number of tokens taken of each sample.
        count: number of tokens kept so far.
        parts: the rows kept so far, sample by sample.
    """

    def __init__(self, limit: int, samples: int) -> None:
        self.share = max(-(-limit // max(samples, 1)), 1)
        self.limit = limit
        self.parts: list[Tensor] = []
        self.count = 0

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        take = min(self.share, self.limit - self.count, len(x))
        if take > 0:
            places = torch.arange(take, device=x.device) * len(x) // take
            self.parts.append(x[places].to("cpu", copy=True))
            self.count += take

    @property
    def value(self) -> Tensor:
        """[T, in] kept rows, in the model's dtype."""
        return torch.cat(self.parts)
