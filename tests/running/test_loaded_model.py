"""`qapbench.run` in a notebook: a model that is loaded already, a spec as a dictionary, tasks beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qapbench
from qapbench import RunSpec, UserError
from qapbench.models.loading import load_model
from qapbench.records.store import answers_of

SPEC = {"prune": {"method": "cdpruner", "keep": 5}}


@pytest.fixture
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    spec = RunSpec.parse({"model": str(tiny_model), "task": "diagramqa"})
    return load_model(spec, torch.device("cpu"))


def test_a_loaded_model_answers_as_its_folder(
    loaded: tuple[Any, Any], tiny_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    tasks = [{"name": "scienceqa", "data": str(questions), "limit": 6}, {"name": "diagramqa", "limit": 3}]
    told: list[str] = []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def run() -> qapbench.Record:
        progress = lambda name, done, total: told.append(name)  # noqa: E731
        (record,) = qapbench.run(
            SPEC, tmp_path / "runs", tasks=tasks, model=model, processor=processor, progress=progress
        )
        return record

    record = run()
    assert [part.task.name for part in record.parts or ()] == ["scienceqa", "diagramqa"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(name.endswith("scienceqa") for name in told)
    (by_folder,) = qapbench.run({"model": str(tiny_model), **SPEC}, tmp_path / "by folder", tasks=tasks, device="cpu")
    for one, other in zip(record.parts or (), by_folder.parts or (), strict=True):
        pair = (answers_of(tmp_path / "runs" / one.run_id), answers_of(tmp_path / "by folder" / other.run_id))
        outputs = [[(answer.id, answer.outputs, answer.images) for answer in store.read()] for store in pair]
        assert outputs[0] == outputs[1]
        assert one.run_id != other.run_id
    with monkeypatch.context() as patch:
        patch.setattr("qapbench.running.execution.Execution.make", None)
        assert run() == record, "the same weights are the same run"
    again = RunSpec.parse({**record.spec, "task": record.spec["task"][0], "seed": 1})
    with pytest.raises(UserError, match="stands for a model that was loaded in Python, and holds no weights"):
        qapbench.run(again, tmp_path / "runs", device="cpu")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    tasks[0]["limit"] = 2
    assert run().fingerprints["model"] != record.fingerprints["model"]


def test_what_a_loaded_model_cannot_do_is_said(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    with pytest.raises(UserError, match="needs the model's processor too"):
        qapbench.run(SPEC, tmp_path, tasks="diagramqa", model=model)
    with pytest.raises(
        UserError, match="uses the model where it is: leave `workers`, `device`, `device_map` and `offload` out"
    ):
        qapbench.run(SPEC, tmp_path, tasks="diagramqa", model=model, processor=processor, workers=2)
    with pytest.raises(UserError, match="dtype: the model is loaded in float32, the spec asks for bfloat16"):
        qapbench.run({**SPEC, "dtype": "bfloat16"}, tmp_path, tasks="diagramqa", model=model, processor=processor)


def test_tasks_replace_those_of_the_spec() -> None:
    from qapbench.running.execute import as_specs

    spec = RunSpec.parse({"model": "m", "task": "scienceqa"})
    (one,) = as_specs(spec, tasks=["diagramqa", {"name": "scienceqa", "limit": 3}])
    assert [(task.name, task.limit) for task in one.tasks] == [("diagramqa", None), ("scienceqa", 3)]
    cases = {"model": "m", "cases": {"a": {}, "b": {"seed": 1}}}
    assert [(one.name, one.task.name, one.seed) for one in as_specs(cases, tasks="diagramqa")] == [
        ("a", "diagramqa", 0),
        ("b", "diagramqa", 1),
    ]
