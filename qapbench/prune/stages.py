"""Where a pruner inside the decoder drops tokens of one view, and how many each drop leaves."""

from __future__ import annotations

from collections.abc import Sequence

from qapbench.errors import Problem, UserError
from qapbench.methods.decoder_pruner import DecoderPruner, Stage


def scheduled(steps: Sequence[Stage], count: int, depth: int) -> dict[int, int]:
    """Budgets of the drops of one view that a spec says: index of the first layer after a drop -> tokens that it keeps.

    Args:
        steps: the drops, with the view's own budgets.
        count: number of tokens of the view. A drop that would leave no fewer than there are is none.
        depth: number of the decoder's layers.

    Raises:
        UserError: the decoder has no layer behind a drop.
    """
    found, left = {}, count
    for index, step in enumerate(steps):
        if step.after >= depth:
            message = f"a drop is between two of the decoder's {depth} layers: after 1 to {depth - 1} of them"
            raise UserError(Problem(f"{message} (got {step.after})", ("prune", "schedule", index, "layer")))
        if step.keep < left:
            found[step.after] = left = step.keep
    return found


def stage_budgets(pruner: DecoderPruner, count: int, keep: int, depth: int) -> dict[int, int]:
    """Budgets of the stages of one view: index of the first layer after a stage -> tokens that it keeps.

    Args:
        pruner: says where it drops tokens.
        count: number of tokens of the view.
        keep: its budget, counted as the pruner counts.
        depth: number of the decoder's layers.

    Raises:
        RuntimeError: the pruner's stages do not lead to the budget.
    """
    if keep == count:
        return {}
    name = type(pruner).__name__
    stages = pruner.stages(count, max(keep, 1), depth)
    places, budgets = [stage.after for stage in stages], [count, *(stage.keep for stage in stages)]
    ends = [*places, depth]
    mean = sum(left * (end - start) for left, start, end in zip(budgets, [0, *places], ends, strict=True)) / depth
    wanted = max(keep, 1)
    off = abs(mean - wanted) > count / depth if pruner.counts == "mean" else budgets[-1] != wanted
    if budgets != sorted(budgets, reverse=True) or budgets[-1] < 0 or off:
        raise RuntimeError(f"{name}: {stages} do not lead from {count} to {keep} tokens")
    if places != sorted(set(places)) or not 1 <= places[0] <= places[-1] < depth:
        raise RuntimeError(f"{name}: {stages} are not in order between {depth} layers")
    return {stage.after: stage.keep if keep else 0 for stage in stages}


def layer_counts(stages: dict[int, int], count: int, depth: int) -> list[int]:
    """Tokens of one view that each of the `depth` layers receives, from what `stage_budgets` gives."""
    left, counts = count, []
    for layer in range(depth):
        left = stages.get(layer, left)
        counts.append(left)
    return counts
