"""What explain shows is what a run does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cli_process import qapbench
from PIL import Image
from run_questions import row

import qapbench as package
from qapbench import DecoderPruner, RunSpec, UserError, pruners, ptqs
from qapbench.analysis.drawing import HEAT, draw, heat_colours
from qapbench.analysis.explain import Explanation, choose_run, explain
from qapbench.records.store import answers_of
from qapbench.running.session import Session
from qapbench.running.settings import Settings

Spec = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
FUSED = {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}
CPU = torch.device("cpu")


SYMMETRIC = {"bits": 8, "symmetric": True}
OWN_FORMATS: dict[str, dict[str, Any]] = {  # what only these methods make
    "qvlm": {},
    "mquant": {"weights": SYMMETRIC, "activations": {**SYMMETRIC, "granularity": "tensor"}},
}
QUICK: dict[str, dict[str, Any]] = {
    "omniquant": {"epochs": 1},
    "autoround": {"iters": 3},
    "flatquant": {"epochs": 1},
    "spinquant": {"steps": 2},
}
"""Less of what only takes longer."""
CALIBRATED = [name for name in ptqs.names() if ptqs.create(name).calibrates]


def calibrated(method: str, train: Path, **more: Any) -> dict[str, Any]:
    """The `quantize` section of a method that calibrates on four questions of a file."""
    formats = OWN_FORMATS.get(method, {"weights": SYMMETRIC, "activations": SYMMETRIC})
    calibration = {"samples": 4, "data": str(train), **more}
    return {"method": {method: QUICK.get(method, {})}, **formats, "calibration": calibration}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions that the task does not ask."""
    path = tmp_path_factory.mktemp("train") / "train.parquet"
    pd.DataFrame([row(index) for index in range(20, 28)]).to_parquet(path)
    return path


def both(fused: RunSpec) -> list[RunSpec]:
    """The run without its sensitivity, and the run."""
    assert fused.prune is not None
    prune = fused.prune.model_copy(update={"sensitivity": None, "fusion": None})
    return [fused.model_copy(update={"prune": prune}), fused]


def assert_as_run(fused: RunSpec, folder: Path, runs: Path | None = None, sample: str = "q4") -> Explanation:
    """Explain one question, and compare both sides with what two runs store of it, which may be in `runs` already."""
    runs = runs or folder / "runs"
    explanation = explain(fused, sample, Session(Settings(folder / "explained", CPU)))
    records = package.run(both(fused), runs, device="cpu")
    for side, record in zip(explanation.sides, records, strict=True):
        stored = next(answer for answer in answers_of(runs / record.run_id).read() if answer.id == sample)
        assert stored.images is not None
        assert (side.kept, side.merged) == (stored.images[0].kept, stored.images[0].merged)
        assert side.answer == stored.answer
        assert side.probabilities == explanation.question.shares(stored.outputs)
    return explanation


@pytest.fixture(scope="module")
def every_pruner(
    tiny_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, RunSpec], Path]:
    """A spec of every pruner with a sensitivity, and the folder of their runs and of those without: one sweep."""
    base = {"name": "t", "model": str(tiny_model), "task": {"name": "scienceqa", "data": str(questions)}}
    specs = {
        method: RunSpec.parse({**base, "quantize": W4A4, "prune": {**FUSED, "method": method}})
        for method in pruners.names()
    }
    runs = tmp_path_factory.mktemp("pruners")
    package.run([spec for fused in specs.values() for spec in both(fused)], runs, device="cpu")
    return specs, runs


@pytest.mark.parametrize("method", pruners.names())
def test_selections_and_answers_are_those_of_the_runs(method: str, every_pruner: Any, tmp_path: Path) -> None:
    """Of every pruner, those inside the decoder too."""
    specs, runs = every_pruner
    explanation = assert_as_run(specs[method], tmp_path, runs)
    semantic, fused = explanation.sides
    assert semantic.sensitivity is None
    assert fused.sensitivity is not None
    for scores in (fused.relevance, fused.sensitivity):
        if scores is not None:
            assert scores.shape == (16,)
            assert 0 <= float(scores.min()) <= float(scores.max()) <= 1
    inside = isinstance(pruners.create(method), DecoderPruner)
    for side in explanation.sides:
        assert side.grid == (4, 4)
        left = 0 if inside and pruners.create(method).counts == "mean" else FUSED["keep"]  # type: ignore[attr-defined]
        assert len(side.kept) + side.merged == left
        assert side.kept == sorted(set(side.kept))
        assert bool(side.stages) == inside
    first_of = f"first of {fused.stages} stages"
    assert any(first_of in note for note in explanation.notes) == (fused.stages > 1)
    sheet = draw(explanation)
    assert sheet.width > 1000
    assert len(sheet.getcolors(1 << 20) or []) > 100


