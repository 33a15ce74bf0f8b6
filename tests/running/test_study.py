"""Leaving tokens out: against the model's own forward pass, one by one, without cache and without batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_cli import qapbench

from qapbench import RunSpec, UserError, compress, metrics
from qapbench.analysis.leave_one_out import OcclusionEffect, Spliced, occlusion_effects, units_of
from qapbench.analysis.question import Question, find_question, image_questions
from qapbench.analysis.sensitivity import Study, studies_of
from qapbench.analysis.study import STUDY, TARGETS, spearman, summarize
from qapbench.models.family import families
from qapbench.models.loading import load_model
from qapbench.tasking.tasks import load_task

Spec = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
PRUNE = {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}
CPU = torch.device("cpu")


@pytest.fixture
def ready(spec_of: Spec) -> tuple[Any, Any, RunSpec, Question]:
    spec = RunSpec.parse(spec_of(quantize=W4A4))
    model, processor = load_model(spec, CPU)
    task = load_task(spec.task)
    return model, processor, spec, find_question(task, processor, image_questions(task)[1])


def measure(
    ready: tuple[Any, Any, RunSpec, Question], block: int = 1, batch_size: int = 3
) -> tuple[OcclusionEffect, Any, Any]:
    model, processor, spec, question = ready
    inputs = question.inputs(processor, CPU)
    with torch.inference_mode(), compress(model, spec, processor):
        full = Spliced(load_model(spec, CPU)[0])
        quantized = Spliced(model)
        for one in (quantized, full):
            one.start(inputs)
            one.check(inputs)
        units = units_of(quantized.seen.count, quantized.seen.grid, block)
        return occlusion_effects(quantized, full, inputs, units, question.ids, batch_size), quantized, full


def own_logits(spliced: Spliced, inputs: dict[str, Any], gone: torch.Tensor) -> torch.Tensor:
    """What the Hugging Face model says of a prompt with fewer placeholders and the features that stay."""
    stays = torch.ones(spliced.seen.count, dtype=torch.bool)
    stays[gone] = False
    ids = inputs["input_ids"][0]
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[spliced.columns[gone]] = False
    features = [spliced.seen.projected[0][stays]]
    out = spliced.model(input_ids=ids[kept].unsqueeze(0), **spliced.family.encoded(features))
    return out.logits[0, -1].double()


def test_harm_is_that_of_the_models_own_forward_pass(ready: Any) -> None:
    model, processor, spec, question = ready
    harm, quantized, full = measure(ready)
    inputs = question.inputs(processor, CPU)
    with torch.inference_mode(), compress(model, spec, processor):
        for spliced, found in ((quantized, harm.answer), (full, harm.full)):
            before = question.probabilities(own_logits(spliced, inputs, torch.tensor([], dtype=torch.long)))
            for token in (0, 7, 15):
                after = question.probabilities(own_logits(spliced, inputs, torch.tensor([token])))
                expected = float((before * (before / after).log()).sum())
                assert float(found[token]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
                if spliced is quantized:
                    assert bool(harm.changed[token]) == bool(before.argmax() != after.argmax())
    assert harm.answer.std() > 0
    assert not torch.equal(harm.answer, harm.full)


def test_error_of_what_stays_is_that_of_whole_runs(ready: Any) -> None:
    model, processor, spec, _ = ready
    harm, quantized, full = measure(ready)
    with torch.inference_mode(), compress(model, spec, processor):
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
            assert float(harm.error[token]) == pytest.approx(without - there, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_nothing_depends_on_the_batch(batch_size: int, ready: Any) -> None:
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
        except UserError as error:
            assert "into tiles" in str(error)
            return
        spliced.check(inputs)
        column = spliced.columns[3:4]
        found, states = spliced.without([column, spliced.columns[5:6]], int(column))
        stays = torch.arange(inputs["input_ids"].shape[1]) != column
        mine = {"input_ids": inputs["input_ids"][:, stays]}
        if spliced.positions is not None:
            mine["position_ids"] = spliced.positions[..., stays]
        features = spliced.seen.projected[0][torch.arange(spliced.seen.count) != 3]
        own = model(**mine, **spliced.family.encoded([features])).logits[0, -1]
    assert torch.allclose(found[0], own, atol=1e-4)
    assert states[0].shape[1] == inputs["input_ids"].shape[1] - int(column) - 1


def test_blocks_part_the_grid() -> None:
    units = units_of(12, (3, 4), 2)
    assert [unit.tolist() for unit in units] == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [10, 11]]
    assert [unit.tolist() for unit in units_of(3, None, 1)] == [[0], [1], [2]]
    with pytest.raises(UserError, match="on no grid"):
        units_of(12, None, 2)


def test_leaving_out_blocks_of_unequal_size(ready: Any) -> None:
    harm, quantized, _ = measure(ready, block=3)
    assert len(harm.answer) == 4  # a grid of 4 x 4: 9, 3, 3 and 1 tokens
    alone = measure(ready)[0]
    assert float(harm.answer[3]) == pytest.approx(float(alone.answer[15]), rel=1e-3, abs=1e-7)
    assert quantized.seen.grid == (4, 4)


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
    for _ in range(30):
        harm = draw.random(40)
        scores = {"metric good": harm + 0.3 * draw.random(40), "metric none": np.zeros(40), "relevance r": -harm}
        rows.append({"scores": scores, "harm": dict.fromkeys(TARGETS, harm)})
    found = {one.name: one for one in summarize(rows, seed=0)}
    assert list(found) == ["good", "r", "none"]
    good = found["good"].correlations["answer"]
    each = [spearmanr(row["scores"]["metric good"], row["harm"]["answer"]).statistic for row in rows]
    assert good.rho == pytest.approx(np.mean(each))
    error = np.std(each, ddof=1) / len(each) ** 0.5
    assert [good.low, good.high] == pytest.approx([good.rho - 1.96 * error, good.rho + 1.96 * error], abs=error / 3)
    assert found["r"].kind == "relevance"
    assert found["r"].correlations["answer"].rho == pytest.approx(-1)
    assert (found["none"].correlations["error"].rho, found["none"].correlations["error"].n) == (None, 0)


def test_a_study_is_resumed_and_ends_with_the_same_bytes(spec_of: Spec, tmp_path: Path) -> None:
    specs = [RunSpec.parse(spec_of(quantize=W4A4, prune=prune)) for prune in (None, PRUNE, {**PRUNE, "keep": 3})]
    (study,) = studies_of(specs, sample=3, block=2, device=CPU)
    assert [prune.method.name for prune in study.prunes] == ["cdpruner"]
    seen: list[int] = []
    summary = study.make(tmp_path / "whole", lambda name, done, total: seen.append(done))
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
    again = study.make(tmp_path / "torn", lambda name, done, total: seen.append(done))
    assert seen == [1, 2, 3]
    assert (torn / "answers.jsonl").read_bytes() == stored
    assert again.predictors == summary.predictors
    assert json.loads((torn / STUDY).read_text())["units"] == 12
    other = Study(study.spec, study.prunes, sample=2, block=2, device=CPU).make(tmp_path / "whole")
    assert other.id != summary.id


def test_a_study_needs_a_quantized_model_and_questions(spec_of: Spec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantize"):
        studies_of([RunSpec.parse(spec_of())], sample=3, block=1, device=CPU)
    (study,) = studies_of([RunSpec.parse(spec_of(quantize=W4A4, task={"limit": 2}))], sample=3, block=1, device=CPU)
    with pytest.raises(UserError, match="two questions with an image"):
        study.make(tmp_path / "nowhere")


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
