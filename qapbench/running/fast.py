"""`--fast`: asks a stratified subset first, and stops the rows that are out of reach after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qapbench.records.parts import Stopped
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.questions import Question

from .active_run import ActiveRun

SHARE, LEAST = 0.1, 200  # size of the subset: a share of the questions, and at least this many of them
RISK = 0.01  # probability that some row is stopped by a row that is no better than it


@dataclass(frozen=True)
class Verdict:
    """The reason for which a row was stopped: another row of its field is better on the subset than chance explains.

    Attributes:
        by: name of the better row.
        asked: number of questions that both answered.
        lost: number of questions that only the better row answered right.
        won: number of questions that only the stopped row answered right.
        p: p-value of the one-sided exact McNemar test.
        level: the threshold that p had to fall below.
    """

    by: str
    asked: int
    lost: int
    won: int
    p: float
    level: float

    def record(self, asked: int, total: int) -> Stopped:
        """The verdict as the record of the stopped run holds it.

        Args:
            asked: number of questions that the run answered.
            total: number of questions of the task.
        """
        return Stopped(
            by=self.by,
            lost=self.lost,
            won=self.won,
            p=self.p,
            level=self.level,
            asked=asked,
            of=total,
            bound=self.words(total),
        )

    def words(self, total: int) -> str:
        """The verdict as a sentence.

        Args:
            total: number of questions of the task.
        """
        return (
            f"Stopped by --fast after {self.asked} of {total} questions: out of reach of '{self.by}', which alone was "
            f"right on {self.lost} where this row alone was on {self.won} (exact McNemar, one-sided p = {self.p:.2g}, "
            f"below {self.level:.2g}: {100 * RISK:g} % over all pairs of the field)."
        )


def subset(questions: Sequence[Question]) -> list[Question]:
    """A tenth of the questions, at least 200, with every stratum in proportion.

    Strata are: with or without image, subject, and grade. The first question is always included, since receipts are
    measured with it. Questions are chosen by a hash of task and document, so that the subset depends neither on their
    order nor on the machine.
    """
    size = min(len(questions), max(LEAST, round(SHARE * len(questions))))
    strata: dict[tuple[str, ...], list[Question]] = {}
    for question in sorted(questions, key=_draw):
        strata.setdefault(question.stratum, []).append(question)
    # Sorted by (k + 1/2) / n for the k-th of the n questions of a stratum, every prefix holds strata in proportion.
    ranked = [
        ((place + 0.5) / len(members), _draw(question), question)
        for members in strata.values()
        for place, question in enumerate(members)
    ]
    taken = {question.place for *_, question in sorted(ranked, key=lambda item: item[:2])[:size]}
    taken.add(questions[0].place)
    return [question for question in questions if question.place in taken]


def _draw(question: Question) -> str:
    return hashlib.sha256(repr(question.place).encode()).hexdigest()


def field_of(spec: RunSpec) -> str | None:
    """Key of the field of rows that a run competes with; None if it is never stopped.

    The rows of a field have the same model, quantization and budget, and select tokens differently. Rows without
    pruning are what others are compared with, so they are always completed.
    """
    if spec.prune is None:
        return None
    content = spec.model_dump(mode="json", exclude={"name", "plugins", "text_tower"})
    content["prune"] = {"keep": content["prune"]["keep"]}
    return json.dumps(content, sort_keys=True)


def stopped(active_runs: Sequence[ActiveRun], rights: Sequence[Mapping[str, bool]]) -> dict[str, Verdict]:
    """The runs that stop after the subset: id -> verdict.

    Args:
        active_runs: the runs.
        rights: for each run, question id -> whether it answered right.
    """
    fields: dict[str, dict[str, Mapping[str, bool]]] = {}
    for active, right in zip(active_runs, rights, strict=True):
        if (field := field_of(active.spec)) is not None:
            fields.setdefault(field, {})[active.planned.id] = right
    names = {active.planned.id: active.spec.name for active in active_runs}
    return {run_id: verdict for rows in fields.values() for run_id, verdict in out_of_reach(rows, names).items()}


def out_of_reach(rows: Mapping[str, Mapping[str, bool]], names: Mapping[str, str]) -> dict[str, Verdict]:
    """The rows of one field that stop: run id -> verdict.

    Every row is tested against every other at the level RISK / (number of ordered pairs), which is Bonferroni's
    correction. With probability 1 - RISK, no row that stops is as good as the row that stopped it.

    Args:
        rows: run id -> question id -> whether the row answered right.
        names: run id -> name.
    """
    from scipy.stats import binom

    pairs = len(rows) * (len(rows) - 1)
    stopped: dict[str, Verdict] = {}
    for one, right in rows.items():
        for other, better in rows.items():
            both = right.keys() & better.keys()
            lost = sum(better[q] and not right[q] for q in both)
            won = sum(right[q] and not better[q] for q in both)
            if other == one or lost <= won:
                continue
            p = float(binom.sf(lost - 1, lost + won, 0.5))
            if p < RISK / pairs and (one not in stopped or p < stopped[one].p):
                stopped[one] = Verdict(names[other], len(both), lost, won, p, RISK / pairs)
    return stopped
