"""Greedy maximum coverage, which the pruners SCOPE and MMTok have in common."""

from collections.abc import Callable

import torch
from torch import Tensor


def greedy_coverage(rows: Tensor, keep: int, worth: Callable[[Tensor], Tensor] = lambda gains: gains) -> Tensor:
    """Choose the tokens that cover the rows best, one after another.

    How well a row i is covered is c_i = max over the chosen tokens j of rows_ij, and 0 as long as nothing is chosen.
    Each next token is the one of the highest worth, which follows from its gain: the sum over i of
    max(0, rows_ij - c_i). Ties go to the lower index.

    Args:
        rows: [B, M, N] how well each of N tokens covers each of M rows.
        keep: number of tokens to choose per image, at most N.
        worth: makes of the gains [B, N] the values of which the highest is taken; the gains themselves by default.

    Returns:
        [B, keep] distinct indices, in the order of choice.
    """
    columns = rows.mT.contiguous()
    batch, count, size = columns.shape
    images = torch.arange(batch, device=rows.device)
    covered = rows.new_zeros(batch, 1, size)
    taken = torch.zeros(batch, count, dtype=torch.bool, device=rows.device)
    order = torch.empty(batch, keep, dtype=torch.long, device=rows.device)
    for step in range(keep):
        gains = (columns - covered).clamp_(min=0).sum(dim=-1)
        chosen = worth(gains).masked_fill(taken, -torch.inf).argmax(dim=-1)
        order[:, step] = chosen
        taken[images, chosen] = True
        covered = torch.maximum(covered, columns[images, chosen].unsqueeze(1))
    return order
