"""What a sensitivity has to beat: scores that know nothing of quantization. A plugin of `controls.yaml`."""

import torch
from torch import Tensor

from qapbench import metric


@metric("constant")
def constant(tokens: Tensor) -> Tensor:
    """s_i = 1: what the fusion alone does to the relevance."""
    return torch.ones(tokens.shape[:2], device=tokens.device)


@metric("noise")
def noise(tokens: Tensor, seed: int = 0) -> Tensor:
    """Uniform in [0, 1), a hash of the token's bits: equal tokens have equal scores, wherever they are."""
    bits = tokens.float().contiguous().view(torch.int32).long().sum(dim=-1)
    for factor in (2654435761 + 2 * seed, 2246822519):  # odd, so that nothing collapses modulo 2^32
        bits = (bits * factor) % 2**32
        bits = bits ^ (bits >> 15)
    return (bits.double() / 2**32).float()


@metric("least_variance")
def least_variance(tokens: Tensor) -> Tensor:
    """Minus the variance over channels: the opposite of a sensitivity."""
    return -tokens.var(dim=-1, correction=0)
