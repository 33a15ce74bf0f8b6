"""What explain shows is what a run does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_cli import qapbench

import qapbench as package
from qapbench import RunSpec, UserError
from qapbench.analysis.drawing import HEAT, draw, heat_colours
from qapbench.analysis.explain import choose_run, explain
from qapbench.records.store import Store

Spec = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
FUSED = {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["cdpruner", "random", "visionzip", "divprune"])
def test_selections_and_answers_are_those_of_the_runs(method: str, spec_of: Spec, tmp_path: Path) -> None:
    fused = RunSpec.parse(spec_of(quantize=W4A4, prune={**FUSED, "method": method}))
    semantic = RunSpec.parse(spec_of(quantize=W4A4, prune={"method": method, "keep": 5}))
    explanation = explain(fused, "q4", CPU)
    records = package.run([semantic, fused], tmp_path)
    for side, record in zip(explanation.sides, records, strict=True):
        stored = next(a for a in Store(tmp_path / record["run_id"]).read() if a["id"] == "q4")
        assert side.look.selection.indices[0].tolist() == stored["images"][0]["kept"]
        assert side.answer == stored["answer"]
    look = explanation.sides[1].look
    for scores in (look.relevance, look.sensitivity):
        assert scores is not None
        assert scores.shape == (16,)
        assert 0 <= float(scores.min()) <= float(scores.max()) <= 1
    sheet = draw(explanation)
    assert sheet.width > 1000
    assert len(sheet.getcolors(1 << 20) or []) > 100


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
    file = tmp_path / record["run_id"] / "record.json"
    done = qapbench("leaderboard", "--check", file)
    assert done.returncode == 0, done.stderr
    assert "counts of every column are those of the stored answers" in done.stdout
    record["scores"]["columns"][-1]["k"] += 1
    file.write_text(json.dumps(record))
    done = qapbench("leaderboard", "--check", file, "--json")
    assert done.returncode == 2
    assert "Avg says" in done.stderr
