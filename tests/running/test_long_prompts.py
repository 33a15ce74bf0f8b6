"""Prompts that need more positions than the model was made for: counted as the model uses them, and said."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_checkpoints import save_family

import qapbench
from qapbench import RunSpec
from qapbench.analysis.check import check_record
from qapbench.leaderboard.rows import from_record
from qapbench.models.positions import positions_needed, positions_of
from qapbench.records.record import Record
from qapbench.records.store import answers_of
from qapbench.running.prompt_encoder import PromptEncoder
from qapbench.running.session import Session
from qapbench.running.settings import Settings, find_device

pytestmark = pytest.mark.usefixtures("one_thread")
KEEP = 4
VISIONZIP = {"method": "visionzip", "keep": KEEP}


def with_positions(folder: Path, target: Path, number: int) -> Path:
    """A copy of a checkpoint whose decoder was made for that many positions."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = number
    (target / "config.json").write_text(json.dumps(config))
    return target


def spec_of(model: Path, data: Path, prune: dict[str, Any] | None = None) -> RunSpec:
    return RunSpec.parse({"model": str(model), "task": {"name": "scienceqa", "data": str(data)}, "prune": prune})


def lengths(model: Path, data: Path, runs: Path) -> dict[str, tuple[int, int]]:
    """Tokens of each question's whole prompt, and of its images, from the processor alone."""
    session, spec = Session(Settings(runs, find_device("cpu"))), spec_of(model, data)
    family = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")))
    encoder = PromptEncoder(family, session.processor(spec), {})  # type: ignore[arg-type]
    image = session.model(spec)[0].config.image_token_id
    found = {}
    for question in session.questions(spec):
        ids = encoder.inputs(question, question.prompt)["input_ids"]
        found[question.id] = ids.shape[1], int((ids == image).sum())
    return found


def beyond(runs: Path, record: Record) -> dict[str, int]:
    stored = answers_of(runs / record.run_id).read()
    return {answer.id: answer.positions for answer in stored if answer.positions is not None}


def test_they_are_counted_as_the_decoder_gets_them(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    counted = lengths(tiny_model, questions, tmp_path)
    limit = sorted(length for length, _ in counted.values())[len(counted) // 2]
    model = with_positions(tiny_model, tmp_path / "short", limit)
    whole = {name: length for name, (length, _) in counted.items() if length > limit}
    cut = {name: length - image + min(image, KEEP) for name, (length, image) in counted.items()}
    shorter = {name: length for name, length in cut.items() if length > limit}
    assert 0 < len(shorter) < len(whole) < len(counted)
    cases: list[tuple[dict[str, Any] | None, dict[str, int]]] = [
        (None, whole),
        (VISIONZIP, shorter),
        ({"method": "fastv", "keep": KEEP}, whole),  # its first layers get the whole prompt
    ]
    for prune, expected in cases:
        (record,) = qapbench.run(spec_of(model, questions, prune), tmp_path / "runs", device="cpu")
        assert beyond(tmp_path / "runs", record) == expected
        receipt = record.receipt
        assert (receipt.positions, receipt.too_long) == (limit, len(expected))
        assert receipt.longest == max(expected.values())
        assert f"{len(expected)} prompt(s) beyond {limit} positions" in receipt.summary
        notes = [note for note in record.notes if note.startswith("Long prompts: ")]
        assert len(notes) == 1
        assert f"{len(expected)} questions beyond the {limit} positions" in notes[0]
        assert from_record(record).too_long == len(expected)
        check_record(tmp_path / "runs" / record.run_id)


def test_kept_positions_are_those_of_the_whole_prompt(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    counted = lengths(tiny_model, questions, tmp_path)
    limit = max(length for length, _ in counted.values()) - 1
    model = with_positions(tiny_model, tmp_path / "short", limit)
    prune = {"method": "random", "keep": KEEP, "positions": "keep"}
    (record,) = qapbench.run(spec_of(model, questions, prune), tmp_path / "runs", device="cpu")
    assert beyond(tmp_path / "runs", record) == {
        name: length for name, (length, _) in counted.items() if length > limit
    }


def test_an_image_of_mrope_needs_fewer_positions_than_tokens(questions: Path, tmp_path: Path) -> None:
    model = save_family("qwen2_5_vl", tmp_path / "model")
    counted = lengths(model, questions, tmp_path)
    # 32 x 32 pixels are 4 x 4 tokens: positions go on 4 behind where the image starts, not 16.
    needed = {name: length - image + (4 if image else 0) for name, (length, image) in counted.items()}
    assert {image for _, image in counted.values()} == {0, 16}
    limit = sorted(needed.values())[len(needed) // 2]
    short = with_positions(model, tmp_path / "short", limit)
    for prune in (None, VISIONZIP):
        (record,) = qapbench.run(spec_of(short, questions, prune), tmp_path / "runs", device="cpu")
        assert beyond(tmp_path / "runs", record) == {name: n for name, n in needed.items() if n > limit}


@pytest.mark.parametrize(
    "rope, most",
    [
        ({}, 100),
        ({"rope_type": "default", "factor": 4.0}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 25}, 100),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50}, 100),
        ({"rope_type": "longrope", "factor": 8.0}, 100),
    ],
)
def test_stretched_positions_count(rope: dict[str, Any], most: int) -> None:
    text = SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)
    assert positions_of(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))) == most


def test_a_config_may_not_say() -> None:
    assert positions_of(SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))) is None


def test_the_largest_of_any_axis_counts() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert positions_needed({"input_ids": ids}) == 3
    axes = torch.tensor([[[0, 1, 2]], [[0, 7, 2]], [[0, 1, 3]]])
    assert positions_needed({"input_ids": ids, "position_ids": axes}) == 8
