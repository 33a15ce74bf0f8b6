"""The difference of two rows, averaged over budgets, strengths or quantizers, and tested over questions.

    python -m benchmarks.claim_over --runs runs --row combined --against constant
        [--cells 'strength 8*' 'strength 1*'] [--without 'strength 12, keep 24'] [--less 'strength 0*']

The runs are those of a spec with cases and `matrix: {prune.sensitivity: [...]}`, such as specs/budgets.yaml. A cell is
a case. Printed are the difference of the two rows in each cell (exact McNemar test), and that of all cells together:
for each question the mean over the cells, and Student's paired t over the questions, so that cells which flip on the
same questions count no more than they should. `--less` subtracts the mean difference of other cells.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from qapbench.analysis.paired import Difference, Scored, compare, paired_difference, read_scored
from qapbench.errors import UserError, nearest
from qapbench.records.load import load_records

AXIS = " sensitivity="  # between the name of a case and the value of the matrix, in the name of a run


def cells_of(runs: Path, cells: Iterable[str] = ("*",), without: Iterable[str] = ()) -> dict[str, dict[str, Scored]]:
    """The finished runs by case and sensitivity.

    Args:
        runs: folder of the runs.
        cells: patterns of the names of the cases.
        without: patterns of the names of cases that are left out.

    Raises:
        UserError: no run is of such a case.
    """
    found: dict[str, dict[str, Scored]] = {}
    seen = set()
    for record in load_records(runs):
        case, axis, value = record.name.partition(AXIS)
        if not axis:
            continue
        seen.add(case)
        if _matches(case, cells) and not _matches(case, without):
            row = "none" if value == "null" else value.strip('"')
            found.setdefault(case, {})[row] = read_scored(runs / record.run_id, record=record)
    if not found:
        raise UserError(f"no run of a case {', '.join(cells)} in {runs}; {nearest(' '.join(cells), seen)}")
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def cell_difference(cell: Mapping[str, Scored], row: str, against: str) -> Difference:
    """The difference of two rows of a cell, in the score of the task.

    Raises:
        UserError: the cell has no such row.
    """
    for name in (row, against):
        if name not in cell:
            raise UserError(f"no row '{name}'; {nearest(name, cell)}")
    return next(d for d in compare(cell[against], cell[row]).differences if d.column == cell[row].score)


def gains(cells: Iterable[Mapping[str, Scored]], row: str, against: str) -> dict[str, float]:
    """Question -> how much more right one row is than another, from -1 to 1: the mean over cells.

    Args:
        cells: sensitivity -> run, for each cell.
        row: the row whose gain it is.
        against: the row that it is compared with.

    Raises:
        UserError: the cells do not have the same questions.
    """
    differences = []
    for cell in cells:
        one, other = cell[row], cell[against]
        differences.append({q: one.rows[q][str(one.score)] - other.rows[q][str(other.score)] for q in one.rows})
    first = differences[0]
    if any(one.keys() != first.keys() for one in differences):
        raise UserError("the cells were asked different questions; a mean over cells needs the same ones in each")
    return {question: float(np.mean([one[question] for one in differences])) for question in first}


def pooled(gained: Mapping[str, float], less: Mapping[str, float] | None = None) -> Difference:
    """The mean gain over questions, with its interval and p value.

    Args:
        gained: what `gains` returns.
        less: the same of other cells, which is subtracted.
    """
    base = dict.fromkeys(gained, 0.0) if less is None else less
    pair = np.array([(base[question], gain) for question, gain in gained.items()], dtype=np.float64)
    return paired_difference("gain", pair)


def line(name: str, found: Difference) -> str:
    """A line of the table, in points."""
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"| {name} | {found.n} | {100 * found.difference:+.2f} | {interval} | {found.p:.2g} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--row", default="combined", help="sensitivity of the row whose gain it is")
    parser.add_argument("--against", default="constant", help="sensitivity of the row to compare it with, or none")
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns of the names of the cases")
    parser.add_argument("--without", nargs="*", default=[], help="patterns of cases that are left out")
    parser.add_argument("--less", nargs="*", default=[], help="patterns of cases whose mean gain is subtracted")
    given = parser.parse_args()
    try:
        cells = cells_of(given.runs, given.cells, given.without)
        single = {name: cell_difference(cell, given.row, given.against) for name, cell in cells.items()}
        less = cells_of(given.runs, given.less) if given.less else {}
        base = gains(less.values(), given.row, given.against) if less else None
        together = pooled(gains(cells.values(), given.row, given.against), base)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"| {given.row} against {given.against} | questions | points | 95 % | p |\n|---|--:|--:|--:|--:|")
    for name, found in sorted(single.items()):
        right, before = (100 * side / found.n for side in (found.second, found.first))
        print(line(f"{name} ({right:.1f} against {before:.1f})", found))
    minus = f", less the mean of {len(less)}" if less else ""
    print(line(f"mean of {len(cells)} cells{minus}", together))


if __name__ == "__main__":
    main()
