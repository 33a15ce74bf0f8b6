"""Tasks of a user's own: an lm-eval YAML file beside the spec, by its path and by `include_path`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from llava_checkpoints import picture
from PIL import Image

import qapbench
from qapbench import RunSpec, UserError
from qapbench.records.store import answers_of
from qapbench.running.planner import Planner
from qapbench.spec.spec_file import load_spec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.task_file import find_task_file

CPU = torch.device("cpu")
COLORS = ["cat", "dog", "tree"]
FUNCTIONS = """
def options(doc):
    return [option.strip() for option in doc["options"]]


def images(doc):
    return [doc["image"]]
"""
SCORING = """
def starts_alike(doc, results):
    return {"starts_alike": float(results[0].strip()[:1] == doc["answer"][:1])}
"""
CHOICE = """
task: my_colors
dataset_path: parquet
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "<image>\\n{{question}}"
doc_to_choice: !function functions.options
doc_to_target: "{{options.index(answer)}}"
doc_to_image: !function functions.images
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
GENERATED = """
include: my_colors.yaml
task: my_words
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["."], max_gen_toks: 3}
process_results: !function scoring.starts_alike
metric_list:
  - {metric: starts_alike, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """datasets keeps its copies below the test's folder, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: two tasks on five questions with an image, and the functions that they name."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"What is in {at}?", "options": COLORS, "answer": COLORS[at % 3], "image": picture(at)}
        for at in range(5)
    ]
    table = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
    table.to_parquet(str(folder / "colors.parquet"))
    (folder / "my_colors.yaml").write_text(CHOICE.replace("DATA", str(folder / "colors.parquet")))
    (folder / "my_words.yaml").write_text(GENERATED)
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "scoring.py").write_text(SCORING)
    (folder / "notes.yaml").write_text("- a list, and no task\n")
    return folder


