"""Runs on transparent pictures: counted and said, and put on a colour where the spec names one."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from run_questions import encoded, row

import qapbench
from qapbench import RunSpec
from qapbench.analysis.check import check_record
from qapbench.leaderboard.rows import from_record
from qapbench.records.record import Record
from qapbench.records.store import answers_of
from qapbench.running.session import Session
from qapbench.running.settings import Settings, find_device
from qapbench.spec.run_spec import CalibrationSpec
from qapbench.tasking.calibration_samples import samples

TRANSPARENT = ["q0", "q4"]


def ink(index: int) -> Image.Image:
    """Black ink that covers some pixels of a transparent black ground."""
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = np.random.default_rng(index).integers(0, 2, (32, 32)) * 255
    return Image.fromarray(pixels)


def seen(index: int, colour: tuple[int, int, int]) -> Image.Image:
    """The same picture without transparency, on a colour."""
    image = Image.new("RGB", (32, 32), colour)
    image.paste(ink(index), mask=ink(index).getchannel("A"))
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pictures with transparency, on black and on white."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    makers = {"clear": ink, "black": lambda i: seen(i, (0, 0, 0)), "white": lambda i: seen(i, (255, 255, 255))}
    for name, make in makers.items():
        rows = [row(index) for index in range(8)]
        for index in map(int, (pid[1:] for pid in TRANSPARENT)):
            rows[index]["image"] = {"bytes": encoded(make(index)), "path": None}
        rows[2]["image"] = {"bytes": encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 255))), "path": None}  # opaque
        found[name] = folder / f"{name}.parquet"
        pd.DataFrame(rows).to_parquet(found[name])
    return found


def spec_of(model: Path, file: Path, **task: Any) -> RunSpec:
    prune = {"method": "visionzip", "keep": 6}
    return RunSpec.parse(
        {"model": str(model), "task": {"name": "scienceqa", "data": str(file), **task}, "prune": prune}
    )


def outputs(runs: Path, record: Record) -> dict[str, Any]:
    return {answer.id: answer.outputs for answer in answers_of(runs / record.run_id).read()}


def test_they_are_counted_and_answered_on_the_colour(tiny_model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    specs = {
        "clear": spec_of(tiny_model, data["clear"]),
        "placed": spec_of(tiny_model, data["clear"], background="white"),
        "black": spec_of(tiny_model, data["black"]),
        "white": spec_of(tiny_model, data["white"]),
    }
    records = {name: qapbench.run(spec, tmp_path, device="cpu")[0] for name, spec in specs.items()}
    found = {name: outputs(tmp_path, record) for name, record in records.items()}
    assert found["clear"] == found["black"], "as LLaVA's code sees them"
    assert found["placed"] == found["white"]
    differ = {name for name in found["clear"] if found["clear"][name] != found["placed"][name]}
    assert differ == set(TRANSPARENT)
    assert [record.receipt.transparent for record in records.values()] == [2, 2, 0, 0]
    assert [from_record(record).transparent for record in records.values()] == [2, 2, 0, 0]
    assert "2 transparent picture(s)" in records["clear"].receipt.summary
    said = {name: [note for note in record.notes if "Transparent" in note] for name, record in records.items()}
    assert said["black"] == said["white"] == []
    assert "2 of 4 images; their pixels have the colour that is stored below them" in said["clear"][0]
    assert "2 of 4 images; their pixels are put on #ffffff" in said["placed"][0]
    check_record(tmp_path / records["placed"].run_id)


def test_a_resumed_run_counts_those_of_before(tiny_model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_of(tiny_model, data["clear"])
    (record,) = qapbench.run(spec, tmp_path / "a", device="cpu")
    names = ("answers.jsonl", "receipt.json")
    whole = [(tmp_path / "a" / record.run_id / name).read_bytes() for name in names]
    folder = tmp_path / "b" / record.run_id
    folder.mkdir(parents=True)
    (folder / names[0]).write_bytes(b"".join(whole[0].splitlines(keepends=True)[:5]))
    (folder / names[1]).write_bytes(whole[1])
    (again,) = qapbench.run(spec, tmp_path / "b", device="cpu")
    assert [(folder / name).read_bytes() for name in names] == whole
    assert again.receipt.transparent == 2


def test_calibration_is_shown_them_the_same_way(tiny_model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    session = Session(Settings(tmp_path, find_device("cpu")))

    def pixels(name: str, **task: Any) -> torch.Tensor:
        spec = spec_of(tiny_model, data[name], **task)
        wanted = CalibrationSpec(samples=8, data=str(data[name]))
        made = samples(session.task(spec), wanted, session.processor(spec)).samples
        return torch.cat([sample["pixel_values"] for sample in made if "pixel_values" in sample])

    assert torch.equal(pixels("clear", background="white"), pixels("white"))
    assert torch.equal(pixels("clear"), pixels("black"))
