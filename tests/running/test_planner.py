"""Plans: made without a model and without lm-eval, and what they say of a folder of results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from run_questions import QUESTIONS, row

import qapbench
from qapbench import RunSpec, UserError
from qapbench.records.store import answers_of
from qapbench.running.engines import make_settings
from qapbench.running.planner import Planner
from qapbench.running.settings import find_device
from qapbench.tasking.tasks import LoadedTask

Spec = Callable[..., dict[str, Any]]
CPU = find_device("cpu")
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_mps_is_refused_with_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"^device: mps has no float64, [^.]*; use cpu$"):
        find_device(name)


def test_a_plan_needs_neither_model_nor_lm_eval(spec_of: Spec, tmp_path: Path, tiny_model: Path) -> None:
    """The weights cannot even be loaded; calibration and a text tower are asked for."""
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    pd.DataFrame([row(index) for index in range(20, 28)]).to_parquet(tmp_path / "train.parquet")
    quantize = {**W4A4, "method": "gptq", "calibration": {"samples": 4, "data": str(tmp_path / "train.parquet")}}
    prune = {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}
    spec = {**spec_of(quantize=quantize, prune=prune), "model": str(broken)}
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from qapbench import RunSpec\n"
        "from qapbench.running.planner import Planner\n"
        "from qapbench.running.settings import find_device\n"
        "spec = RunSpec.parse(json.loads(sys.argv[1]))\n"
        "planner = Planner(Path(sys.argv[2]), find_device('cpu'))\n"
        "planner.check(spec)\n"
        "plan = planner.plan(spec)\n"
        "assert planner.shared([plan]).asked == plan.total\n"
        "assert planner.together(spec)\n"
        "assert 'lm_eval' not in sys.modules, 'lm_eval was imported'\n"
        "print(plan.total, plan.answered, plan.state)\n"
    )
    command = [sys.executable, "-c", code, json.dumps(spec), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(QUESTIONS), "0", "new"]
    assert not (tmp_path / "runs").exists()


def test_the_task_of_a_plan_is_an_outline(spec_of: Spec, tmp_path: Path) -> None:
    planner = Planner(tmp_path, CPU)
    plan = planner.plan(RunSpec.parse(spec_of()))
    task = planner.task(plan.spec)
    assert not isinstance(task, LoadedTask)
    assert task is planner.task(RunSpec.parse(spec_of(quantize=W4A4))), "each task is read once"
    assert task.ids == [f"q{index}" for index in range(QUESTIONS)]
    assert [bool(task.images(doc)) for doc in range(4)] == [True, False, True, False]


def test_a_plan_says_how_far_its_run_is(spec_of: Spec, tmp_path: Path) -> None:
    spec = RunSpec.parse(spec_of(quantize=W4A4))
    planner = Planner(tmp_path, CPU)

    def state() -> tuple[str, int, bool]:
        plan = planner.plan(spec)
        return plan.state, plan.answered, plan.done

    assert state() == ("new", 0, False)
    (record,) = qapbench.run(spec, tmp_path, device="cpu")
    assert planner.plan(spec).id == record.run_id
    assert planner.plan(spec).fingerprints == record.fingerprints
    assert state() == ("done", QUESTIONS, True)
    folder = tmp_path / record.run_id
    (folder / "record.json").unlink()
    path = answers_of(folder).path
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    assert state() == ("begun", 5, False)


def test_a_damaged_record_is_told_and_made_anew_and_a_newer_one_refused(
    spec_of: Spec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = RunSpec.parse(spec_of())
    folder = Planner(tmp_path, CPU).plan(spec).folder
    folder.mkdir()
    (folder / "record.json").write_text("{")
    assert not Planner(tmp_path, CPU).plan(spec).done
    assert f"made anew from the stored answers: {folder}/record.json: not a JSON file" in caplog.text
    (folder / "record.json").write_text('{"schema": 4}')
    with pytest.raises(UserError, match="version 4 was written by a newer qapbench"):
        qapbench.run(spec, tmp_path, device="cpu")


def test_check_tells_every_mistake_at_once(tmp_path: Path) -> None:
    spec = RunSpec.parse({"model": "diagram-llaav", "task": {"name": "diagramqa", "data": "none.parquet"}})
    with pytest.raises(UserError) as caught:
        Planner(tmp_path, CPU).check(spec)
    assert [problem.where for problem in caught.value.problems] == [("task", "data"), ("model",)]
    with pytest.raises(UserError, match="no embedded model") as caught:
        Planner(tmp_path, CPU).check(spec, ["model"])
    assert len(caught.value.problems) == 1
    Planner(tmp_path, CPU).check(spec, [])


def test_settings_refuse_what_cannot_be_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--address auto: it is the address of a Ray cluster"):
        make_settings(tmp_path, CPU, address="auto")
    with pytest.raises(UserError, match="--gpus-per-worker 2: a model is loaded on one GPU"):
        make_settings(tmp_path, CPU, engine="ray", gpus_per_worker=2)
    for name in ("cuda:77", "meta", "abacus"):
        with pytest.raises(UserError, match=f"this machine has no '{name}'"):
            find_device(name)
