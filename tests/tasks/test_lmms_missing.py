"""What a spec with a task of lmms-eval's says where lmms-eval is not installed, and how such a spec is read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from qapbench import RunSpec, UserError
from qapbench.spec.spec_file import load_spec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.lmms_index import tags_of
from qapbench.tasking.registry import runs_only_own_code
from qapbench.tasking.tasks import find_outline

POPE = {"name": "pope", "from": "lmms-eval"}


def test_without_lmms_eval_the_error_names_the_task_and_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lmms_eval" else real(name, *rest)
    )
    with pytest.raises(UserError) as caught:
        find_outline(TaskSpec.model_validate(POPE))
    (problem,) = caught.value.problems
    assert problem.where == ("task", "name")
    assert problem.message.startswith("'pope' is a task of lmms-eval, which is not installed: pip install")
    assert "pip install 'qapbench[lmms-eval]'" in problem.message
    assert "pip install --no-deps 'lmms-eval>=0.7.1,<0.8' && pip install accelerate loguru tenacity" in problem.message
    assert "\n" not in problem.message


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("task: one\n", []),
        ("tag: reasoning\ntask: one\n", ["reasoning"]),
        ("task: one\n'tag': \"reasoning\"   # why\n", ["reasoning"]),
        ("tag: [reasoning, 'qwen3.5-family', b]\ntask: one\n", ["reasoning", "qwen3.5-family", "b"]),
        ('tag:\n  - reasoning\n  - "red-team"\ntask: one\n', ["reasoning", "red-team"]),
        ("tag:\n- reasoning\ntask: one\nmetric_list:\n- metric: acc\n", ["reasoning"]),
        ("metadata:\n  tag: other\ntask: one\n", []),
    ],
)
def test_the_tags_of_a_task_are_those_that_yaml_reads(text: str, tags: list[str]) -> None:
    assert tags_of(text) == tags
    found = yaml.safe_load(text).get("tag", [])
    assert tags == (found if isinstance(found, list) else [found])


def parsed(**task: Any) -> RunSpec:
    return RunSpec.parse({"model": "m", "task": {**POPE, **task}})


def test_where_the_task_is_from_is_part_of_the_spec_and_of_the_identity() -> None:
    spec = parsed()
    assert spec.task.origin == "lmms-eval"
    stored = spec.model_dump(mode="json")
    assert stored["task"]["from"] == "lmms-eval"
    assert RunSpec.parse(stored) == spec
    plain = RunSpec.parse({"model": "m", "task": "pope"})
    assert "from" not in plain.model_dump(mode="json")["task"], "a run of an earlier version keeps its id"
    assert plain.digest({}) != spec.digest({})
    assert parsed(data="here").digest({}) == parsed(data={"a/b": "there"}).digest({}) == spec.digest({})


def test_paths_of_a_mapping_are_relative_to_the_spec(tmp_path: Path) -> None:
    (tmp_path / "pope").mkdir()
    (tmp_path / "spec.yaml").write_text(
        "model: m\ntask: {name: pope, from: lmms-eval, data: {lmms-lab-encoder/POPE: pope, other/data: elsewhere}}\n"
    )
    (spec,) = load_spec(tmp_path / "spec.yaml")
    assert spec.task.data == {"lmms-lab-encoder/POPE": str(tmp_path / "pope"), "other/data": "elsewhere"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"from": "lmms"}, r"task.from: input should be 'lmms-eval' \(got 'lmms'\)"),
        ({"fron": "lmms-eval"}, r"task.fron: unknown field; did you mean 'from'\?"),
        ({"data": 3}, r"task.data: a path, or a mapping from hub ids to paths; got 3"),
        ({"data": {"a/b": 3}}, r"task.data.a/b: a path, or a mapping from hub ids to paths; got 3"),
        ({"data": {"a/b": ""}}, r"task.data.a/b: empty"),
        ({"name": "mine.yaml"}, r"`from` is for the name of a task of lmms-eval's"),
        (
            {"from": None, "data": {"a/b": "c"}},
            r"task.data: a mapping from hub ids to folders is for `from: lmms-eval`",
        ),
    ],
)
def test_mistakes_are_named(task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(**task)


def test_only_own_tasks_of_a_strangers_record_are_read() -> None:
    assert runs_only_own_code(TaskSpec(name="scienceqa"))
    for more in ({"from": "lmms-eval"}, {"include_path": "tasks"}):
        assert not runs_only_own_code(TaskSpec.model_validate({"name": "scienceqa", **more}))
    assert not runs_only_own_code(TaskSpec(name="pope"))
