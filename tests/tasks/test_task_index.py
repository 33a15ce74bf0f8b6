"""The names of lm-eval's tasks on disk, and what is known of our own tasks without lm-eval."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from benchmarks.task_index import differences
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking import index
from qapbench.tasking.index import TaskIndex, lm_eval_index
from qapbench.tasking.outline import read_outline
from qapbench.tasking.registry import own_tasks, tasks
from qapbench.tasking.tasks import load_task

VERSION = importlib.metadata.version("lm-eval")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The file that the index is kept in, below the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lm_eval_index.cache_clear()
    request.addfinalizer(lm_eval_index.cache_clear)
    return tmp_path / "qapbench" / f"lm-eval-tasks-and-groups-{VERSION}.json"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Says each time that lm-eval is asked for its index, which it does not make here."""
    asked: list[str] = []

    def make(version: str) -> TaskIndex:
        asked.append(version)
        return TaskIndex(lm_eval=version, files={"sums": "sums.yaml"}, groups={"arithmetic": ["sums", "products"]})

    monkeypatch.setattr(index, "_made", make)
    return asked


def test_the_index_is_made_once_per_version(cache: Path, made: list[str]) -> None:
    first = lm_eval_index()
    assert first.names == ["sums", "arithmetic"]
    lm_eval_index.cache_clear()  # another process
    assert lm_eval_index() == first
    assert made == [VERSION]
    cache.write_text(cache.read_text().replace(VERSION, "0.0.1"))
    lm_eval_index.cache_clear()
    assert lm_eval_index() == first
    assert made == [VERSION] * 2
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # no draft is left


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lm_eval": 3}'])
def test_a_damaged_index_is_made_anew(text: str, cache: Path, made: list[str]) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    assert lm_eval_index().files == {"sums": "sums.yaml"}
    assert made == [VERSION]
    assert json.loads(cache.read_text())["lm_eval"] == VERSION


