"""Draws accuracy over cost for the rows of a spec: the Pareto frontier as a line, and dominated rows faded.

    python -m benchmarks.pareto table1 --runs runs --out pareto.svg
    python -m benchmarks.pareto table2 --set task.limit=300 --cost kv_mb --out pareto.svg

Runs that are missing in the folder are made first. Costs are those of the records, as the page shows them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from qapbench.errors import UserError, nearest
from qapbench.leaderboard.builder import OVERALL
from qapbench.leaderboard.costs import COSTS, costs_of
from qapbench.leaderboard.rows import from_record
from qapbench.records.profile import read_profiles
from qapbench.records.record import Record
from qapbench.running.execute import run
from qapbench.spec.spec_file import load_spec

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 60, 250, 44, 44  # pixels; the names stand at the right
STEP = 16  # pixels between two names at least
LABEL = 66  # pixels that a label of the axis of costs takes
BLUE, GREY = "#2f7ec4", "#555"
FADED = 0.35  # opacity of dominated rows


@dataclass(frozen=True)
class Point:
    """One row.

    Attributes:
        name: its name.
        cost: what it costs.
        accuracy: share of right answers.
        low: lower end of its 95 % interval.
        high: upper end of it.
    """

    name: str
    cost: float
    accuracy: float
    low: float
    high: float

    def dominates(self, other: Point) -> bool:
        """Whether it is at least as good in both respects, and better in one."""
        no_worse = self.cost <= other.cost and self.accuracy >= other.accuracy
        return no_worse and (self.cost, self.accuracy) != (other.cost, other.accuracy)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates, by cost."""
    best = [one for one in points if not any(other.dominates(one) for other in points)]
    return sorted(best, key=lambda point: point.cost)


def points_of(records: Sequence[Record], runs: Path, cost: str) -> list[Point]:
    """The rows of some records that have this cost.

    Args:
        records: the records.
        runs: folder of the runs, which measured times are read from.
        cost: name of a column of `qapbench.leaderboard.costs.COSTS`.
    """
    profiles = read_profiles(runs)
    found = []
    for record in records:
        cell, costs = from_record(record).cells[OVERALL], costs_of(record, profiles.get(record.run_id))
        if cost in costs and cell.accuracy is not None:
            low, high = (cell.accuracy if end is None else end for end in (cell.low, cell.high))
            found.append(Point(record.name, costs[cost], cell.accuracy, low, high))
    return found


def picture(title: str, head: str, points: Sequence[Point]) -> str:
    """An SVG with a point for each row. The axis of costs is logarithmic.

    Args:
        title: what is shown.
        head: what the axis of costs is called.
        points: the rows.
    """
    costs = [point.cost for point in points]
    start, end = math.log(min(costs)) - 0.15, math.log(max(costs)) + 0.15
    bottom, top = min(point.low for point in points), max(point.high for point in points)

    def x(cost: float) -> float:
        return LEFT + WIDTH * (math.log(cost) - start) / (end - start)

    def y(share: float) -> float:
        return TOP + HEIGHT * (top - share) / (top - bottom or 1)

    best = frontier(points)
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="20" font-size="13">{escape(title)}</text>',
        f'<text x="{LEFT + WIDTH / 2}" y="{height - 6}" text-anchor="middle" fill="{GREY}">{escape(head)}</text>',
        f'<text x="8" y="{TOP - 8}" fill="{GREY}">accuracy, %</text>',
    ]
    for percent in range(math.ceil(100 * bottom), math.floor(100 * top) + 1):
        if percent % _spacing(100 * (top - bottom)) == 0:
            at = y(percent / 100)
            parts += [
                f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>',
                f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{GREY}">{percent}</text>',
            ]
    free = float(LEFT)  # pixel from which the axis has no label yet
    for cost in sorted({float(f"{cost:.3g}") for cost in costs}):
        if x(cost) - LABEL / 2 >= free:
            free = x(cost) + LABEL / 2
            parts.append(
                f'<text x="{x(cost):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle" fill="{GREY}">{cost:g}</text>'
            )
    line = [f"M{x(best[0].cost):.1f} {y(best[0].accuracy):.1f}"]
    line += [f"H{x(point.cost):.1f} V{y(point.accuracy):.1f}" for point in best[1:]]
    parts.append(
        f'<path d="{" ".join(line)} H{LEFT + WIDTH}" fill="none" stroke="#8a6fd1" stroke-width="4" opacity="0.35"/>'
    )
    ordered = sorted(points, key=lambda point: -point.accuracy)
    for point, label in zip(ordered, spread([y(point.accuracy) for point in ordered], STEP), strict=True):
        place, level = x(point.cost), y(point.accuracy)
        opacity = 1 if point in best else FADED
        parts += [
            f'<g opacity="{opacity}"><line x1="{place:.1f}" x2="{place:.1f}" y1="{y(point.low):.1f}" '
            f'y2="{y(point.high):.1f}" stroke="{BLUE}"/>',
            f'<circle cx="{place:.1f}" cy="{level:.1f}" r="4" fill="{BLUE}"/>',
            f'<path d="M{place:.1f} {level:.1f} L{LEFT + WIDTH + 6} {label:.1f}" stroke="#999" stroke-width="0.5"/>',
            f'<text x="{LEFT + WIDTH + 10}" y="{label + 4:.1f}">{escape(point.name)} '
            f"({100 * point.accuracy:.1f})</text></g>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def spread(levels: Sequence[float], step: float) -> list[float]:
    """Ascending levels moved as little as it takes for two neighbours to be `step` apart, their middle kept."""
    placed: list[list[float]] = []  # blocks of neighbours: [sum of levels, number]
    for level in levels:
        placed.append([level, 1])
        while len(placed) > 1 and _low(placed[-1], step) < _high(placed[-2], step) + step:
            total, count = placed.pop()
            placed[-1] = [placed[-1][0] + total, placed[-1][1] + count]
    return [_low(block, step) + step * at for block in placed for at in range(int(block[1]))]


def _low(block: list[float], step: float) -> float:
    return block[0] / block[1] - step * (block[1] - 1) / 2


def _high(block: list[float], step: float) -> float:
    return block[0] / block[1] + step * (block[1] - 1) / 2


def _spacing(points: float) -> int:
    """Percent points between two lines of the grid."""
    return next((space for space in (1, 2, 5, 10) if points / space <= 10), 20)


def main() -> None:
    """Make or read the runs, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="a spec file, or the name of a shipped spec")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a dotted key")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--cost", default="tbops", help=f"one of {', '.join(COSTS)}")
    parser.add_argument("--out", type=Path, required=True, help="the SVG")
    given = parser.parse_args()
    try:
        if given.cost not in COSTS:
            raise UserError(f"--cost: no cost '{given.cost}'; {nearest(given.cost, COSTS)}")
        records = run(load_spec(given.spec, given.set), given.runs)
        points = points_of(records, given.runs, given.cost)
        if not points:
            raise UserError(f"--cost: no row has '{given.cost}'")
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    first = records[0]
    asked = f", {first.task.questions} questions of {first.task.name}" if first.task else ""
    title = f"{given.spec} on {first.spec['model']}{asked}"
    given.out.write_text(picture(title, COSTS[given.cost].head, points), encoding="utf-8")
    for point in sorted(points, key=lambda point: point.cost):
        mark = "frontier" if point in frontier(points) else ""
        print(f"{point.cost:10.4g}  {100 * point.accuracy:5.1f}  {point.name}  {mark}")


if __name__ == "__main__":
    main()
