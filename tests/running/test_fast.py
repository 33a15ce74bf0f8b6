"""`--fast`: which questions it asks first, which rows it stops, and that it says so."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_questions import QUESTIONS
from scipy.stats import binomtest

import qapbench
from qapbench import RunSpec
from qapbench.analysis.table import ablation_table
from qapbench.records.load import load_records
from qapbench.running import fast
from qapbench.running.fast import Verdict, field_of, out_of_reach, subset

Spec = Callable[..., dict[str, Any]]


def question(doc: int, stratum: tuple[str, ...]) -> Any:
    return SimpleNamespace(place=("t", doc), stratum=stratum)


def test_the_subset_is_stratified_and_does_not_depend_on_the_order() -> None:
    questions = [question(doc, ("image" if doc % 4 else "text", str(doc % 3))) for doc in range(3000)]
    chosen = subset(questions)
    assert len(chosen) in (300, 301)
    assert questions[0] in chosen
    for stratum in {q.stratum for q in questions}:
        size = sum(q.stratum == stratum for q in questions)
        assert abs(sum(q.stratum == stratum for q in chosen) - size / 10) <= 2
    turned = subset([questions[0], *reversed(questions[1:])])
    assert {q.place for q in turned} == {q.place for q in chosen}
    assert len(subset(questions[:150])) == 150


def rows(*rates: int) -> dict[str, dict[str, bool]]:
    """Row i is right on the first rates[i] of 200 questions."""
    return {str(i): {f"q{n}": n < rate for n in range(200)} for i, rate in enumerate(rates)}


def test_a_row_stops_where_an_exact_test_says_so() -> None:
    found = out_of_reach(rows(150, 149, 100), {"0": "best", "1": "second", "2": "far"})
    assert set(found) == {"2"}
    verdict = found["2"]
    assert (verdict.by, verdict.lost, verdict.won, verdict.asked) == ("best", 50, 0, 200)
    assert verdict.p == pytest.approx(binomtest(50, 50, 0.5, "greater").pvalue)
    assert verdict.level == pytest.approx(0.01 / 6)
    assert "after 200 of 4241 questions: out of reach of 'best'" in verdict.words(4241)
    assert out_of_reach(rows(150, 141), {"0": "a", "1": "b"}) == {
        "1": Verdict("a", 200, 9, 0, 0.5**9, 0.005),
    }
    assert out_of_reach(rows(150, 143), {"0": "a", "1": "b"}) == {}
    assert out_of_reach(rows(150), {"0": "a"}) == {}


def test_rows_compete_within_one_budget_and_references_never_stop(spec_of: Spec) -> None:
    def field(**more: Any) -> str | None:
        return field_of(RunSpec.parse(spec_of(**more)))

    five = {"method": "random", "keep": 5}
    assert field() is None
    assert field(prune=five) == field(prune={"method": "cdpruner", "keep": 5, "sensitivity": "l2"})
    assert field(prune=five) != field(prune={**five, "keep": 6})


def test_a_stopped_row_is_marked_and_can_be_completed(
    spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "LEAST", 6)
    monkeypatch.setattr(fast, "SHARE", 0.3)
    specs = [RunSpec.parse(spec_of(name="dense"))] + [
        RunSpec.parse(spec_of(name=name, prune={"method": name, "keep": 5})) for name in ("random", "attention")
    ]
    verdict = Verdict("attention", 6, 6, 0, 0.001, 0.005)
    monkeypatch.setattr(fast, "out_of_reach", lambda rows, names: {i: verdict for i in rows if names[i] == "random"})
    dense, stopped, best = qapbench.run(specs, tmp_path, fast=True)
    assert dense.stopped is None
    assert best.stopped is None
    assert stopped.stopped is not None
    assert stopped.stopped.by == "attention"
    assert stopped.notes[0] == stopped.stopped.bound == verdict.words(QUESTIONS)
    assert stopped.name == f"random (stopped: {stopped.stopped.asked} of {QUESTIONS})"
    assert [record.task.questions if record.task else 0 for record in (best, dense)] == [QUESTIONS, QUESTIONS]
    asked = stopped.stopped.asked
    assert stopped.task is not None
    assert stopped.task.questions == asked
    assert 6 <= asked <= 7
    assert {column.n for column in stopped.scores.columns if column.name == "Avg"} == {asked}
    table = ablation_table(load_records(tmp_path))
    assert any(f"{asked} of {QUESTIONS}" in str(cell) for cell in table.columns[0].cells)
    assert [r.stopped for r in qapbench.run(specs, tmp_path, fast=True)] == [None, stopped.stopped, None]
    completed = qapbench.run(specs, tmp_path)
    assert all(record.stopped is None for record in completed)
    assert completed[1].timing.questions == QUESTIONS - asked
    folder = completed[1].run_id
    qapbench.run(specs[1:2], tmp_path / "alone")
    alone, later = (path / folder / "answers.jsonl" for path in (tmp_path / "alone", tmp_path))
    assert later.read_bytes() == alone.read_bytes()
    stored = json.loads((tmp_path / folder / "record.json").read_text())
    assert stored["task"]["questions"] == QUESTIONS
    assert "stopped" not in stored
