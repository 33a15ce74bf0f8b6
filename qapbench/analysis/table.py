"""Tables for the terminal: records, scores, comparisons and studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from qapbench.records.answer import Answer
from qapbench.records.record import Record

from .paired import Comparison, Difference
from .relative import Relative, relative_averages
from .study import Correlation, Summary

NAME, TOKENS, COLUMN, INTERVAL = (
    28,
    10,
    9,
    20,
)  # widths in characters: name of the run, tokens, one accuracy, interval and n

COMPARED = ("column", "n", "first", "second", "difference", "95 % interval", "gained", "lost", "p", "q")


def ablation_table(records: Iterable[Record], width: int = 200) -> Table:
    """A table with one row per run: measured tokens, accuracies in percent, and the interval of the task's score.

    Runs of several tasks have a column per task, and their relative average.

    Args:
        records: the runs.
        width: characters per line. If not everything fits, interval and n are left out first, then columns from the
            front.
    """
    records = list(records)
    names = list(dict.fromkeys(column.name for record in records for column in record.scores.columns))
    scores = {record.score.name for record in records if record.score}
    if len(scores) == 1:  # the task's score stands last, wherever the task lists it
        names.sort(key=lambda name: name in scores)
    room = width - NAME - TOKENS - 2
    detailed = room >= len(names) * COLUMN + INTERVAL
    shown = names[-max(1, room // COLUMN) :]
    relative = relative_averages(records) if any(record.parts for record in records) else []
    table = Table(title="Accuracy, %", title_justify="left", caption_justify="left")
    table.add_column("run", style="bold", min_width=NAME - 4)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    if relative:
        table.add_column("relative", justify="right", no_wrap=True)
    if detailed:
        table.add_column("95 %", justify="right", no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
    for place, record in enumerate(records):
        columns = {column.name: column.model_dump() for column in record.scores.columns}
        last = columns.get(names[-1], {}) if names else {}
        tokens = f"{record.tokens.mean:g}" if record.tokens else "–"
        details = [_interval(last), str(last.get("n") or "")] if detailed else []
        shares = [_share(relative[place])] if relative else []
        table.add_row(escape(record.name), tokens, *(_cell(columns.get(name)) for name in shown), *shares, *details)
    notes = ["relative: % of the full-precision model, mean over tasks"] if relative else []
    notes += [f"Wilson interval of {names[-1]}"] if detailed and names else []
    notes += [f"not shown for lack of width: {', '.join(names[: -len(shown)])}"] if len(shown) < len(names) else []
    table.caption = "; ".join(notes) or None
    return table


def scores_table(scores: dict[str, Any]) -> Table:
    """A table with one row per column: accuracy in percent, counts and interval, or why it is unavailable.

    Args:
        scores: as `Scores.to_json` gives them.
    """
    table = Table()
    for name in ("column", "accuracy", "k / n", "95 % interval"):
        table.add_column(name, justify="left" if name == "column" else "right")
    for column in scores["columns"]:
        if "unavailable" in column:
            table.add_row(escape(column["name"]), "–", "", escape(column["unavailable"]))
        else:
            kind = "mean of" if "mean" in column else "of"
            counts = f"{column['k']} / {column['n']}" if "k" in column else f"{kind} {column['n']}"
            table.add_row(escape(column["name"]), _cell(column), counts, _interval(column))
    unparsed = scores["unparsed"]
    table.add_row("unparsed", f"{100 * unparsed['rate']:.2f}", f"{unparsed['k']} / {unparsed['n']}", "")
    for name, meaning in (("missing", "no stored output: counted as wrong"), ("unknown", "not in the data: left out")):
        if scores.get(name):
            table.add_row(f"[yellow]{name}[/]", "", str(scores[name]), meaning)
    return table


def comparison_table(comparison: Comparison, width: int = 200) -> Table:
    """A table with one row per column: both accuracies, paired difference with its interval, flips, p and q.

    Args:
        comparison: the comparison of two runs.
        width: characters per line. If one line per row does not fit, pairs of numbers stand on two lines.
    """
    rows = [_comparison_row(row) for row in comparison.differences]
    heads = [*COMPARED]
    narrow = sum(max(map(len, cells)) + 3 for cells in zip(heads, *rows, strict=True)) + 1 > width
    table = Table(
        title=escape(f"{comparison.second} against {comparison.first}"),
        title_justify="left",
        caption_justify="left",
        caption="paired by question: points, bootstrap 95 % interval, exact McNemar p, "
        "q by Benjamini-Hochberg over the columns"
        + "; t: interval and p of Student's t, for scores that are not right or wrong"
        * any(not row.counts for row in comparison.differences),
        show_lines=narrow,
    )
    if narrow:
        heads, *rows = [["\n".join(cells[at : at + 2]) for at in range(0, len(cells), 2)] for cells in (heads, *rows)]
    table.add_column(heads[0])
    for name in heads[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(escape(row[0]), *row[1:])
    return table


def _comparison_row(row: Difference) -> list[str]:
    """The cells of one column of the task, as COMPARED names them."""
    return [
        row.column + " (t)" * (not row.counts),
        str(row.n),
        f"{100 * row.first / row.n:.2f}",
        f"{100 * row.second / row.n:.2f}",
        f"{100 * row.difference:+.2f}",
        f"{100 * row.low:+.2f} … {100 * row.high:+.2f}",
        str(row.gained),
        str(row.lost),
        f"{row.p:.3g}",
        f"{row.q:.3g}",
    ]


def flips_table(comparison: Comparison, answers: Sequence[Mapping[str, Answer]], limit: int) -> Table:
    """A table of the flipped questions in both directions, with both answers.

    Args:
        comparison: the comparison of two runs.
        answers: answers of the first and of the second run, by question id.
        limit: largest number of questions in each direction.
    """
    both = ((comparison.gained, "gained"), (comparison.lost, "lost"))
    sizes = ", ".join(f"{len(ids)} {word}" for ids, word in both)
    more = " (first of each shown; --flips for more)" if any(len(ids) > limit for ids, _ in both) else ""
    table = Table(title=f"Flipped questions: {sizes}{more}", title_justify="left")
    for name in ("", "question", "first answered", "second answered"):
        table.add_column(name)
    for ids, word in both:
        for name in ids[:limit]:
            given = [side[name].answer if name in side else "–" for side in answers]
            table.add_row(word, escape(name), *map(escape, given))
    return table


def study_table(summary: Summary, width: int = 200) -> Table:
    """A table with one row per score: its mean rank correlation with each effect of leaving a token out.

    Args:
        summary: the summary of a study.
        width: characters per line. If one line per score does not fit, intervals stand below the correlations.
    """
    labels = [one.name if one.kind == "metric" else f"{one.name} (relevance)" for one in summary.predictors]
    rows = [[_rho(one.correlations[name]) for name in summary.targets] for one in summary.predictors]
    cells = [["score", *summary.targets], *([label, *row] for label, row in zip(labels, rows, strict=True))]
    narrow = sum(max(map(len, column)) + 3 for column in zip(*cells, strict=True)) + 1 > width
    table = Table(
        title=escape(f"{summary.name} on {summary.task}: rank correlation with the harm of leaving a token out"),
        title_justify="left",
        caption_justify="left",
        caption=f"mean Spearman's rho over {summary.questions} questions ({summary.units} omissions, "
        f"{100 * summary.changed:.1f} % change the answer), bootstrap 95 % interval over questions\n"
        + "\n".join(f"{name}: {meaning}" for name, meaning in summary.targets.items()),
        show_lines=narrow,
    )
    table.add_column("score")
    for name in summary.targets:
        table.add_column(name, justify="right", no_wrap=True)
    for label, row in zip(labels, rows, strict=True):
        table.add_row(escape(label), *(cell.replace("  ", "\n") if narrow else cell for cell in row))
    return table


def _rho(found: Correlation) -> str:
    if found.rho is None:
        return "–"
    return f"{found.rho:+.3f}  ({found.low:+.2f} … {found.high:+.2f})"


def _share(relative: Relative) -> str:
    """A relative average in percent; a dash if there is none."""
    return "–" if relative.average is None else f"{100 * relative.average:.2f}"


def _cell(column: dict[str, Any] | None) -> str:
    """An accuracy in percent, or a mean or a figure that is no accuracy as it is; a dash if there is none."""
    if not column:
        return "–"
    if (plain := next((column[kind] for kind in ("mean", "figure") if column.get(kind) is not None), None)) is not None:
        return f"{plain:.4g}"
    return "–" if column.get("accuracy") is None else f"{100 * column['accuracy']:.2f}"


def _interval(column: dict[str, Any]) -> str:
    """The interval in percent; empty if there is none."""
    if column.get("low") is None:
        return ""
    return f"{100 * column['low']:.1f}–{100 * column['high']:.1f}"
