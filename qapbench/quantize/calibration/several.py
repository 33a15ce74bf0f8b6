"""Calibrates one model whose linears get different formats: each block sees the blocks before it as they will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qapbench.methods.plans import LinearPlan

from .blocks import Block
from .runner import BlockWork, Calibration
from .samples import CalibrationResult

Calibrating = Callable[[Calibration], CalibrationResult]
"""A method's `calibrate` for one pair of formats."""


class _Asked(Exception):
    """Raised where a method asks for work block by block that is not done yet."""

    def __init__(self, work: BlockWork) -> None:
        super().__init__("block by block")
        self.work = work


class _Answering(Calibration):
    """A calibration that answers with work that was done already, and stops the method at the first that was not.

    Args:
        runner: the calibration that does the work.
        answers: results of what the method asks for, in this order.
    """

    def __init__(self, runner: Calibration, answers: Iterator[CalibrationResult]) -> None:
        vars(self).update(vars(runner))
        self._answers = answers

    def block_by_block(
        self,
        linears: Mapping[str, nn.Linear],
        find: Callable[[Block], CalibrationResult],
        install: Callable[[dict[str, Tensor]], LinearPlan] | None = None,
        whole: bool = False,
    ) -> CalibrationResult:
        if (answer := next(self._answers, None)) is None:
            raise _Asked(BlockWork(linears, find, install, whole=whole))
        return answer


def calibrated_together(
    runner: Calibration, methods: Mapping[Any, tuple[Calibrating, list[str]]]
) -> dict[Any, CalibrationResult]:
    """What several formats' calibrations find, when all of them go through the model together.

    Each `calibrate` runs until it asks for work block by block. The work of all is then done together, and each runs
    again with the answer. Anything but work block by block, such as gradients, is therefore done anew.

    Args:
        runner: runs the samples.
        methods: for each pair of formats, `calibrate` and the names of the linears that have these formats.

    Returns:
        The result of each pair of formats, for its own linears.
    """
    answers: dict[Any, list[CalibrationResult]] = {pair: [] for pair in methods}
    found: dict[Any, CalibrationResult] = {}
    while len(found) < len(methods):
        works: dict[Any, BlockWork] = {}
        for pair, (calibrate, own) in methods.items():
            if pair in found:
                continue
            try:
                whole = calibrate(_Answering(runner, iter(answers[pair])))
                found[pair] = {name: whole[name] for name in own if name in whole}
            except _Asked as asked:
                works[pair] = asked.work if asked.work.whole else replace(asked.work, own=frozenset(own))
        if works:
            for pair, result in zip(works, runner.together(list(works.values())), strict=True):
                answers[pair].append(result)
    return found
