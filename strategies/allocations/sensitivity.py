"""Bits by sensitivity: the layers whose rounding disturbs the model most get more bits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qapbench import UserError, allocation

MOST = 10_000  # steps that a budget is cut into, at most


@allocation("sensitivity", default=True)
def sensitivity(errors: Tensor, bits: Sequence[int], sizes: Sequence[int], mean: float) -> list[int]:
    """Choose bits b_l with the least sum of errors e_l(b_l), so that sum n_l b_l is at most `mean` times sum n_l.

    This takes the errors of layers to add up. The choice is exact, by dynamic programming over the bits that are left
    (a knapsack of which each layer takes one of its choices). Where the budget has more than 10,000 steps, layers count
    as a step more than they are, so that the budget still holds. Of equal sums, earlier layers have fewer bits.

    Args:
        errors: [L, B] error of the model if only layer l is rounded, with the b-th number of bits.
        bits: the B numbers of bits to choose from, ascending.
        sizes: number of weights n_l of each layer.
        mean: bits per weight, mean over all weights, that may be reached.

    Source:
        No published code. QUOTA (arXiv 2604.17320) has budgets by layer for weights, cache and tokens together; this is
        a choice of the same kind for weights alone, and nothing of it is verified against that paper.
    """
    spare = int(mean * sum(sizes) + 1e-6) - bits[0] * sum(sizes)
    if spare < 0:
        raise UserError(f"a mean of {mean:g} bits is less than the fewest of the choices, {bits[0]}")
    extra = [[size * (one - bits[0]) for one in bits] for size in sizes]
    unit = max(math.gcd(*(cost for row in extra for cost in row)), math.ceil(spare / MOST), 1)
    steps = spare // unit
    least = torch.zeros(steps + 1, dtype=torch.float64)  # least sum of errors of the layers behind, by steps left
    chosen: list[Tensor] = []
    for row, costs in zip(reversed(errors.double()), reversed(extra), strict=True):
        new, best = torch.full_like(least, torch.inf), torch.zeros(steps + 1, dtype=torch.long)
        for index, cost in enumerate(costs):
            taken = math.ceil(cost / unit)
            if taken <= steps:
                total = least[: steps + 1 - taken] + row[index]
                better = total < new[taken:]
                new[taken:], best[taken:] = (
                    torch.where(better, total, new[taken:]),
                    torch.where(better, index, best[taken:]),
                )
        least = new
        chosen.append(best)
    found, left = [], steps
    for best, costs in zip(reversed(chosen), extra, strict=True):
        found.append(int(best[left]))
        left -= math.ceil(costs[found[-1]] / unit)
    return found
