"""Formats of a KV cache: which tokens are stored in few bits, and how keys and values become levels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from .affine import grouped
from .floating import E4M3
from .formats import Format


class KVSide(BaseModel):
    """How the keys or the values of a cache are stored.

    Attributes:
        format: "int" has 2^bits uniform levels from the lowest to the highest value of a group, as KIVI: the lowest
            value is a level, zero need not be one, and each step is rounded to the model's dtype. "fp8" is E4M3 with a
            float32 scale.
        bits: bits per value.
        granularity: what shares a scale. "channel": each channel, over a group of consecutive tokens. "token": each
            token of a head, over a group of its channels. "tensor", only for "fp8": all of a sample's values in a
            layer, with the scale of its first call, so that later values saturate.
        group_size: tokens, or channels inside a head, that share a scale. The released code of KIVI has 32 in its
            examples.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["int", "fp8"] = "int"
    bits: Annotated[int, Field(ge=1, le=8)]
    granularity: Literal["channel", "token", "tensor"]
    group_size: Annotated[int, Field(ge=1)] = 32

    @model_validator(mode="before")
    @classmethod
    def _by_format(cls, data: Any) -> Any:
        """FP8 has 8 bits."""
        if not isinstance(data, dict) or data.get("format") != "fp8":
            return data
        return {"bits": 8} | {name: value for name, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _consistent(self) -> KVSide:
        if self.format == "fp8" and self.bits != 8:
            raise ValueError("`bits` of fp8 is 8; leave it out")
        if self.format == "int" and self.granularity == "tensor":
            raise ValueError("`granularity: tensor` is that of `format: fp8`; take 'channel' or 'token'")
        return self

    def stored_bits(self, heads: int, tokens: int, width: int, full: int) -> float:
        """Bits per stored value, with its share of the scales (and of the lowest values, which "int" stores too).

        Args:
            heads: H.
            tokens: number of stored tokens.
            width: D, channels of a head.
            full: bits of the model's dtype.
        """
        shared = {"channel": self.group_size, "token": min(self.group_size, width), "tensor": heads * tokens * width}
        return self.bits + (2 * full if self.format == "int" else 32) / max(shared[self.granularity], 1)

    def scale(self, x: Tensor) -> Tensor:
        """The scale [1, 1, 1] that a sample's values [H, n, D] have from their first call on, for one per tensor."""
        most = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        return (most / E4M3.top).clamp(min=torch.finfo(torch.float32).tiny).reshape(1, 1, 1)

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Store keys or values and read them back.

        Args:
            x: [..., H, n, D] of n tokens.
            scale: for granularity "tensor" what `scale` gave, broadcastable against x.
        """
        if not x.numel():
            return x
        if scale is not None:
            return (E4M3.round(x.float() / scale) * scale).to(x.dtype)
        rows = x.transpose(-1, -2) if self.granularity == "channel" else x
        if self.format == "fp8":
            out = Format(format="fp8", bits=8, group_size=self.group_size)(rows)
        else:
            parts = [_from_lowest(part, self.bits).flatten(1) for part in grouped(rows, self.group_size)]
            out = torch.cat(parts, dim=1).view(rows.shape)
        return out.transpose(-1, -2) if self.granularity == "channel" else out


class KVFormat(BaseModel):
    """How a KV cache is quantized.

    Attributes:
        keys: the keys, after their rotary embedding.
        values: the values.
        residual: newest tokens that stay in the model's dtype. Per channel they are fewer: when this many have come
            together, all of them are quantized at once.
        prefill: what the attention over a prompt reads. "quantized": the cache as it is stored afterwards, so that a
            scored answer depends on it. "exact": the keys and values as they were computed, as in KIVI's code, where
            only tokens that are generated read the cache.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    keys: KVSide | None = None
    values: KVSide | None = None
    residual: Annotated[int, Field(ge=0)] = 128
    prefill: Literal["quantized", "exact"] = "quantized"

    @model_validator(mode="before")
    @classmethod
    def _granularities(cls, data: Any) -> Any:
        """KIVI's granularities: keys per channel, values per token."""
        if not isinstance(data, dict):
            return data
        usual = {"keys": "channel", "values": "token"}
        filled = {
            name: {"granularity": usual[name], **side} if isinstance(side := data[name], dict) else side
            for name in usual.keys() & data.keys()
        }
        return {**data, **filled}

    @model_validator(mode="after")
    def _consistent(self) -> KVFormat:
        if self.keys is None and self.values is None:
            raise ValueError("give `keys`, `values` or both; leave `kv` out for a cache in full precision")
        for name in ("keys", "values"):
            side: KVSide | None = getattr(self, name)
            if side is not None and side.granularity == "channel" and self.residual % side.group_size:
                size = side.group_size
                raise ValueError(
                    f"`residual` is {self.residual}, no multiple of the {size} tokens of a group of {name}"
                )
            if side is not None and side.granularity == "channel" and self.residual == 0:
                raise ValueError(
                    f"`residual` of 0 tokens leaves no group of {name} to wait for; take granularity token"
                )
        return self

    def stored(self, side: KVSide, tokens: int) -> int:
        """How many of a sequence's first tokens are quantized once the cache holds `tokens`."""
        if side.granularity == "channel":
            return tokens // self.residual * self.residual
        return max(tokens - self.residual, 0)

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of the keys and of the values; 16 stand for no quantization."""
        keys, values = (16 if side is None else side.bits for side in (self.keys, self.values))
        return keys, values

    @property
    def label(self) -> str:
        """The format in words, such as "KV2" or "K4V2"."""
        keys, values = self.bits
        return f"KV{keys}" if keys == values else f"K{keys}V{values}"


def _from_lowest(x: Tensor, bits: int) -> Tensor:
    """Round x [..., G] to 2^bits levels from its lowest to its highest value, each step in x's dtype.

    A group of one repeated value is exact, and one with a NaN becomes NaN.

    Source:
        KIVI (Liu et al., ICML 2024); jy-yuan/KIVI at 876b4d2, quant/new_pack.py.
    """
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    levels = ((x - low) / scale.masked_fill(scale == 0, 1)).clamp(0, 2**bits - 1).round()
    stored = levels * scale + low
    largest = torch.finfo(x.dtype).max
    wide = (high - low > largest / 2) & low.isfinite() & high.isfinite()
    if bool(wide.any()):  # steps overflow where the range is so wide, and those of a quarter of it do not
        quarter = _from_lowest(torch.where(wide, x / 4, 0), bits)
        stored = torch.where(wide, (4 * quarter).clamp(-largest, largest), stored)
    return stored