def test_a_file_beside_the_spec_runs_by_path_and_by_folder(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    spec = {
        "model": str(tiny_model),
        "prune": {"method": "cdpruner", "keep": 5},
        "matrix": {"task": [{"name": "my_colors", "include_path": "tasks"}, "tasks/my_colors.yaml"]},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    specs = load_spec(tmp_path / "spec.yaml", check=Planner(tmp_path / "runs", CPU).check)
    assert [spec.task.name for spec in specs] == ["my_colors", str(folder / "my_colors.yaml")]
    first, second = qapbench.run(specs, tmp_path / "runs", device="cpu")
    assert first.run_id == second.run_id, "the same task, however it is named"
    assert first.task.name == second.task.name == "my_colors"
    assert first.task.questions == 5
    assert first.tokens is not None
    assert first.tokens.kept == 5
    columns = {column.name: column for column in first.scores.columns}
    assert columns["acc"].n == 5
    assert columns["brier_score"].figure is not None
    assert first.score == columns["acc"]


def test_generated_text_is_scored_by_the_users_function(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    spec = RunSpec.parse({"model": str(tiny_model), "task": str(folder / "my_words.yaml")})
    (record,) = qapbench.run([spec], tmp_path / "runs", device="cpu")
    assert record.task.name == "my_words"
    answers = qapbench.results(tmp_path / "runs", by="question")
    assert len(answers) == 5
    assert set(answers["starts_alike"]) <= {0.0, 1.0}


@pytest.mark.parametrize("edited", ["my_colors.yaml", "functions.py", "scoring.py"])
def test_an_edit_of_any_file_of_the_task_makes_another_run(
    edited: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def run_id() -> str:
        spec = RunSpec.parse({"model": str(tiny_model), "task": str(folder / "my_words.yaml")})
        return Planner(tmp_path / "runs", CPU).plan(spec).id

    before = run_id()
    assert run_id() == before
    with (folder / edited).open("a") as file:
        file.write("\n# changed\n")
    assert run_id() != before


def test_a_folder_that_was_moved_keeps_its_results(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    def run_id(where: Path) -> str:
        spec = RunSpec.parse({"model": str(tiny_model), "task": {"name": "my_words", "include_path": str(where)}})
        return Planner(tmp_path / "runs", CPU).plan(spec).id

    before = run_id(folder)
    folder.rename(tmp_path / "moved")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "moved" / "colors.parquet").rename(folder / "colors.parquet")  # whose path the YAML gives
    assert run_id(tmp_path / "moved") == before


Named = Callable[[Path], dict[str, Any]]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (lambda f: {"name": "my_colours", "include_path": str(f)}, r"no task 'my_colours' in .*; did you mean 'my_col"),
        (lambda f: {"name": "my_colors", "include_path": str(f / "none")}, r"include_path: .*none: no such folder"),
        (lambda f: {"name": str(f / "none.yaml")}, r"name: .*none\.yaml: no such file"),
        (lambda f: {"name": str(f / "notes.yaml")}, r"notes\.yaml: a task's YAML is a mapping, got list"),
        (lambda f: {"name": str(f / "group.yaml")}, r"group\.yaml is a group of tasks"),
        (lambda f: {"name": str(f / "bare.yaml")}, r"bare\.yaml has no `task: NAME`"),
        (lambda f: {"name": str(f / "broken.yaml")}, r"broken\.yaml: not valid YAML"),
        (lambda f: {"name": str(f / "circle.yaml")}, r"circle\.yaml is included twice"),
        (lambda f: {"name": "twice", "include_path": str(f)}, r"'twice' is defined twice: in .*a\.yaml and .*b\.yaml"),
    ],
)
def test_mistakes_are_named(named: Named, message: str, folder: Path) -> None:
    (folder / "group.yaml").write_text("task: [my_colors, my_words]\n")
    (folder / "bare.yaml").write_text("dataset_path: parquet\n")
    (folder / "broken.yaml").write_text("task: [\n")
    (folder / "circle.yaml").write_text("task: circle\ninclude: circle.yaml\n")
    for name in ("a", "b"):
        (folder / f"{name}.yaml").write_text("task: twice\n")
    with pytest.raises(UserError, match=message):
        find_task_file(TaskSpec.model_validate(named(folder)))


def test_a_file_and_a_folder_are_one_too_many(folder: Path) -> None:
    with pytest.raises(UserError, match="`include_path` is for a task's name"):
        RunSpec.parse({"model": "m", "task": {"name": "a.yaml", "include_path": str(folder)}})


def test_what_fails_in_the_users_code_is_one_sentence(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (folder / "functions.py").write_text("import no_such_package\n")
    spec = RunSpec.parse({"model": str(tiny_model), "task": str(folder / "my_colors.yaml")})
    with pytest.raises(UserError, match=r"cannot load .*my_colors\.yaml': .*no_such_package"):
        Planner(tmp_path, CPU).check(spec)


def test_a_metric_that_fails_keeps_the_answers(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    spec = RunSpec.parse({"model": str(tiny_model), "task": str(folder / "my_words.yaml")})
    scoring = folder / "scoring.py"
    scoring.write_text(SCORING.replace('doc["answer"]', 'doc["ansver"]'))
    with pytest.raises(UserError, match=r"my_words\.yaml: scoring fails \(answers are kept\): KeyError: 'ansver'"):
        qapbench.run(spec, tmp_path / "runs", device="cpu")
    (stored,) = (tmp_path / "runs").glob("*/answers.jsonl")
    assert len(stored.read_text().splitlines()) == 5


def test_transparent_pictures_of_a_task_of_lm_evals_are_put_on_the_colour(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    clear = [Image.new("RGBA", (32, 32), (0, 0, 0, alpha)) for alpha in (0, 255, 100)]  # the same on black
    options = {"question": ["What?"] * 3, "options": [COLORS] * 3, "answer": COLORS, "image": clear}
    datasets.Dataset.from_dict(options).to_parquet(str(folder / "colors.parquet"))
    task = {"name": str(folder / "my_colors.yaml"), "background": "white"}
    (record,) = qapbench.run(RunSpec.parse({"model": str(tiny_model), "task": task}), tmp_path / "runs", device="cpu")
    assert record.receipt.transparent == 2
    assert record.spec["task"]["background"] == "#ffffff"
    shown = {str(answer.outputs) for answer in answers_of(tmp_path / "runs" / record.run_id).read()}
    assert len(shown) == 3, "white, black and something between"
