"""POPE and others of lmms-eval's by `qapbench run`, and the same answers by `lmms_eval --model qapbench`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lmms_data_sets import POPE, SCIENCEQA, SEED, DataSet, write_all

import qapbench
from qapbench import RunSpec
from qapbench.records.intact import read_scored_questions
from qapbench.records.record import Record
from qapbench.records.store import answers_of
from qapbench.running.lmms_manifest import manifest

pytestmark = [
    pytest.mark.lmms,
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"),
]
WIDTH = {"bits": 4, "group_size": 16}
COMPRESSED = {
    "quantize": {"method": "rtn", "weights": WIDTH, "activations": WIDTH},
    "prune": {"method": "cdpruner", "keep": 5},
}
DATA: dict[str, list[DataSet]] = {
    "pope": [POPE],
    "seedbench": [SEED],
    "seedbench_ppl": [SEED],
    "scienceqa_img": [SCIENCEQA],
}
Spec = Callable[..., RunSpec]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of all data, in which lmms-eval itself finds them too."""
    for sets in (DATA["pope"], DATA["seedbench"], DATA["scienceqa_img"]):
        write_all(sets, tmp_path / "hub")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "hub")
    return tmp_path


@pytest.fixture
def spec_of_task(root: Path, tiny_model: Path) -> Spec:
    def make(name: str, **more: Any) -> RunSpec:
        task = {"name": name, "from": "lmms-eval", "data": str(root / "hub"), **more.pop("task", {})}
        return RunSpec.parse({"name": name, "model": str(tiny_model), "task": task, **more})

    return make


def outputs(root: Path, record: Record) -> dict[int, list[Any]]:
    return {answer.doc: answer.outputs for answer in answers_of(root / "runs" / record.run_id).read()}


def test_pope_from_the_command_line_is_resumed_and_ends_with_equal_bytes(
    root: Path, spec_of_task: Spec, tiny_model: Path
) -> None:
    task = {"name": "pope", "from": "lmms-eval", "data": "hub"}
    (root / "pope.yaml").write_text(yaml.safe_dump({"model": str(tiny_model), "task": task, **COMPRESSED}))
    command = [sys.executable, "-m", "qapbench.cli", "run", "pope.yaml", "--runs", "runs", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in (root / "runs").glob("*/record.json"))
    assert "DEBUG" not in done.stdout + done.stderr, "lmms-eval logs nothing"
    stored = {name: (folder / name).read_bytes() for name in ("answers.jsonl", "scored.jsonl", "receipt.json")}

    half = stored["answers.jsonl"].splitlines(keepends=True)[:2]
    (folder / "answers.jsonl").write_bytes(b"".join(half))
    (folder / "record.json").unlink()
    (record,) = qapbench.run(spec_of_task("pope", **COMPRESSED), root / "runs", device="cpu", batch_size=1)
    assert record.run_id == folder.name
    assert record.timing.questions == 3
    assert {name: (folder / name).read_bytes() for name in stored} == stored

    assert record.spec["task"]["from"] == "lmms-eval"
    assert record.tokens is not None
    assert record.tokens.kept == 5
    columns = [column.name for column in record.scores.columns]
    assert columns == ["pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio"]
    assert record.score is not None
    assert (record.score.name, record.score.n) == ("pope_accuracy", 5)
    questions = read_scored_questions(folder)
    assert record.score.k == sum(question.metrics["pope_accuracy"] for question in questions)
    assert record.scores.columns[-1].value == pytest.approx(2 / 5), "the share of questions whose right answer is yes"


@pytest.mark.parametrize(("name", "size"), [("pope", 3), ("seedbench", 2), ("seedbench_ppl", 2)])
def test_lmms_eval_gets_the_answers_of_our_runs(
    name: str, size: int, root: Path, spec_of_task: Spec, tiny_model: Path
) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from qapbench.tasking.lmms_index import find_lmms_task

    spec = spec_of_task(name, **COMPRESSED)
    (record,) = qapbench.run(spec, root / "runs", device="cpu")
    ours = outputs(root, record)

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)  # the entry point of an installation does this
    (root / "spec.yaml").write_text(yaml.safe_dump({"model": "none", "task": "none", **COMPRESSED}))
    found = simple_evaluate(
        model="qapbench",
        model_args=f"pretrained={tiny_model},spec={root / 'spec.yaml'}",
        tasks=[name],
        batch_size=size,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(
            "ERROR", include_path=str(find_lmms_task(name).path.parent), include_defaults=False, model_name="qapbench"
        ),
    )
    theirs = {sample["doc_id"]: [one[0] for one in sample["resps"]] for sample in found["samples"][name]}
    if name == "seedbench_ppl":
        theirs = {doc: [[-loss, greedy] for loss, greedy in given] for doc, given in theirs.items()}
    assert json.dumps(theirs, sort_keys=True) == json.dumps(ours, sort_keys=True)
    for column in record.scores.columns:
        assert found["results"][name][f"{column.name},none"] == pytest.approx(column.value)


def test_a_list_of_tasks_is_one_record(root: Path, spec_of_task: Spec, tiny_model: Path) -> None:
    tasks = [
        {"name": name, "from": "lmms-eval", "data": str(root / "hub")}
        for name in ("pope", "scienceqa_img", "seedbench")
    ]
    (record,) = qapbench.run(RunSpec.parse({"model": str(tiny_model), "task": tasks}), root / "runs", device="cpu")
    assert [column.name for column in record.scores.columns] == ["pope", "scienceqa_img", "seedbench"]
    assert [part.task.score or part.scores.columns[-1].name for part in record.parts] == [
        "pope_accuracy",
        "exact_match",
        "seed_all",
    ]
    assert [column.n for column in record.scores.columns] == [5, 2, 3]
