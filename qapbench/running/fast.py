"""`--fast`: a stratified subset first; rows that are out of reach stop there, and say so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qapbench.records.record import Stopped
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.questions import Question

from .active_run import ActiveRun

SHARE, LEAST = 0.1, 200  # of the questions, and at least so many: what the first stage asks
RISK = 0.01  # that any row of a table is stopped though it is at least as good as the one that stopped it


@dataclass(frozen=True)
class Verdict:
    """Why a row was stopped: another of its field was better on the subset than chance allows.

    Attributes:
        by: name of that row; lost, won: questions that only the other, and only this row had right.
        p: one-sided exact McNemar p of that.
        level: p had to be below it.
    """

    by: str
    asked: int
    lost: int
    won: int
    p: float
    level: float

    def record(self, asked: int, total: int) -> Stopped:
        """What the record says, `asked` questions of `total` answered."""
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
        return (
            f"Stopped by --fast after {self.asked} of {total} questions: out of reach of '{self.by}', which alone was "
            f"right on {self.lost} where this row alone was on {self.won} (exact McNemar, one-sided p = {self.p:.2g}, "
            f"below {self.level:.2g}: {100 * RISK:g} % over all pairs of the field)."
        )


def subset(questions: Sequence[Question]) -> list[Question]:
    """A tenth of the questions, at least 200, each stratum in proportion; the same for every run that asks them.

    Strata are image or not, subject and grade. The first question of the order is always among them, as receipts are
    measured there. The choice is by a hash of task and document, so neither order nor machine can change it.
    """
    size = min(len(questions), max(LEAST, round(SHARE * len(questions))))
    strata: dict[tuple[str, ...], list[Question]] = {}
    for question in sorted(questions, key=_draw):
        strata.setdefault(question.stratum, []).append(question)
    # The k-th question of a stratum of n stands at (k + 1/2) / n: the front of that order is in proportion.
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
    """Rows that compete: they differ in how they choose, not in the budget or the model. None where one never stops.

    Full-precision and dense rows are what others are compared with, so they are always answered whole.
    """
    if spec.prune is None:
        return None
    content = spec.model_dump(mode="json", exclude={"name", "plugins", "text_tower"})
    content["prune"] = {"keep": spec.prune.keep}
    return json.dumps(content, sort_keys=True)


def stopped(active_runs: Sequence[ActiveRun], rights: Sequence[Mapping[str, bool]]) -> dict[str, Verdict]:
    """Which runs stop after the subset, by id, given which questions each had right."""
    fields: dict[str, dict[str, Mapping[str, bool]]] = {}
    for active, right in zip(active_runs, rights, strict=True):
        if (field := field_of(active.spec)) is not None:
            fields.setdefault(field, {})[active.planned.id] = right
    names = {active.planned.id: active.spec.name for active in active_runs}
    return {run_id: verdict for rows in fields.values() for run_id, verdict in out_of_reach(rows, names).items()}


def out_of_reach(rows: Mapping[str, Mapping[str, bool]], names: Mapping[str, str]) -> dict[str, Verdict]:
    """Which rows of one field stop, by run id.

    Every row is tested against every other, exactly, at RISK over the number of ordered pairs (Bonferroni): with
    probability 1 - RISK no row that stops is as good as the one that stopped it.

    Args:
        rows: by run id, for each question whether it was right.
        names: of the runs.
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
