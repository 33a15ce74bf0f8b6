"""A plugin's task that is broken: one sentence that names the plugin, the file and the field, for specs that ask it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qapbench import UserError
from qapbench.methods import plugins
from qapbench.methods.plugins import load_plugin_file, plugin_of
from qapbench.running.planner import Planner
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.spec_file import load_spec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.registry import tasks
from qapbench.tasking.tasks import load_task

YAML = """
task: hues
test_split: test
output_type: generate_until
custom_dataset: !function CODE.read
doc_to_text: text
doc_to_target: answer
generation_kwargs: {until: ["."], max_gen_toks: 2}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CODE = '''
from qapbench import task


class Docs(list):
    """Two questions."""

    fingerprint = "of two questions"
    features = {"text": None, "answer": None}


@task("hues")
def read(**options):
    """Two questions without an image."""
    return {"test": Docs({"text": f"What is {at}?", "answer": str(at)} for at in range(2))}
'''
Write = Callable[..., Path]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes and loads a plugin file with the task `hues`, and returns the file."""
    tasks.names()
    monkeypatch.setattr(tasks, "_entries", dict(tasks._entries))
    monkeypatch.setattr(plugins, "_loaded_files", {})

    def write(code: str = CODE, **files: str) -> Path:
        file = tmp_path / "hues_plugin.py"
        file.write_text(code)
        for name, text in ({"hues": YAML} | files).items():
            (tmp_path / f"{name}.yaml").write_text(text.replace("CODE", "hues_plugin"))
        load_plugin_file(file)
        return file

    return write


def refusals(spec: dict[str, Any]) -> list[str]:
    """What the check of a spec's task says, and what loading the task for a run says."""
    run = RunSpec.parse({"model": "diagram-llava", "task": {"name": "hues", **spec}})
    said = []
    for look in (lambda: Planner(Path("runs"), torch.device("cpu")).check(run, ["task"]), lambda: load_task(run.task)):
        with pytest.raises(UserError) as caught:
            look()
        said.append(str(caught.value))
    return said


def test_a_plugins_task_that_is_right_is_read(plugin: Write) -> None:
    plugin()
    outline = Planner(Path("runs"), torch.device("cpu")).task(RunSpec.parse({"model": "m", "task": "hues"}))
    loaded = load_task(TaskSpec(name="hues"))
    assert outline.count == loaded.count == 2
    assert outline.columns == loaded.columns == ["exact_match"]
    assert list(outline.docs) == list(loaded.docs)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("task: [", "not valid YAML"),
        ("a: 2026-99-99", "not valid YAML (month must be in 1..12)"),
        ("a: !!bool z", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("[" * 500, "not valid YAML"),
        ("- a list", "a task's YAML is a mapping, got list"),
        ("", "a task's YAML is a mapping, got NoneType"),
        ("include: none.yaml", "none.yaml: No such file or directory"),
        ("include: 3", "include: expected a path or a list of paths"),
        ('include: ["a\\0b"]', "include: expected a path or a list of paths"),
        ("include: hues.yaml", "hues.yaml is included twice"),
        ("test_split: test\nmetadata: [1]", "metadata: expected a mapping, got list"),
        ("task: hues", "test_split: this field is required"),
        ("test_split: [test]", "test_split: input should be a valid string"),
        ("test_split: test\nmetric_list: {metric: a}", "metric_list: input should be a valid list"),
        ("test_split: test\nmetric_list: [acc]", "metric_list.0: input should be a valid dictionary"),
        ("test_split: test\nmetric_list: [{metric: no}]", "metric_list.0.metric: input should be a valid string"),
    ],
)
def test_a_broken_yaml_is_one_sentence(yaml: str, said: str, plugin: Write) -> None:
    file = plugin(hues=yaml)
    for message in refusals({}):
        assert message.startswith(f"task.name: task 'hues' of plugin {file}: ")
        assert str(file.parent / "hues.yaml") in message
        assert said in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no\\ndata')", "reading its questions fails: ValueError: no ("),
        ("raise SystemExit(3)", "reading its questions fails: SystemExit: 3 ("),
        ("return {}['test']", "reading its questions fails: KeyError: 'test' ("),
        ("return read(**options)", "reading its questions fails: RecursionError: maximum recursion depth"),
        ("return None", "returns no split 'test'"),
        ("return {'dev': Docs()}", "returns no split 'test'"),
        ("return {'test': [{}]}", "returns no documents: mappings, with `features` and a `fingerprint`"),
        ("return {'test': Docs([1])}", "returns no documents: mappings, with `features` and a `fingerprint`"),
    ],
)
def test_a_reader_that_fails_is_one_sentence(body: str, said: str, plugin: Write) -> None:
    start = CODE.index("    return {")
    file = plugin(CODE[:start] + f"    {body}\n")
    line = len(CODE[:start].splitlines()) + 1
    checked, loaded = refusals({})
    for message in (checked, loaded):
        assert message.startswith(f"task.name: task 'hues' of plugin {file}: ")
        assert str(file) in message
        assert "\n" not in message
    assert said in checked
    if "fails" in said:
        assert f"({file}:{line})" in checked


def test_only_specs_that_ask_a_broken_task_are_refused(plugin: Write, tmp_path: Path) -> None:
    """All mistakes in one report, each under its line; another task is read as ever."""
    file = plugin(hues="task: [")
    path = tmp_path / "spec.yaml"
    check = Planner(tmp_path / "runs", torch.device("cpu")).check
    spec = {"model": "diagram-llava", "task": "hues", "plugins": [file.name]}
    path.write_text(json.dumps(spec, indent=0))
    with pytest.raises(
        UserError, match=r"^line 3: task.name: task 'hues' of plugin .*hues_plugin\.py: .*hues\.yaml: not val"
    ):
        load_spec(path, check=check)
    path.write_text(json.dumps(spec | {"task": "diagramqa"}))
    assert len(load_spec(path, check=check)) == 1


def test_a_broken_letter_variant_is_one_sentence(plugin: Write) -> None:
    file = plugin(hues_letter="task: [")
    for message in refusals({"answers": "letter"}):
        assert message.startswith(f"task.name: task 'hues' of plugin {file}: {file.parent / 'hues_letter.yaml'}: ")


def test_a_yaml_that_is_missing_is_one_sentence(plugin: Write) -> None:
    file = plugin()
    (file.parent / "hues.yaml").unlink()
    for message in refusals({}):
        assert message == f"task.name: task 'hues' of plugin {file}: there is no hues.yaml beside {file}"


def test_the_plugin_of_a_module() -> None:
    assert plugin_of("qapbench.tasks.scienceqa.utils") == "plugin 'tasks'"
    assert plugin_of("qapbench.strategies.pruners.trim") == "plugin 'strategies'"
    assert plugin_of("somewhere.else") == "module somewhere.else"


def test_a_function_of_the_task_that_fails_later_is_one_sentence_too(plugin: Write) -> None:
    """While prompts are written or answers are scored; an error of our own code or of lm-eval's stays what it is."""
    file = plugin()
    planner = Planner(Path("runs"), torch.device("cpu"))
    outline = planner.task(RunSpec.parse({"model": "m", "task": "hues"}))
    told = outline.failure("scoring fails", KeyError("answer"))
    assert str(told).startswith(f"task.name: task 'hues' of plugin {file}: scoring fails: KeyError: 'answer'")
    for error in (UserError("said already"), KeyError("answer")):
        ours = planner.task(RunSpec.parse({"model": "m", "task": "diagramqa"}))
        assert ours.failure("scoring fails", error) is error