def test_a_cache_that_cannot_be_written_is_a_warning(
    cache: Path, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert lm_eval_index().names == ["sums", "arithmetic"]
    assert f"cannot be kept in {cache}" in caplog.text


FILES = {
    "plain/sums.yaml": "task: sums  # with a comment\ndataset_path: json\ntag: [maths, small]\n",
    "plain/_template": "tag:\n  - maths\n  - shared\noutput_type: generate_until\ntask: unused\n",
    "plain/products.yaml": "include: _template\ntask: products\n",
    "plain/more.yaml": 'include: ../plain/_template\n\'task\': "more-products"\n"tag":\n- own\n',
    "plain/twice.yaml": "task: sums\n",
    "plain/untagged.yaml": "include: _template\ntask: untagged\ntag: null\n",
    "group.yaml": "group: arithmetic\ntask:\n  - sums\n  - task: products\n    doc_to_text: !function utils.text\n",
    "flat.yaml": "group: flat_list\ntask:\n- sums\n- products\n",
    "python.yaml": "class: !function utils.Task\ntask: in_python\n",
    "python_group.yaml": "group: no_group\nclass: !function utils.Task\ntask: python_and_group\n",
    "flow.yaml": '{"task": "in_flow", "tag": "shared"}',
    "folded.yaml": "task: >-\n  folded\n",
    "continued.yaml": "task: two\n  words\n",
    "below.yaml": "doc_to_text: |\n  task: text\n\n  group: text\ntask: below\n",
    "twice_in_one.yaml": "task: first\ntask: second\n",
    "spaced.yaml": "task : spaced\n",
    "marked.yaml": "---\n# a comment\ntask: marked\n...\n",
    "crlf.yaml": "task: crlf\r\ntag: shared\r\n",
    "bom.yaml": "\ufefftask: bom\n",
    "anchored.yaml": "task: &name anchored\ndoc_to_text: *name\n",
    "unicode.yaml": "task: caf\u00e9\n",
    "merged.yaml": "base: &base {task: by_merge}\n<<: *base\n",
    "number.yaml": "tag: shared\ntask: a1\n",
    "ends.yaml": "group: ends\ntask:",
    "no_task.yaml": "dataset_path: json\n",
    "list.yaml": "- task: listed\n",
    "empty.yaml": "",
    "nameless.yaml": "task: [sums, products]\n",
    "circle.yaml": "include: circle.yaml\ntask: circle\n",
    "absent.yaml": "include: absent_template\ntask: absent\n",
    "broken.yaml": "task: [\n",
    "two.yaml": "task: one\n---\ntask: other\n",
    "__pycache__/cached.yaml": "task: cached\n",
    "tag_of_a_group.yaml": "task: late\ntag: arithmetic\n",
    "zz_taken.yaml": "group: shared\ntask: [sums]\n",
}


def test_the_index_is_lm_evals(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small folder in the place of lm-eval's own; `python -m benchmarks.task_index` compares the whole of that."""
    folder = tmp_path / "tasks"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    manager = lm_eval.tasks.TaskManager(include_path=[folder], include_defaults=False)
    assert differences(folder, manager) == []
    assert len(manager.all_tasks) == 27
    monkeypatch.setattr(index, "lm_eval_folder", lambda: folder)
    found = lm_eval_index()
    assert found.files["more-products"] == "plain/more.yaml"
    assert set(found.files) == set(manager.all_subtasks)
    assert set(found.groups) == {*manager.all_groups, *manager.all_tags}
    assert found.groups["flat_list"] == ["sums", "products"]
    assert found.groups["maths"] == ["products", "sums"]
    assert found.groups["arithmetic"] == []  # it changes one of its members, which has no name of its own
    assert cache.is_file()


def test_the_folder_of_lm_evals_tasks() -> None:
    assert index.lm_eval_folder() == Path(lm_eval.tasks.__file__).parent


@pytest.mark.parametrize("name", own_tasks())
@pytest.mark.parametrize("answers", ["letter", "generate"])
def test_the_outline_says_what_the_loaded_task_says(name: str, answers: str, write: Any) -> None:
    for fields in ({}, {"limit": 2}, {"prompt": "qcm_lea", "parser": "lmms"}):
        spec = TaskSpec(name=name, data=write(), answers=answers, **fields)
        outline, loaded = read_outline(spec, seed=3), load_task(spec, seed=3)
        for field in dataclasses.fields(outline):
            if field.name != "docs":
                assert getattr(outline, field.name) == getattr(loaded, field.name), field.name
        assert list(outline.docs) == list(loaded.docs)
        assert outline.ids == loaded.ids
        assert [list(outline.images(doc)) for doc in range(outline.count)] == [
            list(loaded.images(doc)) for doc in range(loaded.count)
        ]
        assert len(outline.code) == 64


def test_an_outline_and_an_unknown_name_need_no_lm_eval(write: Any, tmp_path: Path) -> None:
    """The second with an empty cache: the names are found without it."""
    code = (
        "import sys\n"
        "from qapbench.errors import UserError\n"
        "from qapbench.spec.task_spec import TaskSpec\n"
        "from qapbench.tasking.tasks import find_outline\n"
        f"outline = find_outline(TaskSpec(name='scienceqa', data={write()!r}))\n"
        "assert outline.count == 4\n"
        "try:\n"
        "    find_outline(TaskSpec(name='ai2_arq'))\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "assert 'lm_eval' not in sys.modules, 'lm_eval was imported'\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "task.name: unknown task 'ai2_arq'; did you mean 'ai2_arc'?\n"
    assert len(list(tmp_path.glob("qapbench/lm-eval-tasks-*.json"))) == 1


def test_own_tasks_are_those_of_this_project() -> None:
    assert set(own_tasks()) == {"scienceqa", "diagramqa"} <= set(tasks.names())
    assert all(tasks.create(name).has_letters for name in own_tasks())
    assert tasks.create("scienceqa").columns[-2:] == ["Avg", "unparsed"]
