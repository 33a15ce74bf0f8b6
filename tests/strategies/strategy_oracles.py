"""The maths once more, in float64 numpy and plain loops, written from the formulas and not from the code."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def quantize_group(group: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Fake-quantized values of one group, and how far each stood from a rounding boundary, in levels."""
    low, high = group.min(), group.max()
    if low == high:
        return group.copy(), np.full(len(group), 0.5)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale, zero, lower, upper = max(-low, high) / top, 0.0, -top, top
    else:
        upper, lower = 2**bits - 1, 0
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / upper
        zero = float(np.round(-low / scale))
    levels = np.clip(np.round(group / scale) + zero, lower, upper)
    margin = np.abs(np.abs(group / scale - np.floor(group / scale)) - 0.5)
    if not symmetric:
        margin = np.minimum(margin, abs(abs(-low / scale - math.floor(-low / scale)) - 0.5))
    return (levels - zero) * scale, margin


def fake_quantize(x: Array, bits: int, group_size: int | None, symmetric: bool) -> tuple[Array, Array]:
    """Over the last dimension of [..., D], the last group shorter where it must be."""
    out, margin = np.empty_like(x), np.empty_like(x)
    for row in np.ndindex(*x.shape[:-1]):
        step = group_size or x.shape[-1]
        for start in range(0, x.shape[-1], step):
            part = slice(start, start + step)
            out[row][part], margin[row][part] = quantize_group(x[row][part], bits, symmetric)
    return out, margin


def percentile(values: Array, percent: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(float(v) for v in values)
    place = (len(ordered) - 1) * percent / 100
    below = min(math.floor(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def clip_quantize(x: Array, bits: int, percent: float) -> Array:
    clipped = np.empty_like(x)
    for row in np.ndindex(*x.shape[:-1]):
        bound = percentile(np.abs(x[row]), percent)
        clipped[row] = np.clip(x[row], -bound, bound)
    return fake_quantize(clipped, bits, None, True)[0]


def min_max(scores: Array, epsilon: float = 1e-6) -> Array:
    out = np.empty_like(scores)
    for row, values in enumerate(scores):
        low, high = values.min(), values.max()
        out[row] = (values - low + epsilon) / (high - low + epsilon)
    return out


def mean_rank(values: Array) -> Array:
    """Rank from below, from 0; equal values share the mean of theirs."""
    ranks = []
    for value in values:
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        ranks.append(below + (equal - 1) / 2)
    return np.array(ranks)


def greedy_log_det(kernel: Array, keep: int) -> list[tuple[int, float, float]]:
    """Greedy MAP of a DPP, taken literally: each step adds the token with the largest log det of the rest.

    Returns:
        (token, log of its gain, lead over the runner-up in log det) for each step, as long as any gains.
    """
    chosen: list[int] = []
    steps: list[tuple[int, float, float]] = []
    held = 0.0
    for _ in range(keep):
        values = np.full(len(kernel), -np.inf)
        for token in set(range(len(kernel))) - set(chosen):
            rows = [*chosen, token]
            sign, value = np.linalg.slogdet(kernel[np.ix_(rows, rows)])
            values[token] = value if sign > 0 else -np.inf
        best = int(values.argmax())
        if not np.isfinite(values[best]):
            break  # past the kernel's rank
        others = np.delete(values, [*chosen, best])
        lead = float(values[best] - others.max()) if len(others) else np.inf
        steps.append((best, float(values[best]) - held, lead))
        chosen.append(best)
        held = float(values[best])
    return steps


def follow_greedy(rows: Array, quality: Array, order: list[int]) -> int:
    """Check the steps of a greedy MAP against residuals found anew by an SVD of the chosen directions.

    A step is judged up to what float32 rows can tell. A token whose residual is too small for that must come after all
    whose residual is plain, and of such tokens that come one behind the other the better one first.

    Args:
        rows: [N, D] features.
        quality: [N].
        order: the tokens in the order of choice.

    Returns:
        Number of steps that could be judged.
    """
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(size > 0, size, 1)
    spanned = False
    for step, token in enumerate(order):
        rest = [other for other in range(len(rows)) if other not in order[:step]]
        if spanned:  # nothing is left but quality
            assert token == max(rest, key=lambda other: (quality[other], -other))
            continue
        chosen = directions[order[:step]]
        _, values, right = np.linalg.svd(chosen, full_matrices=False)
        basis = right[values > 1e-6]
        weakest = values.min(initial=1.0)
        residual = np.square(directions - directions @ basis.T @ basis).sum(axis=1)
        unclear = 1e-12 * (1 + step / max(weakest, 1e-9) ** 2)
        if unclear > 1e-4:
            return step  # rounded features say nothing more about this step, nor about what follows
        gain, error = quality**2 * residual, quality**2 * 1e-12
        if residual[rest].max() > unclear:
            assert residual[token] > unclear / 1e4
            assert gain[token] + error[token] >= max(
                gain[other] - error[other] for other in rest if residual[other] > unclear
            )
            exact = [other for other in rest if gain[other] == gain[token] and residual[other] == residual[token]]
            assert step or token == exact[0], "the first of equal tokens"
        elif residual[rest].max() < unclear / 1e4 or len(basis) == rows.shape[1]:
            spanned = True
            assert token == max(rest, key=lambda other: (quality[other], -other))
        else:
            return step
    return len(order)


def unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def visionzip(
    attention: Array, keys: Array, heads: int, patches: Array, dominant: int, contextual: int
) -> tuple[list[int], Array, float]:
    """One image: dominant indices, contextual tokens, and the smallest lead of any decision."""
    count = len(attention)
    ranked = sorted(range(count), key=lambda token: (-attention[token], token))
    lead = attention[ranked[dominant - 1]] - attention[ranked[dominant]] if dominant < count else 1.0
    kept = sorted(ranked[:dominant])
    rest = [token for token in range(count) if token not in kept]
    metric = unit(keys.reshape(count, heads, -1).mean(axis=1))
    if not contextual:
        return kept, np.zeros((0, patches.shape[1])), lead
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token not in targets:
            cosines = [float(metric[token] @ metric[target]) for target in targets]
            best = int(np.argmax(cosines))
            if len(targets) > 1:
                lead = min(lead, cosines[best] - max(cosines[:best] + cosines[best + 1 :]))
            groups[targets[best]].append(token)
    merged = [patches[t] + sum(patches[m] for m in groups[t]) / max(len(groups[t]), 1) for t in targets]
    return kept, np.array(merged), lead
