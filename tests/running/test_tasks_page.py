"""The page on tasks: its benchmark of one's own runs as it stands there, on a tiny model in the place of its model."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest

import qapbench
from qapbench.records.load import load_records
from qapbench.spec.spec_file import load_spec
from qapbench.tasking.registry import own_tasks

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_the_benchmark_of_the_page_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = PAGE.read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    python = [code for kind, code in blocks if kind == "python"]
    files = {
        found[1]: code for kind, code in blocks if (found := re.match(r"# (\S+\.yaml)\n", code)) and kind == "yaml"
    }
    assert list(files) == ["my_colors.yaml", "spec.yaml"]
    lines = [line for code in (python[0], *files.values()) for line in code.splitlines() if line.strip()]
    assert len(lines) <= 26, "it is meant to be short"
    exec(compile(python[0], str(PAGE), "exec"), {})
    for name, code in files.items():
        Path(name).write_text(code)
    specs = load_spec("spec.yaml", [f"model={tiny_model}", "cases.cdpruner 32.prune.keep=5"])
    dense, pruned = qapbench.run(specs, device="cpu")
    assert [part.task.name for part in pruned.parts or ()] == ["my_colors", "diagramqa"]
    assert [part.tokens.mean for part in pruned.parts or () if part.tokens] == [5, 5]
    colors = (dense.parts or [])[0]
    assert [(column.name, column.n) for column in colors.scores.columns] == [("acc", 6), ("brier_score", 6)]
    assert colors.task.score == "acc"
    assert colors.scores.confidence is not None
    assert colors.scores.confidence.brier == pytest.approx(colors.scores.columns[1].figure)
    assert sum(record.asked_blank for record in load_records("runs", parts=True)) == 2


def test_the_page_names_every_task_and_field() -> None:
    text = PAGE.read_text()
    fields = re.search(r"\| field \| meaning \|\n(.*?)\n\n", text, re.DOTALL)
    assert fields is not None
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in fields[1].splitlines())))
    fields_of_task = qapbench.RunSpec.model_fields["task"].annotation.model_fields.items()  # type: ignore[union-attr]
    assert named == {about.alias or name for name, about in fields_of_task}
    assert all(f"| `{name}` |" in text for name in own_tasks())
