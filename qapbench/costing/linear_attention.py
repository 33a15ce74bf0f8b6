"""What a layer with linear attention computes and holds: a gated delta rule, as in Qwen3-Next and Qwen3.5."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qapbench.models.layers import LINEAR

CHUNK = 64  # tokens of a chunk
STATE_BYTES = 4  # of a value of the state, which is float32 whatever the model's dtype is


@dataclass(frozen=True)
class LinearAttention:
    """The linear attention of a decoder layer, beside its linears.

    Attributes:
        heads: number of heads of its values, each with a state.
        key_width: width of a head's keys.
        value_width: width of a head's values.
        channels: width of queries, keys and values together, over which a convolution runs.
        kernel: tokens that the convolution spans.
    """

    heads: int
    key_width: int
    value_width: int
    channels: int
    kernel: int

    @classmethod
    def of(cls, text: Any, index: int) -> LinearAttention | None:
        """The linear attention of a layer; None if the layer has keys and values.

        Args:
            text: config of the language model.
            index: index of the layer.
        """
        kinds = getattr(text, "layer_types", None)
        if not kinds or kinds[index] != LINEAR:
            return None
        keys = text.linear_key_head_dim * text.linear_num_key_heads
        values = text.linear_value_head_dim * text.linear_num_value_heads
        return cls(
            text.linear_num_value_heads,
            text.linear_key_head_dim,
            text.linear_value_head_dim,
            2 * keys + values,
            text.linear_conv_kernel_dim,
        )

    def prefill_flops(self, tokens: float) -> float:
        """FLOPs of the convolution and of the matrix products over the chunks of a prompt, the last one filled up.

        In a chunk of C tokens, keys meet keys and queries keys (2 C^2 key_width each), these weigh values
        (2 C^2 value_width), and three products of 2 C key_width value_width read the state twice and write it. The
        triangular system of a chunk is not counted, as in `torch.utils.flop_counter`.
        """
        padded = math.ceil(tokens / CHUNK) * CHUNK
        inner = CHUNK * (4 * self.key_width + 2 * self.value_width)
        return self._convolution(tokens + self.kernel - 1) + padded * self.heads * (
            inner + 6 * self.key_width * self.value_width
        )

    @property
    def step_flops(self) -> float:
        """FLOPs of the convolution for one decoded token. The state is updated by elementwise operations."""
        return self._convolution(2)

    def held(self, value_bytes: int) -> int:
        """Bytes that a KV cache holds of the layer, however long the prompt is.

        Args:
            value_bytes: bytes of a value of the model's dtype, in which the convolution's last inputs are held.
        """
        state = self.heads * self.key_width * self.value_width * STATE_BYTES
        return self.channels * self.kernel * value_bytes + state

    def _convolution(self, places: float) -> float:
        """FLOPs of the convolution of every channel at so many places."""
        return 2 * self.kernel * self.channels * places
