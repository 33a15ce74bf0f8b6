"""What is gathered of a linear's inputs while samples pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Observer = Callable[[Tensor, Tensor], None]
"""Called with x [T, in], one sample's tokens without padding, and vision [T] bool, which of them an image gave."""


class AbsMax:
    """Largest |x| of each channel, and of the tokens of each modality.

    Attributes:
        value: [in] float32; vision, text: the same over the tokens of one modality, zero where there were none.
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
        return torch.maximum(self.vision, self.text)


class MeanAbs:
    """Mean |x| of each channel over all tokens, summed in float64.

    Attributes:
        value: [in] float32.
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.tokens = 0

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        self.total = self.total + x.double().abs().sum(dim=0)
        self.tokens += len(x)

    @property
    def value(self) -> Tensor:
        return torch.as_tensor(self.total / max(self.tokens, 1), dtype=torch.float32)


class Gram:
    """sum over tokens of x x^T, and how many samples gave it.

    Attributes:
        value: [in, in] float32.
    """

    def __init__(self) -> None:
        self.value: Tensor
        self.samples = 0

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        rows = x.float()
        product = rows.mT @ rows
        self.value = self.value + product if self.samples else product
        self.samples += 1


class Rows:
    """At most `limit` tokens, spread evenly over the samples, kept in host memory.

    Args:
        limit: tokens that are kept in all.
        samples: how many samples there will be, so that each gives its share.

    Attributes:
        value: [T, in] in the model's dtype.
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
        return torch.cat(self.parts)
