"""Tallies and the scoring of stored outputs."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from question_files import row
from statsmodels.stats.proportion import proportion_confint

from qapbench import UserError
from qapbench.analysis.score import score_file
from qapbench.records.tally import Figure, Mean, Tally, tally
from qapbench.spec.task_spec import TaskSpec

NAMES = ["NAT", "IMG", "G1-6", "Avg"]


@pytest.fixture
def task(write: Any) -> TaskSpec:
    """Four questions, 10 to 13, each with three options; the right ones are A, B, C, A."""
    options = {"choices": ["x", "y", "z"], "grade": ""}
    rows = [row(str(10 + i), answer=i % 3, hint="" if i else "h", **options) for i in range(4)]
    return TaskSpec(name="scienceqa", data=write(rows), answers="generate")


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    def stored(content: Any) -> Path:
        path = tmp_path / "outputs"
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
        return path

    return stored


# -- tally --


def test_tally_of_rows() -> None:
    rows = [
        {"NAT": 1.0, "Avg": 1.0, "unparsed": 0.0},
        {"NAT": 0.0, "Avg": 0.0, "unparsed": 1.0, "other": 3},
        {"Avg": 1.0, "unparsed": 0.0},
    ]
    scores = tally(rows, NAMES, {"G1-6": "grade unknown"})
    plain = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    by_name = {column["name"]: column for column in plain["columns"]}
    assert list(by_name) == NAMES
    assert (by_name["NAT"]["k"], by_name["NAT"]["n"], by_name["NAT"]["accuracy"]) == (1, 2, 0.5)
    assert by_name["NAT"]["stderr"] == pytest.approx(math.sqrt(0.125))
    assert by_name["IMG"] == {"name": "IMG", "unavailable": "no question belongs to it"}
    assert by_name["G1-6"] == {"name": "G1-6", "unavailable": "grade unknown"}
    assert plain["unparsed"] == {"k": 1, "n": 3, "rate": pytest.approx(1 / 3)}
    assert scores["Avg"] == Tally(2, 3)
    with pytest.raises(KeyError):
        scores["IMG"]


def test_metrics_that_are_not_right_or_wrong() -> None:
    scores = tally([{"f1": 0.5, "ppl": (1, 2)}, {"f1": 1.0, "ppl": (1, 2)}], ["f1", "ppl"])
    assert scores["f1"] == Mean(0.75, 2, pytest.approx(0.25))
    assert scores.columns[1].unavailable == "not a number per question"
    assert tally([{"f1": 0.5}], ["f1"]).to_json()["columns"] == [{"name": "f1", "mean": 0.5, "n": 1, "stderr": None}]
    assert tally([], ["f1"]).to_json()["unparsed"] == {"k": 0, "n": 0, "rate": 0.0}


def test_the_tasks_own_figure_counts_unless_it_is_the_mean() -> None:
    rows = [{"acc": 1.0, "f1": (1, 1)}, {"acc": 0.0, "f1": (0, 1)}]
    scores = tally(rows, ["acc", "f1"], figures={"acc": 0.5, "f1": 0.8})
    assert scores["acc"] == Tally(1, 2), "a mean of right answers keeps its interval"
    assert scores["f1"] == Figure(0.8, 2)
    assert scores.to_json()["columns"][1] == {"name": "f1", "figure": 0.8, "n": 2}
    assert tally(rows, ["acc"], figures={"acc": 50.0})["acc"] == Figure(50.0, 2)


def test_wilson() -> None:
    """Against the closed form: ScienceQA near 81% is known to about 1.18 points."""
    k, n, z = 3435, 4241, 1.959963984540054
    p, t = k / n, Tally(k, n)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (t.low, t.high) == pytest.approx((centre - half, centre + half))
    assert half == pytest.approx(0.0118, abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_accuracy(case: tuple[int, int]) -> None:
    t = Tally(*case)
    assert -1e-12 <= t.low <= t.accuracy
    assert t.accuracy <= t.high <= 1 + 1e-12
    assert t.low < t.high


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_equals_that_of_statsmodels_to_the_bit(case: tuple[int, int]) -> None:
    """Records hold intervals that statsmodels made."""
    t = Tally(*case)
    low, high = proportion_confint(*case, alpha=1 - 0.95, method="wilson")
    assert t.interval == (min(low, t.accuracy), max(high, t.accuracy))


# -- stored outputs --

LLAVA = {"10": "LECTURE. The answer is A.", "11": "B", "12": "A. x", "13": "A."}


@pytest.mark.parametrize("as_lines", [False, True])
def test_llava_files(task: TaskSpec, stored: Any, as_lines: bool) -> None:
    lines = [{"question_id": key, "text": text, "prompt": "p"} for key, text in LLAVA.items()]
    path = stored(lines if as_lines else {"acc": 1.0, "results": {}, "outputs": LLAVA})
    scores = score_file(path, task)
    assert scores["Avg"] == Tally(2, 4)
    assert scores["TXT"] == Tally(1, 1)
    assert scores.unparsed == Tally(1, 4)  # LLaVA's own parser does not take `A.`
    assert (scores.missing, scores.unknown) == (0, 0)
    lenient = score_file(path, task.model_copy(update={"parser": "lmms"}))
    assert lenient["Avg"] == Tally(2, 4)
    assert {c.name for c in scores.columns if c.unavailable} == {"SOC", "LAN", "IMG", "G1-6", "G7-12"}


def test_our_file_and_a_later_answer(task: TaskSpec, stored: Any) -> None:
    answers = [("10", "C"), (11, "b"), ("12", "C."), ("13", "A\u2028"), ("10", "A")]
    lines = [json.dumps({"id": name, "answer": text}, ensure_ascii=False) for name, text in answers]
    assert score_file(stored("\n".join(lines)), task)["Avg"] == Tally(4, 4)


@pytest.mark.parametrize("parser", ["llava", "qvlm"])
def test_missing_outputs_are_wrong(task: TaskSpec, stored: Any, parser: str) -> None:
    spec = task.model_copy(update={"parser": parser})
    path = stored([{"id": "10", "answer": "ANSWER: A. The answer is A."}])
    for seed in range(8):  # a guessing parser guesses nothing for them
        scores = score_file(path, spec, seed)
        assert scores["Avg"] == Tally(1, 4)
        assert scores.missing == 3
        assert scores.unparsed == Tally(0, 4)


def test_foreign_ids(task: TaskSpec, stored: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = stored([{"id": str(i), "answer": "A"} for i in (10, *range(100, 110))])
    with caplog.at_level(logging.WARNING):
        scores = score_file(path, task)
    assert scores.unknown == 10
    assert "10 outputs are not in the data: 100, 101, 102, 103, 104, ..." in caplog.text
    with pytest.raises(UserError, match=r"no id of the 1 outputs is in the data \(7; the data have 10, 11, "):
        score_file(stored([{"id": "7", "answer": "A"}]), task)


def test_limit(task: TaskSpec, stored: Any) -> None:
    path = stored({"outputs": LLAVA})
    scores = score_file(path, task.model_copy(update={"limit": 2}))
    assert scores["Avg"] == Tally(2, 2)
    assert (scores.missing, scores.unknown) == (0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ('{"id": "10", "answer": "A"}\n{"id": "11", "ans', r"line 2: file: .*not a complete JSON object"),
        ('{\n "outputs": {\n  "10": "A', "line 3: file: .*not complete JSON"),
        ('{"outputs": {"10": "A', "line 1: file: .*not a complete JSON object"),
        ('{"outputs": {}}', "`outputs` is empty"),
        ('{"outputs": {"10": 3}}', "not a map from id to text"),
        ('{"acc": 3}', "neither a result file"),
        ("[1, 2]", "neither a result file"),
        ('{"id": "10", "answer": 3}', "line 1: file: .*needs `id` and `answer`"),
        ('{"question_id": "10"}\n{"question_id": "11"}', "line 1: file: .*needs `id` and `answer`"),
    ],
)
def test_unreadable_files(task: TaskSpec, stored: Any, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_file(stored(content), task)


def test_no_such_file(task: TaskSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        score_file(tmp_path / "none", task)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        score_file(tmp_path / "binary", task)


def test_a_task_of_lm_evals_is_scored_by_its_own_filter(
    tmp_path: Path, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"q": "{n} + 1", "a": "{n + 1}"}}\n' for n in range(4)))
    number = {"function": "regex", "regex_pattern": "([0-9])"}
    config = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "filter_list": [{"name": "number", "filter": [number, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(config))
    texts = ["It is 1.", "2!", "no idea"]
    outputs = stored([{"id": str(n), "answer": text} for n, text in enumerate(texts)])
    scores = score_file(outputs, TaskSpec(name=str(tmp_path / "sums.yaml")))
    assert scores["exact_match"] == Tally(2, 4), "what has no output is wrong"
    assert (scores.unparsed, scores.missing) == (Tally(1, 4), 1)
    assert isinstance(scores["bleu"], Figure)
    assert scores["bleu"].n == 3
