"""Scores that do not depend on quantization, as controls for sensitivity metrics. The plugin of `controls.yaml`."""

import torch
from torch import Tensor

from qapbench import metric


@metric("constant")
def constant(tokens: Tensor) -> Tensor:
    """s_i = 1 for every token, which shows what the fusion alone does to the relevance."""
    return torch.ones(tokens.shape[:2], device=tokens.device)


@metric("noise")
def noise(tokens: Tensor, seed: int = 0) -> Tensor:
    """Noise, uniform in [0, 1), from a hash of the token's values. Equal tokens have equal scores.

    Args:
        tokens: [B, N, D] visual tokens.
        seed: selects one of several hashes.
    """
    bits = tokens.float().contiguous().view(torch.int32).long().sum(dim=-1)
    for factor in (2654435761 + 2 * seed, 2246822519):  # odd, so that multiplication modulo 2^32 is one-to-one
        bits = (bits * factor) % 2**32
        bits = bits ^ (bits >> 15)
    return (bits.double() / 2**32).float()


@metric("least_variance")
def least_variance(tokens: Tensor) -> Tensor:
    """The negated variance over channels, the opposite of the metric `variance`."""
    return -tokens.var(dim=-1, correction=0)
