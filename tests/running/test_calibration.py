"""Where calibration samples come from, what a run's id makes of them, and that a sweep calibrates once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from run_questions import row

from qapbench import RunSpec, UserError
from qapbench.running import run
from qapbench.running.planner import Planner
from qapbench.running.session import Session
from qapbench.running.settings import Settings
from qapbench.tasking.calibration_samples import samples

SpecOf = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "train.parquet"
    pd.DataFrame([row(index) for index in range(20, 32)]).to_parquet(path)
    return path


def quantized(train: Path | None, method: str = "smoothquant", **calibration: Any) -> dict[str, Any]:
    asked = {"samples": 6, "data": str(train) if train else None, **calibration}
    format = {"bits": 8, "symmetric": True}
    return {"method": method, "weights": format, "activations": format, "calibration": asked}


PRUNE = {"method": "random", "keep": 4}


def test_samples_are_what_the_run_asks_with_the_answer_labelled(spec_of: SpecOf, train: Path, tmp_path: Path) -> None:
    spec = RunSpec.parse(spec_of(quantize=quantized(train)))
    session = Session(Settings(tmp_path, CPU))
    _, processor = session.model(spec)
    assert spec.quantize is not None
    assert spec.quantize.calibration is not None
    made = samples(session.task(spec), spec.quantize.calibration, processor).samples
    assert len(made) == 6
    assert {"pixel_values" in sample for sample in made} == {True, False}
    for sample in made:
        (answer,) = sample["labels"][sample["labels"] != -100].tolist()
        assert sample["input_ids"][0, -1] == answer
        assert processor.tokenizer.decode([answer]).strip() in ("A", "B", "C", "D")
        assert "ASSISTANT:" in processor.tokenizer.decode(sample["input_ids"][0, :-1])
        assert ("relevance_text" in sample) == ("pixel_values" in sample)
    again = samples(session.task(spec), spec.quantize.calibration, processor).samples
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, again, strict=True))
    other = spec.quantize.calibration.model_copy(update={"seed": 1})
    assert [s["input_ids"].tolist() for s in samples(session.task(spec), other, processor).samples] != [
        s["input_ids"].tolist() for s in made
    ]


def test_several_tasks_are_calibrated_alike_on_one_that_is_named(
    spec_of: SpecOf, questions: Path, train: Path, tmp_path: Path
) -> None:
    tasks = [{"name": "scienceqa", "data": str(questions), "limit": 2}, {"name": "diagramqa", "limit": 2}]
    data = {**spec_of(), "task": tasks}
    named = RunSpec.parse({**data, "quantize": quantized(None, task="diagramqa")})
    (record,) = run(named, tmp_path, device="cpu")
    assert record.receipt.calibration is not None
    assert "diagramqa" in record.receipt.calibration.origin
    assert not any("Calibrated for each task" in note for note in record.notes)
    assert "calibration" in record.fingerprints, "one source for all"
    assert len(list((tmp_path / "calibrations").iterdir())) == 1, "computed once"
    with pytest.raises(UserError, match=r"quantize.calibration.task: unknown task 'diagramsqa'; did you mean"):
        Planner(tmp_path, CPU).check(RunSpec.parse({**data, "quantize": quantized(None, task="diagramsqa")}))
    plain = RunSpec.parse({**data, "quantize": quantized(train)}).quantize
    assert plain is not None
    assert "task" not in plain.model_dump(mode="json")["calibration"], "ids of earlier versions stay"


def test_a_sweep_calibrates_once_and_each_run_says_what_it_saw(spec_of: SpecOf, train: Path, tmp_path: Path) -> None:
    told: list[str] = []
    cells = [
        RunSpec.parse(spec_of(quantize=quantized(train), prune=prune, task={"limit": 4}))
        for prune in (None, PRUNE, {**PRUNE, "keep": 8})
    ]
    cells.append(RunSpec.parse(spec_of(quantize=quantized(train, pruned=True), prune=PRUNE, task={"limit": 4})))
    records = run(cells, tmp_path, device="cpu", progress=lambda name, done, total: told.append(name))
    seen = [record.receipt.calibration for record in records if record.receipt.calibration]
    assert len(seen) == len(records)
    assert [one.reused for one in seen] == [False, False, False, False], "one group is calibrated once for all"
    more = RunSpec.parse(spec_of(quantize=quantized(train), prune={**PRUNE, "keep": 6}, task={"limit": 4}))
    (later,) = run(more, tmp_path, device="cpu")
    assert later.receipt.calibration is not None
    assert later.receipt.calibration.reused, "a later session takes it up"
    assert len({one.key for one in seen}) == 2
    assert len(list((tmp_path / "calibrations").glob("*.safetensors"))) == 2
    assert all(one.samples == 6 and one.seconds >= 0 and (one.peak_memory_mb or 0) > 0 for one in seen)
    assert all((record.receipt.backend or "").startswith("simulation") for record in records)
    assert any("calibrating" in name for name in told)
    assert len({record.run_id for record in records}) == 4
    assert [record.spec["quantize"]["calibration"]["pruned"] for record in records] == [False, False, False, True]
    # Text-only answers are common to runs that differ in the pruner alone, unless calibration was pruned.
    keys = [record.text_key for record in records]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_the_id_follows_the_content_of_the_samples(spec_of: SpecOf, train: Path, tmp_path: Path) -> None:
    def run_id(file: Path, **calibration: Any) -> str:
        return Planner(tmp_path, CPU).plan(RunSpec.parse(spec_of(quantize=quantized(file, **calibration)))).id

    moved, other = tmp_path / "moved.parquet", tmp_path / "other.parquet"
    moved.write_bytes(train.read_bytes())
    pd.DataFrame([row(index) for index in range(40, 52)]).to_parquet(other)
    assert run_id(train) == run_id(moved)
    assert len({run_id(train), run_id(other), run_id(train, samples=5), run_id(train, seed=1)}) == 4


def test_methods_that_do_not_calibrate_have_no_calibration(spec_of: SpecOf, train: Path) -> None:
    spec = RunSpec.parse(spec_of(quantize=quantized(train, method="rtn")))
    plain = {key: value for key, value in quantized(train, method="rtn").items() if key != "calibration"}
    assert spec == RunSpec.parse(spec_of(quantize=plain))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"data": None}, r"quantize.calibration.data: this task has no calibration questions of its own"),
        ({"data": "nowhere.parquet"}, r"quantize.calibration.data: nowhere.parquet: no such file"),
        ({"samples": 13}, r"quantize.calibration.samples: 13 asked for, but .*train.parquet holds 12"),
        ({"samples": 0}, r"quantize.calibration.samples: .*greater than or equal to 1"),
        ({"pruned": True}, r"quantize.calibration.pruned: `pruned: true` needs a `prune` section"),
        ({"sample": 3}, r"quantize.calibration.sample: unknown field; did you mean 'samples'"),
    ],
)
def test_mistakes_are_told(
    calibration: dict[str, Any], message: str, spec_of: SpecOf, train: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(RunSpec.parse(spec_of(quantize=quantized(train, **calibration))), tmp_path, device="cpu")


def test_a_task_may_offer_its_own_questions(tmp_path: Path) -> None:
    spec = RunSpec.parse(
        {"model": "diagram-llava", "task": {"name": "diagramqa", "limit": 2}, "quantize": quantized(None)}
    )
    session = Session(Settings(tmp_path, CPU))
    task = session.task(spec)
    docs = task.docs.calibration(6, 0, None)
    assert sum(doc["image"] is not None for doc in docs) == 3
    assert [doc["text"] for doc in docs] == [doc["text"] for doc in task.docs.calibration(6, 0, None)]
    assert not {doc["pid"] for doc in docs} & set(task.ids)
    assert len(task.docs.calibration_version) == 64


def test_torchao_for_what_it_has_no_kernel_for_is_refused(spec_of: SpecOf, train: Path) -> None:
    four = {"method": "rtn", "weights": {"bits": 4}, "activations": {"bits": 4}, "backend": "torchao"}
    with pytest.raises(UserError, match=r"quantize.backend: .*W4A4 as written only simulation exists"):
        RunSpec.parse(spec_of(quantize=four))
