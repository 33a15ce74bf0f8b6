"""Wrong data and wrong names, each answered with one readable message; lm-eval's own tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from question_files import ROWS, TEXT, load, picture, png, row

from qapbench import UserError
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.index import TaskIndex
from qapbench.tasking.tasks import find_outline, load_task


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, r"data\.parquet: column 'answer', row 1: 2 is not an index of its 2 choices"),
        ({"answer": -1}, "column 'answer', row 1: -1 is not"),
        ({"answer": None}, "column 'answer', row 1: None is not"),
        ({"choices": []}, "column 'choices', row 1: empty"),
        ({"choices": None}, "column 'choices', row 1: empty"),
        ({"choices": ["a", None]}, "column 'choices', row 1: holds a null"),
        ({"choices": ["x"] * 27}, "column 'choices', row 1: 27 choices"),
        ({"question": ""}, "column 'question', row 1: empty"),
        ({"pid": "10"}, "column 'pid', row 1: '10' is also row 0"),
    ],
)
def test_wrong_rows(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write([ROWS[0], {**row("11"), **changes}]))


def test_many_wrong_rows_are_summed_up(write: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(write([row(str(i), answer=9) for i in range(12)]))
    assert len(caught.value.problems) == 6
    assert "and 7 more rows" in str(caught.value)


def test_wrong_columns_all_at_once(write: Any) -> None:
    rows = [{**{k: v for k, v in ROWS[1].items() if k != "hint"}, "hints": "", "answer": "B"}]
    with pytest.raises(UserError) as caught:
        load(write(rows, answer=TEXT))
    text = str(caught.value)
    assert "column 'hint' is missing (text); did you mean 'hints'?" in text
    assert "column 'answer' is string, expected an integer" in text
    assert "task.data" in text


def test_no_pid_column_and_null_columns(write: Any) -> None:
    rows = [{k: v for k, v in r.items() if k != "pid"} | {"hint": None, "image": None} for r in ROWS]
    loaded = load(write(rows, hint=pa.null(), image=pa.null()))
    assert loaded.ids == ["0", "1", "2", "3"]
    assert all(doc["columns"][1:2] == ["NO"] for doc in loaded.docs)


def test_unreadable_data(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(Path(write()).read_bytes()[:-20])
    for data, message in [
        (str(torn), "not a readable parquet file"),
        (str(tmp_path / "none.parquet"), "no such file"),
        (str(tmp_path), "a folder"),
        ("nowhere", "no such file"),
    ]:
        with pytest.raises(UserError, match=f"task.data: .*{message}"):
            load(data)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(UserError, match=r"task.data: cannot load derek-thomas/ScienceQA .*\(no route\)"):
        load_task(TaskSpec(name="scienceqa"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "cqm"}, "task.prompt: unknown prompt 'cqm'; did you mean 'cqm_a'?"),
        ({"parser": "lava"}, "task.parser: unknown parser 'lava'; did you mean 'llava'?"),
        ({"name": "sciencqa"}, "task.name: unknown task 'sciencqa'; did you mean 'scienceqa'?"),
        ({"name": "scienceqa_letter"}, "task.name: write name: scienceqa with answers: letter"),
    ],
)
def test_unknown_names(write: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(write(), **{"name": "scienceqa", **fields})
    assert str(caught.value).startswith(message)


def test_tasks_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and an index that stand in for lm-eval's own: reading all of it takes seconds."""
    (tmp_path / "d.jsonl").write_text('{"q": "1 + 1", "a": "2"}\n{"q": "2 + 2", "a": "4"}\n')
    config = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(config))

    index = TaskIndex(lm_eval="0", files={"sums": "sums.yaml"}, groups={"arithmetic": ["sums", "products"]})
    monkeypatch.setattr("qapbench.tasking.tasks.lm_eval_index", lambda: index)
    monkeypatch.setattr("qapbench.tasking.tasks.lm_eval_folder", lambda: tmp_path)
    loaded = load_task(TaskSpec(name="sums", limit=1))
    assert (loaded.columns, loaded.count, loaded.ids, loaded.letter) == (["exact_match"], 1, ["0"], False)
    assert loaded.fingerprint
    assert loaded.code == ""  # lm-eval's version stands for its tasks
    outline = find_outline(TaskSpec(name="sums", limit=1))
    assert (outline.columns, outline.asked, outline.fingerprint) == (loaded.columns, loaded.asked, loaded.fingerprint)
    assert list(outline.images(0)) == []
    with pytest.raises(UserError, match="has its own prompt") as caught:
        load_task(TaskSpec(name="sums", prompt="cqm_a", parser="llava", data="x.parquet"))
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match=r"task.answers: .* is of the kind generate_until"):
        load_task(TaskSpec(name="sums", answers="letter"))
    with pytest.raises(UserError, match="unknown task 'summs'; did you mean 'sums'"):
        load_task(TaskSpec(name="summs"))
    with pytest.raises(UserError, match=r"task.name: 'arithmetic' is a group of tasks; name one of them"):
        load_task(TaskSpec(name="arithmetic"))


def test_a_path_in_the_data_reads_nothing_outside_of_their_folder(write: Any, tmp_path: Path) -> None:
    data = Path(write([{**ROWS[0], "image": picture(None, "inside.png")}]))
    outside = tmp_path.parent / f"{tmp_path.name}-secret.png"
    outside.write_bytes(png("red"))
    (data.parent / "link.png").symlink_to(outside)
    (data.parent / "inside.png").write_bytes(png("blue"))
    absolute = str(data.parent / "inside.png")
    for path in ("inside.png", "./x/../inside.png", absolute):
        (doc,) = load(write([{**ROWS[0], "image": picture(None, path)}])).docs
        assert doc["image"].encoded() == png("blue")
    for path in (str(outside), f"../{outside.name}", "link.png", "/etc/passwd", "a/../../../etc/passwd"):
        (doc,) = load(write([{**ROWS[0], "image": picture(None, path)}])).docs
        with pytest.raises(UserError, match="leads out of the data's folder"):
            doc["image"].encoded()
    for path in ("a\0b", "none.png", "x" * 5000):
        (doc,) = load(write([{**ROWS[0], "image": picture(None, path)}])).docs
        with pytest.raises(UserError, match="cannot read"):
            doc["image"].encoded()
