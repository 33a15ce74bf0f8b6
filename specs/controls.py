"""Scores that do not depend on quantization, as controls for sensitivity metrics. The plugin of `controls.yaml`."""

import torch
from torch import Tensor

from qapbench import metric, metrics


@metric("constant")
def constant(tokens: Tensor) -> Tensor:
    """Score every token 1: [B, N, D] -> [B, N]. It shows what the fusion alone does to the relevance.

    Args:
        tokens: [B, N, D] visual tokens.

    Source:
        No paper. A control of this benchmark.
    """
    return torch.ones(tokens.shape[:2], device=tokens.device)


@metric("noise")
def noise(tokens: Tensor, seed: int = 0) -> Tensor:
    """Score each token by a hash of its values, uniform in [0, 1): [B, N, D] -> [B, N].

    Equal tokens get equal scores.

    Args:
        tokens: [B, N, D] visual tokens.
        seed: selects one of several hash functions. Different seeds give uncorrelated scores.

    Source:
        No paper. A control of this benchmark.
    """
    bits = tokens.float().contiguous().view(torch.int32).long().sum(dim=-1)
    for factor in (2654435761 + 2 * seed, 2246822519):  # odd, so that multiplication modulo 2^32 is one-to-one
        bits = (bits * factor) % 2**32
        bits = bits ^ (bits >> 15)
    return (bits.double() / 2**32).float()


@metric("least_variance")
def least_variance(tokens: Tensor) -> Tensor:
    """Compute the negated variance of each token over its channels: [B, N, D] -> [B, N].

    It is the opposite of the metric `variance`.

    Args:
        tokens: [B, N, D] visual tokens.

    Source:
        No paper. A control of this benchmark.
    """
    return -tokens.var(dim=-1, correction=0)


@metric("reversed")
def reversed_metric(tokens: Tensor, of: str = "combined") -> Tensor:
    """Compute the negated scores of another metric, with its default parameters: [B, N, D] -> [B, N].

    If sensitive tokens should be kept, this loses what the metric gains; if they should be dropped, it gains.

    Args:
        tokens: [B, N, D] visual tokens.
        of: name of the other metric.

    Source:
        No paper. A control of this benchmark.
    """
    return -metrics.create(of)(tokens)
