"""Leaving tokens out: against the model's own forward pass, one by one, without cache and without batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cli_process import qapbench
from run_questions import row
from scipy.stats import spearmanr

from qapbench import RunSpec, UserError, compress, metrics
from qapbench.analysis.explain import explain
from qapbench.analysis.leave_one_out import OcclusionEffect, Spliced, occlusion_effects, units_of
from qapbench.analysis.question import LetterQuestion, by_letter, find_questions, image_questions
from qapbench.analysis.sensitivity import Study, studies_of
from qapbench.analysis.study import STUDY, TARGETS, StudyRow, spearman, summarize
from qapbench.methods.scores import min_max
from qapbench.models import family_of
from qapbench.models.family import families
from qapbench.models.loading import load_model
from qapbench.records.store import Store
from qapbench.running.planner import Planner
from qapbench.running.prompt_encoder import PromptEncoder
from qapbench.running.session import Session
from qapbench.running.settings import Settings

Spec = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
PRUNE = {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ready:
    """A loaded model, its spec and one question of it, with the inputs of its prompt."""

    model: Any
    processor: Any
    spec: RunSpec
    question: LetterQuestion
    inputs: dict[str, Any]


@pytest.fixture
def ready(spec_of: Spec, tmp_path: Path) -> Ready:
    spec = RunSpec.parse(spec_of(quantize=W4A4))
    session = Session(Settings(tmp_path, CPU))
    model, processor = session.model(spec)
    (question,) = find_questions(session, spec, [image_questions(session.task(spec))[1]])
    encoder = PromptEncoder(family_of(model), processor, {})
    return Ready(model, processor, spec, question, encoder.inputs(question.question, question.question.prompt))


def measure(ready: Ready, block: int = 1, batch_size: int = 3) -> tuple[OcclusionEffect, Any, Any]:
    with torch.inference_mode(), compress(ready.model, ready.spec, ready.processor):
        full = Spliced(load_model(ready.spec, CPU)[0])
        quantized = Spliced(ready.model)
        for one in (quantized, full):
            one.start(ready.inputs)
            one.check(ready.inputs)
        units = units_of(quantized.view.count, quantized.view.grid, block)
        effect = occlusion_effects(quantized, full, ready.inputs, units, ready.question.ids, batch_size)
        return effect, quantized, full


def own_logits(spliced: Spliced, inputs: dict[str, Any], gone: torch.Tensor) -> torch.Tensor:
    """What the Hugging Face model says of a prompt with fewer placeholders and the features that stay."""
    stays = torch.ones(spliced.view.count, dtype=torch.bool)
    stays[gone] = False
    ids = inputs["input_ids"][0]
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[spliced.columns[gone]] = False
    features = [spliced.view.projected[0][stays]]
    out = spliced.model(input_ids=ids[kept].unsqueeze(0), **spliced.family.encoded(features))
    return out.logits[0, -1].double()


def test_harm_is_that_of_the_models_own_forward_pass(ready: Ready) -> None:
    effect, quantized, full = measure(ready)
    question, inputs = ready.question, ready.inputs
    with torch.inference_mode(), compress(ready.model, ready.spec, ready.processor):
        for spliced, found in ((quantized, effect.answer), (full, effect.full)):
            before = question.probabilities(own_logits(spliced, inputs, torch.tensor([], dtype=torch.long)))
            for token in (0, 7, 15):
                after = question.probabilities(own_logits(spliced, inputs, torch.tensor([token])))
                expected = float((before * (before / after).log()).sum())
                assert float(found[token]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
                if spliced is quantized:
                    assert bool(effect.changed[token]) == bool(before.argmax() != after.argmax())
    assert effect.answer.std() > 0
    assert not torch.equal(effect.answer, effect.full)


def test_error_of_what_stays_is_that_of_whole_runs(ready: Ready) -> None:
    effect, quantized, full = measure(ready)
    with torch.inference_mode(), compress(ready.model, ready.spec, ready.processor):
        for token in (0, 5, 15):
            column = int(quantized.columns[token])
            stays = torch.arange(quantized.embeds.shape[1]) != column
            states = {}
            for name, spliced in (("q", quantized), ("f", full)):
                out = spliced.language(inputs_embeds=spliced.embeds[:, stays], output_hidden_states=True)
                states[name] = [h[0] for h in out.hidden_states[1:]]
                states[f"{name} whole"] = [h[0][stays] for h in spliced.states]
            without, there = (
                np.mean([float((q - f).norm() / f.norm()) for q, f in zip(states[a], states[b], strict=True)])
                for a, b in (("q", "f"), ("q whole", "f whole"))
            )
            assert float(effect.error[token]) == pytest.approx(without - there, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_nothing_depends_on_the_batch(batch_size: int, ready: Ready) -> None:
    expected, found = measure(ready)[0], measure(ready, batch_size=batch_size)[0]
    for name in TARGETS:
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", families.names())
def test_every_family_is_left_out_of_or_says_that_it_cannot_be(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = families.create(name).tiny()
    spliced = Spliced(model.eval())
    with torch.inference_mode():
        try:
            spliced.start(inputs)
            spliced.check(inputs)
        except UserError as error:
            one_view = name in ("gemma3", "minicpmv4_6", "qwen3_5", "qwen3_vl")
            told = "cannot be left out one by one" if one_view else "into tiles"
            assert told in str(error)
            return
        column = spliced.columns[3:4]
        found, states = spliced.without([column, spliced.columns[5:6]], int(column))
        stays = torch.arange(inputs["input_ids"].shape[1]) != column
        mine = {"input_ids": inputs["input_ids"][:, stays]}
        if spliced.positions is not None:
            mine["position_ids"] = spliced.positions[..., stays]
        features = spliced.view.projected[0][torch.arange(spliced.view.count) != 3]
        own = model(**mine, **spliced.family.encoded([features])).logits[0, -1]
    assert torch.allclose(found[0], own, atol=1e-4)
    assert states[0].shape[1] == inputs["input_ids"].shape[1] - int(column) - 1


def test_blocks_part_the_grid() -> None:
    units = units_of(12, (3, 4), 2)
    assert [unit.tolist() for unit in units] == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [10, 11]]
    assert [unit.tolist() for unit in units_of(3, None, 1)] == [[0], [1], [2]]
    with pytest.raises(UserError, match="on no grid"):
        units_of(12, None, 2)


def test_leaving_out_blocks_of_unequal_size(ready: Ready) -> None:
    effect, quantized, _ = measure(ready, block=3)
    assert len(effect.answer) == 4  # a grid of 4 x 4: 9, 3, 3 and 1 tokens
    alone = measure(ready)[0]
    assert float(effect.answer[3]) == pytest.approx(float(alone.answer[15]), rel=1e-3, abs=1e-7)
    assert quantized.view.grid == (4, 4)


def test_spearman_is_scipys() -> None:
    draw = np.random.default_rng(0)
    scores, harm = draw.integers(0, 6, (4, 30)).astype(float), draw.random((3, 30))
    expected = [[spearmanr(s, h).statistic for h in harm] for s in scores]
    assert spearman(scores, harm) == pytest.approx(np.array(expected))
    scores[1] = 2.0
    assert np.isnan(spearman(scores, harm)[1]).all()


def test_the_summary_is_the_mean_over_questions_with_an_interval_around_it() -> None:
    draw = np.random.default_rng(1)
    rows = []
    for number in range(30):
        harm = draw.random(40)
        scores = {"metric good": harm + 0.3 * draw.random(40), "metric none": np.zeros(40), "relevance r": -harm}
        effects = dict.fromkeys(TARGETS, harm.tolist())
        listed = {name: values.tolist() for name, values in scores.items()}
        rows.append(StudyRow(id=str(number), scores=listed, effects=effects, changed=[0] * 40))
    found = {one.name: one for one in summarize(rows, seed=0)}
    assert list(found) == ["good", "r", "none"]
    good = found["good"].correlations["answer"]
    each = [spearmanr(row.scores["metric good"], row.effects["answer"]).statistic for row in rows]
    assert good.rho == pytest.approx(np.mean(each))
    error = np.std(each, ddof=1) / len(each) ** 0.5
    assert [good.low, good.high] == pytest.approx([good.rho - 1.96 * error, good.rho + 1.96 * error], abs=error / 3)
    assert found["r"].kind == "relevance"
    assert found["r"].correlations["answer"].rho == pytest.approx(-1)
    assert (found["none"].correlations["error"].rho, found["none"].correlations["error"].n) == (None, 0)


def session_at(runs: Path, seen: list[int] | None = None) -> Session:
    """A session that notes how many questions of a study are done."""
    return Session(Settings(runs, CPU), lambda name, done, total: None if seen is None else seen.append(done))


def test_a_study_is_resumed_and_ends_with_the_same_bytes(spec_of: Spec, tmp_path: Path) -> None:
    specs = [RunSpec.parse(spec_of(quantize=W4A4, prune=prune)) for prune in (None, PRUNE, {**PRUNE, "keep": 3})]
    (study,) = studies_of(specs, sample=3, block=2)
    assert [prune.method.name for prune in study.prunes] == ["cdpruner"]
    seen: list[int] = []
    summary = study.make(session_at(tmp_path / "whole", seen))
    assert seen == [0, 1, 2, 3]
    assert (summary.questions, summary.units) == (3, 12)
    assert {one.name for one in summary.predictors if one.kind == "metric"} == set(metrics.names())
    assert [one.name for one in summary.predictors if one.kind == "relevance"] == ["cdpruner"]
    folder = tmp_path / "whole" / f"study-{summary.id}"
    stored = (folder / "answers.jsonl").read_bytes()
    torn = tmp_path / "torn" / folder.name
    torn.mkdir(parents=True)
    (torn / "answers.jsonl").write_bytes(stored[: stored.index(b"\n") + 40])
    seen.clear()
    again = study.make(session_at(tmp_path / "torn", seen))
    assert seen == [1, 2, 3]
    assert (torn / "answers.jsonl").read_bytes() == stored
    assert again.predictors == summary.predictors
    assert json.loads((torn / STUDY).read_text())["units"] == 12
    other = Study(study.spec, study.prunes, sample=2, block=2).make(session_at(tmp_path / "whole"))
    assert other.id != summary.id


@pytest.mark.parametrize("method", ["smoothquant", "gptq"])
def test_a_calibrated_method_and_a_pruner_inside_the_decoder(method: str, spec_of: Spec, tmp_path: Path) -> None:
    """What is left out is left out of the calibrated model, and relevance is what the pruners themselves see."""
    pd.DataFrame([row(index) for index in range(20, 28)]).to_parquet(tmp_path / "train.parquet")
    format, calibration = {"bits": 4, "symmetric": True}, {"samples": 4, "data": str(tmp_path / "train.parquet")}
    quantize = {"method": method, "weights": format, "activations": format, "calibration": calibration}
    fastv = {"method": "fastv", "keep": 5, "sensitivity": "combined"}
    pruned = {**quantize, "calibration": {**calibration, "pruned": True}}
    specs = [RunSpec.parse(spec_of(quantize=quantize, prune=prune)) for prune in (None, PRUNE, fastv)]
    specs.append(RunSpec.parse(spec_of(quantize=pruned, prune=PRUNE)))  # of the whole samples here: the same study
    (study,) = studies_of(specs, sample=3)
    assert [prune.method.name for prune in study.prunes] == ["cdpruner", "fastv"]
    session = session_at(tmp_path / "study")
    summary = study.make(session)
    assert (summary.questions, summary.units) == (3, 48)
    assert {one.name for one in summary.predictors if one.kind == "relevance"} == {"cdpruner", "fastv"}
    assert all(one.correlations["answer"].n for one in summary.predictors if one.name == "fastv")
    assert len(list((tmp_path / "study" / "calibrations").glob("*.safetensors"))) == 1
    rows = Store(tmp_path / "study" / f"study-{summary.id}", StudyRow).read()
    fresh = session_at(tmp_path / "alone")
    for spec in specs[1:3]:
        assert spec.prune is not None
        explained = explain(spec, rows[0].id, fresh).sides[0].relevance
        stored = torch.tensor(rows[0].scores[f"relevance {spec.prune.method.name}"])
        assert explained is not None
        assert torch.allclose(min_max(stored[None])[0], explained, atol=1e-4)
    (question,) = find_questions(fresh, by_letter(specs[0]), [rows[0].id])
    model, processor = fresh.model(specs[0])
    inputs = PromptEncoder(family_of(model), processor, {}).inputs(question.question, question.question.prompt)
    planned = Planner(tmp_path / "alone", CPU).plan(by_letter(specs[0]))
    with torch.inference_mode(), fresh.quantized(planned) as receipt:
        quantized = Spliced(model)
        quantized.start(inputs)
        assert receipt.calibration is not None
        assert receipt.calibration.samples == 4
        before = question.probabilities(own_logits(quantized, inputs, torch.tensor([], dtype=torch.long)))
        for token in (0, 9):
            after = question.probabilities(own_logits(quantized, inputs, torch.tensor([token])))
            expected = float((before * (before / after).log()).sum())
            assert rows[0].effects["answer"][token] == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_a_study_needs_a_quantized_model_and_questions(spec_of: Spec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantize"):
        studies_of([RunSpec.parse(spec_of())], sample=3, block=1)
    (study,) = studies_of([RunSpec.parse(spec_of(quantize=W4A4, task={"limit": 2}))], sample=3, block=1)
    with pytest.raises(UserError, match="two questions with an image"):
        study.make(session_at(tmp_path / "nowhere"))


def test_the_command_prints_a_table_and_the_page_shows_it(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    spec, runs = write_spec(spec_of(quantize=W4A4, prune=PRUNE)), tmp_path / "runs"
    done = qapbench("study", "sensitivity", spec, "--runs", runs, "--sample", 2, "--block", 2)
    assert done.returncode == 0, done.stderr
    assert "outlier_intensity" in done.stdout
    assert "cdpruner (relevance)" in done.stdout
    done = qapbench("study", "sensitivity", spec, "--runs", runs, "--sample", 2, "--block", 2, "--json")
    (summary,) = json.loads(done.stdout)
    assert summary["timing"]["questions"] == 0
    wrong = qapbench("study", "sensitivity", spec, "--runs", runs, "--set", "quantize=null")
    assert wrong.returncode == 2
    assert "error: quantize: the study is about a quantized model" in wrong.stderr
