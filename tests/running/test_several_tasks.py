"""Runs of several tasks: one record, whose parts are the runs of one task each."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import false_discovery_control

import qapbench
from qapbench import RunSpec, UserError
from qapbench.analysis.check import check_record
from qapbench.analysis.paired import NEEDS_IMAGE, compare, find_run, read_scored
from qapbench.analysis.relative import relative_averages
from qapbench.analysis.strata import Strata
from qapbench.analysis.table import ablation_table
from qapbench.leaderboard import build
from qapbench.records.record import Record, write_record
from qapbench.records.store import ANSWERS, answers_of
from qapbench.running.planner import Planner
from qapbench.running.settings import find_device
from qapbench.spec.spec_file import load_spec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.tasks import load_task

CASES: dict[str, dict[str, Any]] = {"dense": {}, "pruned": {"prune": {"method": "cdpruner", "keep": 5}}}
LABELS = ["scienceqa", "scienceqa (2)", "diagramqa"]


@dataclass(frozen=True)
class Made:
    """Two rows of three tasks each: two wordings of one file of questions, and eight of diagramqa."""

    spec: Path
    runs: Path
    dense: Record
    pruned: Record
    told: list[str]


@pytest.fixture(scope="module")
def made(tiny_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("several")
    ours = {"name": "scienceqa", "data": str(questions)}
    task = [ours, {**ours, "prompt": "qcm_lea"}, {"name": "diagramqa", "limit": 8}]
    spec, runs = folder / "spec.yaml", folder / "runs"
    spec.write_text(yaml.safe_dump({"model": str(tiny_model), "task": task, "cases": CASES, "strata": "needs_image"}))
    specs = load_spec(spec, check=Planner(runs, find_device("cpu")).check)
    told: list[str] = []
    records = qapbench.run(specs, runs, device="cpu", progress=lambda name, done, total: told.append(name))
    return Made(spec, runs, *records, told)


def test_a_list_of_tasks_is_one_record_with_a_column_per_task(made: Made) -> None:
    for record, name in ((made.dense, "dense"), (made.pruned, "pruned")):
        assert record.name == name
        assert (
            [part.label for part in record.parts or ()] == [column.name for column in record.scores.columns] == LABELS
        )
    assert {"dense, scienceqa", "pruned, diagramqa"} <= set(made.told)
    pruned = made.pruned
    assert pruned.task is not None
    assert pruned.task.questions == 14 + 14 + 8
    for column, part in zip(pruned.scores.columns, pruned.parts or (), strict=True):
        own = part.scores.columns[-1]
        assert (column.k, column.n, column.low) == (own.k, own.n, own.low)
    assert pruned.receipt.images == sum(part.tokens.images or 0 for part in pruned.parts or () if part.tokens)
    assert pruned.tokens is not None
    assert pruned.tokens.mean == 5
    assert pruned.fingerprints["data of diagramqa"] != pruned.fingerprints["data of scienceqa"]
    assert pruned.fingerprints["model"] == made.dense.fingerprints["model"]
    assert {record.run_id for record in qapbench.load_records(made.runs)} == {made.dense.run_id, pruned.run_id}
    assert len(qapbench.load_records(made.runs, parts=True)) == 8 + 3, "a run on blank images per task"
    table = qapbench.results(made.runs).set_index("name")
    assert table.loc["pruned", "diagramqa"] == pruned.scores.columns[-1].accuracy
    assert set(qapbench.results(made.runs, by="question")["task"]) == {"scienceqa", "diagramqa"}


def test_a_task_is_the_same_run_alone_and_in_a_list(
    made: Made, tiny_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"name": "scienceqa", "data": str(questions)}
    single = RunSpec.parse({"model": str(tiny_model), "task": task, **CASES["pruned"]})
    (record,) = qapbench.run(single, tmp_path, device="cpu")
    assert record.run_id == (made.pruned.parts or [])[0].run_id
    for name in (ANSWERS, "scored.jsonl", "receipt.json"):
        assert (tmp_path / record.run_id / name).read_bytes() == (made.runs / record.run_id / name).read_bytes()
    # Nothing is made again, neither alone nor in the list.
    monkeypatch.setattr("qapbench.running.execution.Execution.make", None)
    before = {path: path.read_bytes() for path in made.runs.glob("*/record.json")}
    assert qapbench.run(single, made.runs, device="cpu")[0].run_id == record.run_id
    assert qapbench.run(load_spec(made.spec), made.runs, device="cpu") == [made.dense, made.pruned]
    assert {path: path.read_bytes() for path in made.runs.glob("*/record.json")} == before


def test_runs_of_several_tasks_are_compared_task_by_task(made: Made) -> None:
    one, other = (read_scored(find_run(name, made.runs)) for name in ("dense", "pruned"))
    found = compare(one, other)
    assert [difference.column for difference in found.differences] == LABELS
    alone = [
        compare(read_scored(made.runs / a.run_id), read_scored(made.runs / b.run_id))
        for a, b in zip(made.dense.parts or (), made.pruned.parts or (), strict=True)
    ]
    assert [difference.p for difference in found.differences] == [part.differences[-1].p for part in alone]
    q = false_discovery_control([part.differences[-1].p for part in alone])
    assert [difference.q for difference in found.differences] == pytest.approx(list(q)), "over what is shown"
    assert found.gained == [f"{label}/{q}" for label, part in zip(LABELS, alone, strict=True) for q in part.gained]
    answers = one.answers([*found.gained, *found.lost])
    assert answers.keys() == {*found.gained, *found.lost}
    part = read_scored(find_run("pruned, diagramqa", made.runs))
    assert [difference.column for difference in compare(one, part).differences] == ["diagramqa"]


def test_the_relative_average_is_over_the_tasks(made: Made) -> None:
    dense, pruned = relative_averages([made.dense, made.pruned])
    assert dense.average == 1
    pairs = zip(made.pruned.scores.columns, made.dense.scores.columns, strict=True)
    shares = [(own.accuracy or 0) / (full.accuracy or 0) for own, full in pairs]
    assert pruned.average == pytest.approx(sum(shares) / 3)
    assert relative_averages([made.pruned])[0].reason.startswith("no full-precision run of this model on scienceqa")
    (column,) = [column for column in ablation_table([made.dense, made.pruned]).columns if column.header == "relative"]
    assert list(column.cells) == ["100.00", f"{100 * sum(shares) / 3:.2f}"]


def blank_of(made: Made, label: str) -> Record:
    """The run on blank images of one task."""
    (part,) = [part for part in made.dense.parts or () if part.label == label]
    spec = made.dense.spec["task"][LABELS.index(label)]
    (found,) = [
        record
        for record in qapbench.load_records(made.runs, parts=True)
        if record.asked_blank
        and record.fingerprints["data"] == part.data
        and record.spec["task"]["prompt"] == spec["prompt"]
    ]
    return found


def test_questions_that_need_their_image_are_scored_apart(made: Made) -> None:
    one, other = (Strata(made.runs).of(read_scored(made.runs / record.run_id)) for record in (made.dense, made.pruned))
    needing: dict[str, set[str]] = {}
    guessed: dict[str, set[str]] = {}
    for label, part in other.tasks.items():
        asked = read_scored(made.runs / blank_of(made, label).run_id)
        images = {answer.id for answer in answers_of(asked.folder or made.runs).read() if answer.images}
        needed = needing[label] = {q for q, row in asked.rows.items() if q in images and row["Avg"] == 0}
        guessed[label] = images - needed
        column = part.record.scores.column(NEEDS_IMAGE)
        assert column is not None
        assert (column.k or 0, column.n or 0) == (sum(part.rows[q]["Avg"] for q in needed), len(needed))
        assert part.record.scores.columns[-1].name == "Avg"
    assert all(any(sets.values()) for sets in (needing, guessed)), "some are answered right by chance"
    columns = [difference.column for difference in compare(one, other).differences]
    expected = [[f"{label}, {NEEDS_IMAGE}"] * bool(needing[label]) + [label] for label in LABELS]
    assert columns == [name for names in expected for name in names]
    dense = answers_of(made.runs / (made.dense.parts or [])[0].run_id).read()
    grey = answers_of(made.runs / blank_of(made, "scienceqa").run_id).read()
    moved = [a.outputs != b.outputs for a, b in zip(dense, grey, strict=True)]
    assert moved == [bool(answer.images) for answer in dense], "only the images are blank"
    page = build(qapbench.load_records(made.runs), made.runs / "page.html", runs=made.runs)
    row = json.loads(page.with_suffix(".json").read_text())[0]
    assert [row["cells"][f"{label} · {NEEDS_IMAGE}"]["n"] or 0 for label in LABELS] == list(map(len, needing.values()))


def test_probabilities_of_options_have_a_calibration_error(made: Made) -> None:
    part = (made.dense.parts or [])[2]
    task = load_task(TaskSpec(name="diagramqa", limit=8))
    shares, rights = [], []
    for answer in sorted(answers_of(made.runs / part.run_id).read(), key=lambda answer: answer.doc):
        shares.append(np.exp([output[0] for output in answer.outputs]) / sum(np.exp([o[0] for o in answer.outputs])))
        rights.append(task.docs[answer.doc]["answer"])
    found = part.scores.confidence
    assert found is not None
    assert found.n == 8
    assert found.brier == pytest.approx(
        np.mean([sum((p - np.eye(len(p))[right]) ** 2) for p, right in zip(shares, rights, strict=True)])
    )
    best = np.array([p.max() for p in shares])
    right = np.array([p.argmax() == at for p, at in zip(shares, rights, strict=True)])
    bins = np.minimum((best * 15).astype(int), 14)
    gaps = [abs(right[bins == at].mean() - best[bins == at].mean()) * (bins == at).mean() for at in set(bins)]
    assert found.ece == pytest.approx(sum(gaps))


def test_a_record_of_several_tasks_is_verified_by_its_parts(made: Made, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(made.runs, runs)
    report = check_record(runs / made.pruned.run_id)
    assert sum("stored answers, one for each question" in line for line in report.passed) == 3
    assert report.notes == made.pruned.notes
    first, *others = made.pruned.scores.columns
    better = made.pruned.scores.model_copy(update={"columns": [first.model_copy(update={"k": first.n}), *others]})
    write_record(runs / made.pruned.run_id, made.pruned.model_copy(update={"scores": better}))
    with pytest.raises(UserError, match="scores does not follow from the runs of its tasks"):
        check_record(runs / made.pruned.run_id)
    with (runs / (made.dense.parts or [])[0].run_id / ANSWERS).open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"answers\.jsonl is damaged"):
        check_record(runs / made.dense.run_id)


def test_a_task_in_a_list_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model: m\ntask:\n  - diagramqa\n  - {name: scienceqa, limits: 3}\n")
    with pytest.raises(UserError, match=r"task.1.limits: unknown field; did you mean 'limit'") as caught:
        load_spec(path)
    assert [problem.line for problem in caught.value.problems] == [4]
    path.write_text("model: diagram-llava\ntask:\n  - diagramqa\n  - sciencqa\n")
    with pytest.raises(UserError, match=r"task.1.name: unknown task 'sciencqa'; did you mean 'scienceqa'") as caught:
        load_spec(path, check=Planner(tmp_path, find_device("cpu")).check)
    assert [problem.line for problem in caught.value.problems] == [4]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ([], "task: an empty list; name at least one task"),
        (["diagramqa", "diagramqa"], "task 'diagramqa' is listed twice with the same options"),
        ([3], "task.0: "),
    ],
)
def test_lists_that_make_no_row_are_refused(task: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Planner(tmp_path, find_device("cpu")).parts(RunSpec.parse({"model": "diagram-llava", "task": task}))
    with pytest.raises(UserError, match="tasks: unknown field; a list of tasks stands under `task`"):
        RunSpec.parse({"model": "diagram-llava", "tasks": task})


def test_set_reaches_every_task_of_the_list(made: Made) -> None:
    for spec in load_spec(made.spec, ["task.limit=3", "task.data=null"]):
        assert [(task.name, task.limit, task.data) for task in spec.tasks] == [
            ("scienceqa", 3, None),
            ("scienceqa", 3, None),
            ("diagramqa", 3, None),
        ]


def test_groups_of_tasks_are_their_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text("task: sums\n")
    (folder / "suite.yaml").write_text("group: suite\ntask: [sums, {group: inner, task: [diagramqa]}]\n")
    (folder / "around.yaml").write_text("group: around\ntask: [suite, around]\n")
    (folder / "changed.yaml").write_text("group: changed\ntask: [{task: sums, num_fewshot: 3}]\n")
    planner = Planner(tmp_path, find_device("cpu"))

    def names(**task: Any) -> list[tuple[str, str | None, int | None]]:
        spec = RunSpec.parse({"model": "diagram-llava", "task": {"limit": 4, **task}})
        return [(part.task.name, part.task.include_path, part.task.limit) for part in planner.parts(spec)]

    expected = [("sums", str(folder), 4), ("diagramqa", None, 4)]
    assert names(name=str(folder / "suite.yaml")) == expected
    assert names(name="suite", include_path=str(folder)) == expected
    with pytest.raises(UserError, match="the group 'around' contains itself"):
        names(name="around", include_path=str(folder))
    with pytest.raises(UserError, match="'changed' is a group whose members are defined inside of it"):
        names(name="changed", include_path=str(folder))
    index = planner_index({"maths": ["algebra", "shapes"], "shapes": ["circles"]})
    monkeypatch.setattr("qapbench.tasking.groups.lm_eval_index", lambda: index)
    assert names(name="maths") == [("algebra", None, 4), ("circles", None, 4)]


def planner_index(groups: dict[str, list[str]]) -> Any:
    from qapbench.tasking.index import TaskIndex

    return TaskIndex(lm_eval="0", files={}, groups=groups)
