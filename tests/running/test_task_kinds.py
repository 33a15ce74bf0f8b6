"""Every kind of lm-eval task, with its own filters, metrics and aggregation functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import sacrebleu
import yaml
from sklearn.metrics import f1_score, matthews_corrcoef

import qapbench
from qapbench import RunSpec, UserError
from qapbench.records.answer import Answer
from qapbench.records.intact import read_scored_questions
from qapbench.records.record import Record
from qapbench.records.store import answers_of

ROWS = [{"text": f"the red fox {'lives ' * at}in", "word": ["cat", "dog"][at % 2], "gold": at % 2} for at in range(6)]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["cat", "dog"],
    "doc_to_target": "gold",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "f1", "mcc", "brier_score")],
}
GENERATED: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "word",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "first-letter", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
}
LIKELIHOOD = {
    "output_type": "loglikelihood",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
VOTED = {
    **GENERATED,
    "repeats": 3,
    "generation_kwargs": {"max_gen_toks": 3, "do_sample": True, "temperature": 1.0},
    "filter_list": [{"name": "vote", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match"}],
}

Ran = Callable[..., tuple[Record, list[Answer], dict[str, dict[str, Any]]]]


@pytest.fixture
def ran(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Runs a task of these entries and returns its record, its answers, and its scores per question."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}

    def run(entries: dict[str, Any], **task: Any) -> tuple[Record, list[Answer], dict[str, dict[str, Any]]]:
        config = {"task": "mine", **common, "test_split": "test", "doc_to_text": "{{text}}", **entries}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
        asked = {"name": str(tmp_path / "mine.yaml"), **task}
        spec = RunSpec.parse({"model": str(tiny_model), "task": asked})
        (record,) = qapbench.run(spec, tmp_path / "runs", device="cpu")
        folder = tmp_path / "runs" / record.run_id
        return record, answers_of(folder).read(), {q.id: q.metrics for q in read_scored_questions(folder)}

    return run


def test_a_metric_over_all_questions_is_aggregated_by_the_task(ran: Ran) -> None:
    record, answers, scored = ran(CHOICE)
    likely = {a.id: [math.exp(output[0]) for output in a.outputs] for a in answers}
    gold = {str(at): row["gold"] for at, row in enumerate(ROWS)}
    chosen = {name: max((0, 1), key=lambda at: pair[at]) for name, pair in likely.items()}
    columns = {column.name: column for column in record.scores.columns}
    assert list(columns) == ["acc", "acc_norm", "f1", "mcc", "brier_score"]
    assert columns["acc"].k == sum(chosen[name] == gold[name] for name in gold)
    names = sorted(gold)
    pair = [gold[name] for name in names], [chosen[name] for name in names]
    assert columns["f1"].figure == pytest.approx(f1_score(*pair))
    assert columns["mcc"].figure == pytest.approx(matthews_corrcoef(*pair))
    shares = {name: pair[gold[name]] / sum(pair) for name, pair in likely.items()}
    brier = sum(2 * (1 - share) ** 2 for share in shares.values()) / len(shares)
    assert columns["brier_score"].figure == pytest.approx(brier)
    assert (columns["brier_score"].lower, columns["acc"].lower) == (True, None)
    assert {column.n for column in columns.values()} == {6}
    assert scored["0"]["f1"] == [gold["0"], chosen["0"]], "what is per question stays stored"
    assert record.score == columns["acc"]
    assert qapbench.results([record]).iloc[0]["f1"] == columns["f1"].figure


def test_every_filter_of_the_task_has_its_columns(ran: Ran) -> None:
    record, answers, scored = ran(GENERATED)
    columns = {column.name: column for column in record.scores.columns}
    assert list(columns) == ["exact_match", "bleu", "exact_match (first-letter)", "bleu (first-letter)"]
    texts = [answer.answer for answer in sorted(answers, key=lambda answer: answer.doc)]
    words = [row["word"] for row in ROWS]
    assert columns["exact_match"].k == sum(text == word for text, word in zip(texts, words, strict=True))
    bleu = sacrebleu.corpus_bleu(texts, [words], smooth_method="exp", tokenize="intl", lowercase=False, force=False)
    assert columns["bleu"].figure == pytest.approx(bleu.score)
    assert scored["0"].keys() == columns.keys()


def test_answers_that_the_filter_cannot_read_are_counted(ran: Ran) -> None:
    read = {"function": "regex", "regex_pattern": "([a-m])"}
    filters = [{"name": "letter", "filter": [read, {"function": "take_first"}]}]
    record, answers, scored = ran({**GENERATED, "filter_list": filters})
    unread = {answer.id for answer in answers if not re.search("[a-m]", answer.answer)}
    assert 0 < len(unread) < len(answers)
    assert (record.scores.unparsed.k, record.scores.unparsed.n) == (len(unread), len(answers))
    assert {name for name, metrics in scored.items() if "unparsed" in metrics} == unread


def test_perplexity_and_accuracy_of_a_continuation(ran: Ran) -> None:
    record, answers, scored = ran(LIKELIHOOD, metric="acc")
    columns = {column.name: column for column in record.scores.columns}
    mean = sum(answer.outputs[0][0] for answer in answers) / len(answers)
    assert columns["perplexity"].figure == pytest.approx(math.exp(-mean))
    assert columns["perplexity"].lower
    assert columns["acc"].k == sum(answer.outputs[0][1] for answer in answers)
    assert record.score == columns["acc"], "the column that the spec names"
    assert scored["0"]["perplexity"] == next(answer.outputs[0][0] for answer in answers if answer.id == "0")


def test_a_metric_that_is_not_there_is_named(ran: Ran) -> None:
    with pytest.raises(UserError, match=r"task.metric: task .* has no metric 'f2'; did you mean 'f1'"):
        ran(CHOICE, metric="f2")


def test_several_samples_of_one_question_are_all_scored(ran: Ran) -> None:
    record, answers, _ = ran(VOTED)
    assert {len(answer.outputs) for answer in answers} == {3}
    assert any(len(set(answer.outputs)) > 1 for answer in answers), "each has a seed of its own"
    assert record.task is not None
    assert record.task.questions == 6
    voted = [max(answer.outputs, key=answer.outputs.count) for answer in answers]
    assert record.score is not None
    assert record.score.k == sum(text == ROWS[a.doc]["word"] for text, a in zip(voted, answers, strict=True))
