"""Keep-lists: the table's schema, and that an engine which takes embeddings gives the run's answers with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from family_checkpoints import save_family
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import qapbench as package
from qapbench import UserError
from qapbench.cli import app
from qapbench.records.store import answers_of
from qapbench.running.keep_lists import schema, select
from qapbench.running.planner import Planner
from qapbench.running.session import Session
from qapbench.running.settings import Settings
from qapbench.spec.spec_file import load_spec
from qapbench.tasking.images import decoded
from qapbench.tasking.questions import Question, processor_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
Spec = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]
CPU = torch.device("cpu")
TOKENS = 16  # of an answer, as the task says
CASES: dict[str, Any] = {
    "dense": {},
    "cdpruner": {"prune": {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}},
    "attention": {"prune": {"method": "attention", "keep": 3}},
    "whole": {"prune": {"method": "random", "keep": 16}},
    "visionzip": {"prune": {"method": "visionzip", "keep": 6}},
}


@torch.no_grad()
def fed(model: Any, processor: Any, question: Question, kept: list[int]) -> tuple[torch.Tensor, str]:
    """(the prompt's embeddings with the kept tokens, the answer): transformers alone, and the table's indices."""
    inputs = processor_inputs(processor, question.prompt, [decoded(image) for image in question.images])
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0][kept]
    ids = inputs["input_ids"][0]
    images = (ids == model.config.image_token_id).nonzero()[:, 0]
    stays = torch.ones(len(ids), dtype=torch.bool)
    stays[images] = False
    stays[images[kept]] = True
    embeds = model.get_input_embeddings()(ids.clamp(max=model.config.text_config.vocab_size - 1)).clone()
    embeds[images[kept]] = features
    embeds = embeds[stays][None]
    words = model.generate(inputs_embeds=embeds, max_new_tokens=TOKENS, do_sample=False)[0]
    return embeds[0], processor.decode(words, skip_special_tokens=True)


def test_an_engine_answers_as_the_run_does(spec_of: Spec, write_spec: Write, tiny_model: Path, tmp_path: Path) -> None:
    """Also of a quantized vision tower the features are those of the run: their own selection is written."""
    generate = {"answers": "generate"}
    spec = write_spec({**spec_of(task=generate), "cases": CASES})
    out, embeds, runs = tmp_path / "some" / "keep.parquet", tmp_path / "embeds", tmp_path / "runs"
    done = CliRunner().invoke(app, ["select", str(spec), "--out", str(out), "--embeds", str(embeds)])
    assert done.exit_code == 0, done.output
    table = parquet.read_table(out)
    assert table.schema.equals(schema(), check_metadata=True)
    rows = table.to_pylist()
    assert [row["run"] for row in rows] == [name for name in list(CASES)[1:] for _ in range(7)]
    assert [row["id"] for row in rows] == [f"q{at}" for at in range(0, 14, 2)] * 4
    records = {record.name: record for record in package.run(load_spec(spec), runs, device="cpu")}
    session = Session(Settings(tmp_path, CPU))
    one = load_spec(spec)[0]
    model, processor = AutoModelForImageTextToText.from_pretrained(tiny_model).eval(), session.model(one)[1]
    questions = {question.id: question for question in session.questions(one)}
    for row in rows:
        assert (row["available"], row["heights"], row["widths"], row["image"]) == (16, [4], [4], 0)
        assert row["separators"] == []
        stored = {answer.id: answer for answer in answers_of(runs / records[row["run"]].run_id).read()}[row["id"]]
        (image,) = stored.images or []
        assert row["kept"] == (list(range(16)) if image.kept is None else image.kept)
        assert row["merged"] == image.merged == (2 if row["run"] == "visionzip" else 0)
        held = load_file(embeds / row["embeds"])
        assert held["position_ids"].tolist() == list(range(len(held["prompt_embeds"])))
        if row["merged"]:
            with torch.no_grad():
                words = model.generate(
                    inputs_embeds=held["prompt_embeds"][None], max_new_tokens=TOKENS, do_sample=False
                )[0]
            answer = processor.decode(words, skip_special_tokens=True)
        else:
            made, answer = fed(model, processor, questions[row["id"]], row["kept"])
            torch.testing.assert_close(held["prompt_embeds"], made, rtol=0, atol=0)
        assert ascii(answer.strip()) == ascii(stored.outputs[0].strip()), row


def test_rows_of_tiles_and_new_lines(tmp_path: Path) -> None:
    """Every view's grid, and the places of new lines that stay, beside the kept ones."""
    folder = save_family("llava_next", tmp_path / "model")
    spec = {
        "model": str(folder),
        "task": {"name": "diagramqa", "limit": 3},
        "prune": {"method": "attention", "keep": 2},
    }
    session, planner = Session(Settings(tmp_path, CPU)), Planner(tmp_path, CPU)
    rows = select([package.RunSpec.parse(spec)], session, planner).to_pylist()
    assert rows
    for row in rows:
        assert len(row["heights"]) == len(row["widths"]) == len(row["kept"]) / 2 > 1
        sizes = [height * width for height, width in zip(row["heights"], row["widths"], strict=True)]
        assert sum(sizes) == row["available"]
        assert row["separators"]
        assert not set(row["separators"]) & set(row["kept"])
        assert row["embeds"] is None


def test_what_cannot_be_handed_over_is_said(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    session, planner = Session(Settings(tmp_path, CPU)), Planner(tmp_path, CPU)

    def asked(**more: Any) -> Any:
        return load_spec(write_spec(spec_of(**more)))

    with pytest.raises(UserError, match=r"prune: no run of the spec prunes"):
        select(asked(), session, planner)
    with pytest.raises(UserError, match=r"prune\.method: fastv drops tokens between the decoder's layers"):
        select(asked(prune={"method": "fastv", "keep": 5}), session, planner)
    wrong = CliRunner().invoke(app, ["select", "quickstart", "--out", "keep.csv"])
    assert isinstance(wrong.exception, UserError)
    merging = write_spec(spec_of(prune={"method": "visionzip", "keep": 6}))
    told = CliRunner().invoke(app, ["select", str(merging), "--out", str(tmp_path / "keep.parquet")])
    assert "7 of 7 images have merged tokens" in " ".join(told.stdout.split())
    folder = save_family("qwen3_vl", tmp_path / "model")
    deep = {"model": str(folder), "task": {"name": "diagramqa", "limit": 1}, "prune": {"method": "random", "keep": 4}}
    spec = package.RunSpec.parse(deep)
    rows = select([spec], session, planner).to_pylist()
    assert [len(row["kept"]) for row in rows] == [4]
    with pytest.raises(UserError, match="--embeds: the decoder of a qwen3_vl gets more of an image"):
        select([spec], session, planner, tmp_path / "embeds")
