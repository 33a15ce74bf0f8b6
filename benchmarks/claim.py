"""Paired comparison of all rows of a model with one of them, corrected over all comparisons, and what could be seen.

    python -m benchmarks.claim --runs runs --model diagram-llava-outliers:strength=12 --against constant --questions 900

The rows are the finished runs in the folder with this model and this number of questions. The accuracy of each is
compared with that of the control on the same questions (exact McNemar test), and q is the Benjamini-Hochberg value over
all rows. `smallest` is the difference, in points, that such a comparison finds with probability 0.8 at p = 0.01, given
the share of questions that flip between the two rows.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import false_discovery_control, norm

from qapbench.analysis.paired import compare, read_scored
from qapbench.errors import UserError, nearest
from qapbench.records.load import load_records

LEVEL, POWER = 0.01, 0.8


@dataclass(frozen=True)
class Line:
    """One row against the control.

    Attributes:
        name: name of the row.
        right: share of right answers.
        n: number of questions.
        gained: questions that the row answers right and the control does not.
        lost: the reverse.
        low: lower end of the 95 % interval of the difference, as a share.
        high: upper end of it.
        p: p value of the exact McNemar test.
    """

    name: str
    right: float
    n: int
    gained: int
    lost: int
    low: float
    high: float
    p: float

    @property
    def smallest(self) -> float:
        """The smallest difference that is found with probability POWER at LEVEL, as a share."""
        return smallest_effect((self.gained + self.lost) / self.n, self.n)


def smallest_effect(flips: float, n: int, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest difference of two paired accuracies that a test finds.

    Of the questions that flip, a share (flips + d) / 2 is gained and (flips - d) / 2 is lost; the difference d has a
    standard error of sqrt(flips / n), in the normal approximation.

    Args:
        flips: share of the questions that one row answers right and the other does not.
        n: number of questions.
        level: two-sided level of the test.
        power: probability of finding it.
    """
    return float(norm.isf(level / 2) + norm.ppf(power)) * math.sqrt(flips / n)


def lines(runs: Path, model: str, questions: int, against: str, rows: list[str]) -> tuple[Line, list[Line]]:
    """The control and the other finished rows, compared with it.

    Args:
        runs: folder of the runs.
        model: the model as the runs' specs name it.
        questions: number of questions that the runs asked.
        against: name of the control.
        rows: names of the rows to compare; all if empty.

    Raises:
        UserError: no finished run has the control's name.
    """
    made = {}
    for record in load_records(runs):
        scored = read_scored(runs / record.run_id, record=record)
        if record.spec.get("model") == model and len(scored.rows) == questions:
            made[record.name] = scored
    if against not in made:
        raise UserError(f"no run '{against}' of {model} with {questions} questions in {runs}; {nearest(against, made)}")
    found = []
    for name, row in made.items():
        if rows and name not in (*rows, against):
            continue
        difference = next(d for d in compare(made[against], row).differences if d.column == row.score)
        right = float(np.mean([scores[str(row.score)] for scores in row.rows.values()]))
        d = difference
        found.append(Line(name, right, d.n, d.gained, d.lost, d.low, d.high, d.p))
    return next(line for line in found if line.name == against), [line for line in found if line.name != against]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--model", default="diagram-llava-outliers:strength=12")
    parser.add_argument("--against", default="constant", help="name of the control")
    parser.add_argument("--questions", type=int, default=3600)
    parser.add_argument("--rows", nargs="*", default=[], help="names of the rows that are tested together; all")
    args = parser.parse_args()
    try:
        control, others = lines(args.runs, args.model, args.questions, args.against, args.rows)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    corrected = list(false_discovery_control([line.p for line in others])) if others else []
    print("| row | right, % | difference, points | 95 % | gained | lost | p | q | smallest |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    print(f"| {control.name} (control), n = {control.n} | {100 * control.right:.2f} | | | | | | | |")
    for line, q in sorted(zip(others, corrected, strict=True), key=lambda pair: -pair[0].right):
        change = 100 * (line.gained - line.lost) / line.n
        interval = f"{100 * line.low:+.1f} to {100 * line.high:+.1f}"
        print(
            f"| {line.name} | {100 * line.right:.2f} | {change:+.2f} | {interval} | {line.gained} | {line.lost} "
            f"| {line.p:.2g} | {q:.2g} | {100 * line.smallest:.1f} |"
        )


if __name__ == "__main__":
    main()
