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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

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


def picture(control: Line, others: Sequence[Line]) -> str:
    """An SVG with the difference of each row to the control, in points, and its 95 % interval."""
    ordered = sorted(others, key=lambda line: line.lost - line.gained)
    edge = max(1.0, *(100 * max(abs(line.low), abs(line.high)) for line in ordered))
    step, left, width, top = 22, 230, 420, 34

    def at(points: float) -> float:
        return left + width * (points + edge) / (2 * edge)

    height = top + step * len(ordered) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{left + width + 70}" height="{height}" fill="white"/>',
        f'<text x="8" y="18">Points gained over &quot;{escape(control.name)}&quot; ({100 * control.right:.1f} %, '
        f"n = {control.n}); lines are 95 % intervals</text>",
        f'<line x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{top - 8}" y2="{height - 20}" stroke="#888"/>',
    ]
    for place, line in enumerate(ordered):
        y, middle = top + step * place + 8, 100 * (line.gained - line.lost) / line.n
        low, high = at(100 * line.low), at(100 * line.high)
        parts += [
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(line.name)}</text>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#3465a4" stroke-width="2"/>',
            f'<circle cx="{at(middle):.1f}" cy="{y}" r="4" fill="#3465a4"/>',
            f'<text x="{left + width + 10}" y="{y + 4}">{middle:+.1f}</text>',
        ]
    for mark in range(-int(edge), int(edge) + 1):
        if mark % 2 == 0:
            parts.append(f'<text x="{at(mark):.1f}" y="{height - 6}" text-anchor="middle" fill="#555">{mark:+d}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--model", default="diagram-llava-outliers:strength=12")
    parser.add_argument("--against", default="constant", help="name of the control")
    parser.add_argument("--questions", type=int, default=3600)
    parser.add_argument("--rows", nargs="*", default=[], help="names of the rows that are tested together; all")
    parser.add_argument("--without", nargs="*", default=[], help="names of rows that the picture leaves out")
    parser.add_argument("--picture", type=Path, help="an SVG to write")
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
    if args.picture:
        shown = [line for line in others if line.name not in args.without]
        args.picture.write_text(picture(control, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
