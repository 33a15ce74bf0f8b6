"""The names of lm-eval's tasks on disk, and what is known of our own tasks without lm-eval."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from qapbench.spec.run_spec import TaskSpec
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


def test_the_index_is_lm_evals(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small folder in the place of lm-eval's own."""
    folder = tmp_path / "tasks"
    (folder / "deep").mkdir(parents=True)
    task = {"dataset_path": "json", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    for name in ("sums", "products"):
        (folder / "deep" / f"{name}.yaml").write_text(json.dumps({"task": name, **task}))
    (folder / "group.yaml").write_text(json.dumps({"group": "arithmetic", "task": ["sums", "products"]}))
    manager = lm_eval.tasks.TaskManager

    def small(include_defaults: bool) -> Any:
        assert include_defaults
        return manager(include_path=[folder], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    monkeypatch.setattr(index, "lm_eval_folder", lambda: folder)
    found = lm_eval_index()
    assert found.files == {"products": "deep/products.yaml", "sums": "deep/sums.yaml"}
    assert found.groups == {"arithmetic": ["sums", "products"]}
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


def test_an_outline_needs_no_lm_eval(write: Any) -> None:
    code = (
        "import sys\n"
        "from qapbench.spec.run_spec import TaskSpec\n"
        "from qapbench.tasking.tasks import find_outline\n"
        f"outline = find_outline(TaskSpec(name='scienceqa', data={write()!r}))\n"
        "assert outline.count == 4\n"
        "assert 'lm_eval' not in sys.modules, 'lm_eval was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_own_tasks_are_those_of_this_project() -> None:
    assert set(own_tasks()) == {"scienceqa", "diagramqa"} <= set(tasks.names())
    assert all(tasks.create(name).has_letters for name in own_tasks())
    assert tasks.create("scienceqa").columns[-2:] == ["Avg", "unparsed"]