@pytest.mark.parametrize("method", CALIBRATED)
def test_calibrated_methods_are_explained_as_they_run(method: str, spec_of: Spec, train: Path, tmp_path: Path) -> None:
    fused = RunSpec.parse(spec_of(quantize=calibrated(method, train), prune=FUSED))
    explanation = assert_as_run(fused, tmp_path)
    assert len(list((tmp_path / "explained" / "calibrations").glob("*.safetensors"))) == 1
    assert all(len(side.kept) == 5 for side in explanation.sides)


def test_a_pruned_calibration_is_explained_as_it_runs(spec_of: Spec, train: Path, tmp_path: Path) -> None:
    """There both sides are models of their own: each calibrates on what its own choice leaves."""
    quantize = calibrated("smoothquant", train, pruned=True)
    assert_as_run(RunSpec.parse(spec_of(quantize=quantize, prune=FUSED)), tmp_path)
    assert len(list((tmp_path / "explained" / "calibrations").glob("*.safetensors"))) == 2


def test_a_calibrated_method_with_a_pruner_inside_the_decoder(spec_of: Spec, train: Path, tmp_path: Path) -> None:
    prune = {**FUSED, "method": "fastv"}
    assert_as_run(RunSpec.parse(spec_of(quantize=calibrated("gptq", train), prune=prune)), tmp_path)


def test_what_keeps_everything_cannot_be_explained(spec_of: Spec, tmp_path: Path) -> None:
    for method in ("fastv", "cdpruner"):
        spec = RunSpec.parse(spec_of(prune={**FUSED, "method": method, "keep": 16}))
        session = Session(Settings(tmp_path, CPU))
        if method == "fastv":
            with pytest.raises(UserError, match=r"prune\.keep: nothing is dropped"):
                explain(spec, "q4", session)
        else:
            assert [side.kept for side in explain(spec, "q4", session).sides] == [list(range(16))] * 2


def test_heat_colours_get_lighter() -> None:
    scale = heat_colours(torch.linspace(0, 1, 50).numpy())
    assert (scale[0] == HEAT[0]).all()
    assert (scale[-1] == HEAT[-1]).all()
    lightness = scale @ [0.299, 0.587, 0.114]
    assert (lightness[1:] > lightness[:-1]).all()


def test_the_run_that_is_explained(spec_of: Spec) -> None:
    plain = RunSpec.parse({**spec_of(), "name": "dense"})
    fused = RunSpec.parse({**spec_of(prune=FUSED), "name": "fused"})
    assert choose_run([plain, fused], None) is fused
    assert choose_run([plain, fused], "fused") is fused
    with pytest.raises(UserError, match="did you mean 'fused'"):
        choose_run([plain, fused], "fusd")
    with pytest.raises(UserError, match="and 'dense' does not"):
        choose_run([plain, fused], "dense")
    with pytest.raises(UserError, match=r"prune\.sensitivity=combined"):
        choose_run([plain], None)


def test_the_command(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    spec = write_spec(spec_of(quantize=W4A4, prune=FUSED))
    picture = tmp_path / "new" / "q0.png"
    done = qapbench("explain", spec, "--sample", "q0", "--out", picture, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [len(side["kept"]) for side in found["sides"]] == [5, 5]
    assert len(found["relevance"]) == len(found["sensitivity"]) == 16
    assert sum(found["sides"][0]["probabilities"].values()) == pytest.approx(1)
    with Image.open(picture) as image:
        assert image.format == "PNG"
    for arguments, message in (
        (("--sample", "q1", "--out", picture), "'q1' has no image"),
        (("--sample", "qq0", "--out", picture), "no question 'qq0' in scienceqa; did you mean"),
        (("--sample", "q0", "--out", tmp_path / "q0.jpg"), "the picture is a .png file"),
    ):
        done = qapbench("explain", spec, *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_record_is_verified_and_a_changed_one_refused(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    spec = RunSpec.parse(spec_of(quantize=W4A4, prune=FUSED))
    (record,) = package.run(spec, tmp_path)
    file = tmp_path / record.run_id / "record.json"
    done = qapbench("leaderboard", "--check", file)
    assert done.returncode == 0, done.stderr
    assert "counts of every column are those of the stored answers" in done.stdout
    data = record.to_json()
    data["scores"]["columns"][-1]["k"] += 1
    file.write_text(json.dumps(data))
    done = qapbench("leaderboard", "--check", file, "--json")
    assert done.returncode == 2
    assert "Avg says" in done.stderr
