"""Gives metrics that look at the language model its first norm and linears, in full precision."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from qapbench.methods.measure import Measure
from qapbench.methods.reads import FirstReads
from qapbench.models import Family
from qapbench.models.layers import DecoderLayers
from qapbench.quantize.install import full_weight


def on_model(measure: Measure, family: Family) -> Measure:
    """The metric as it is called with nothing but tokens on one model.

    Args:
        measure: the metric.
        family: the model.

    Raises:
        UserError: the metric looks at linears that this model's decoder does not have.
    """
    return dataclasses.replace(measure, reads=first_reads(family.decoder)) if measure.needs else measure


def first_reads(decoder: DecoderLayers) -> FirstReads:
    """How a decoder first reads tokens. Weights are those of the full-precision model, also while it is quantized.

    Args:
        decoder: the decoder's layers.

    Raises:
        UserError: its first layer has no linears for query, key and value.
    """
    linears = decoder.readers(0)
    device, dtype = linears[0].weight.device, linears[0].weight.dtype
    weights = tuple(full_weight(linear).to(device).float() for linear in linears)
    biases = [None if linear.bias is None else linear.bias.detach().float() for linear in linears]

    def attention(x: Tensor) -> Tensor:
        query, key = (functional.linear(x, weights[i], biases[i]) for i in range(2))
        return torch.stack([decoder.context(0, q, k) for q, k in zip(query, key, strict=True)])

    return FirstReads(lambda tokens: decoder.normed(0, tokens.to(dtype)).float(), weights, attention)
