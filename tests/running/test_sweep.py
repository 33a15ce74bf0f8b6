"""Many runs at once: the bytes of each alone, and what is equal done once."""

import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from run_questions import QUESTIONS

import qapbench
from qapbench import RunSpec
from qapbench.models import row_products
from qapbench.models.families.llava import Llava
from qapbench.records.record import Record
from qapbench.records.store import Store
from qapbench.running import batches
from qapbench.running import sweep as sweep_module
from qapbench.running.active_run import ActiveRun
from qapbench.running.plan import prune_key
from qapbench.running.planner import Planner
from qapbench.running.session import Session
from qapbench.running.settings import Settings, find_device
from qapbench.running.sweep import answer_runs

Spec = Callable[..., dict[str, Any]]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
W4A4_SYM = {**W4A4, "activations": {"bits": 4, "symmetric": True}}
IMAGES = QUESTIONS // 2


def sweep(specs: list[dict[str, Any]], runs: Path, **more: Any) -> tuple[list[Record], list[bytes]]:
    records = qapbench.run([RunSpec.parse(spec) for spec in specs], runs, **more)
    return records, [(runs / record.run_id / "answers.jsonl").read_bytes() for record in records]


def prunes(keep: int = 5) -> list[dict[str, Any]]:
    """Every registered pruner, and two that differ from another in the metric alone."""
    found: list[dict[str, Any]] = [{"method": method, "keep": keep} for method in qapbench.pruners.names()]
    return [*found, *({"method": "cdpruner", "keep": keep, "sensitivity": name} for name in ("l2", "combined"))]


def test_a_cell_has_the_bytes_that_it_has_alone(spec_of: Spec, tmp_path: Path) -> None:
    """Every pruner's run, made alone with one question at a time, against sweeps with more of both."""
    cells = [spec_of(quantize=W4A4, prune=prune) for prune in prunes()]
    alone = [sweep([cell], tmp_path / f"alone-{index}", batch_size=1) for index, cell in enumerate(cells)]
    for batch_size, mine in ((1, slice(1, None, 2)), (3, slice(None)), (16, slice(0, None, 2))):
        active_runs = [spec_of(), spec_of(quantize=W4A4), *cells[mine]]
        records, answers = sweep(active_runs, tmp_path / f"together-{batch_size}", batch_size=batch_size)
        together = zip(cells[mine], records[2:], answers[2:], alone[mine], strict=True)
        for cell, record, stored, ((single,), (bytes_alone,)) in together:
            assert stored == bytes_alone, (batch_size, cell["prune"])
            assert record.receipt == single.receipt, (batch_size, cell["prune"])
            assert record.tokens == single.tokens
        assert len({record.receipt.summary for record in records}) == len(records)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["letter", "generate"])
def test_neighbours_in_a_batch_reach_neither_ranges_nor_attention(
    dtype: str, mode: str, spec_of: Spec, tmp_path: Path
) -> None:
    active_runs = [
        spec_of(quantize=quantize, dtype=dtype, task={"answers": mode, "limit": 8}, **prune)
        for quantize in (W4A4, W4A4_SYM)
        for prune in ({}, {"prune": {"method": "attention", "keep": 4}}, {"prune": {"method": "random", "keep": 4}})
    ]
    _, one = sweep(active_runs, tmp_path / "one", batch_size=1)
    _, many = sweep(active_runs, tmp_path / "many", batch_size=16)
    assert one == many
    assert len(set(one)) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", [{"answers": "letter"}, {"answers": "generate"}])
def test_large_weights_give_the_same_answers_in_blocks(
    task: dict[str, Any], dtype: str, spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = spec_of(quantize=W4A4, dtype=dtype, task=task)
    _, (plain,) = sweep([active], tmp_path / "plain", batch_size=16)
    walked: list[int] = []
    products = row_products._products

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: Any, in_blocks: bool) -> torch.Tensor:
        walked.extend([len(x)] * in_blocks)
        return products(x, weight, bias, in_blocks)

    monkeypatch.setattr(row_products, "_products", watched)
    monkeypatch.setattr(row_products, "CACHED", 1500)
    monkeypatch.setattr(batches.BatchRunner, "_room", lambda self, row, longest: self.batch_size * longest)
    _, (one,) = sweep([active], tmp_path / "one", batch_size=1)
    assert set(walked) == {1}
    _, (many,) = sweep([active], tmp_path / "many", batch_size=16)
    assert max(walked) > 1
    assert one == many
    near = pytest.approx if dtype == "float32" else lambda value, **_: pytest.approx(value, abs=0.2)
    for mine, theirs in zip(one.splitlines(), plain.splitlines(), strict=True):
        for got, expected in zip(json.loads(mine)["outputs"], json.loads(theirs)["outputs"], strict=True):
            if task["answers"] == "letter":
                assert got[0] == near(expected[0], abs=1e-3)
            elif dtype == "float32":
                assert got == expected


def test_beams_share_no_product_with_other_rows(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    open_rows = row_products._apart
    rows_of = batches.BatchRunner.rows

    def beamed(self: Any, question: Any, shown: Any) -> list[Any]:
        rows = rows_of(self, question, shown)
        return [
            dataclasses.replace(row, options=json.dumps({**json.loads(row.options), "num_beams": 3})) for row in rows
        ]

    monkeypatch.setattr(batches.BatchRunner, "rows", beamed)
    monkeypatch.setattr(row_products, "_apart", lambda *given: widths.append(given[0]) or open_rows(*given))
    active = spec_of(quantize=W4A4, task={"answers": "generate", "limit": 6})
    _, (one,) = sweep([active], tmp_path / "one", batch_size=1)
    assert widths  # three beams of one row are three rows
    _, (many,) = sweep([active], tmp_path / "many", batch_size=16)
    assert one == many


def test_what_is_scored_stays_in_the_cache(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    run = batches.BatchRunner._run
    monkeypatch.setattr(batches.BatchRunner, "_run", lambda self, rows: most.append(len(rows)) or run(self, rows))
    sweep([spec_of()], tmp_path / "plain", batch_size=16)
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(row_products, "CACHED", 1500)
    sweep([spec_of()], tmp_path / "cut", batch_size=16)
    assert max(most) == 1


def test_each_image_goes_through_the_tower_once(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For full precision, two quantizers and every pruner; twice where nothing may wait for the next quantizer."""
    calls = []
    see = Llava.see
    monkeypatch.setattr(Llava, "see", lambda self, pixels, needs: calls.append(1) or see(self, pixels, needs))
    prune = {"method": "cdpruner", "keep": 5, "sensitivity": "l2"}
    active_runs = [spec_of(), *(spec_of(quantize=q, prune=prune) for q in (W4A4, W4A4_SYM)), spec_of(quantize=W4A4)]
    _, answers = sweep(active_runs, tmp_path / "memory")
    assert len(calls) == IMAGES
    _, spilled = sweep(active_runs, tmp_path / "spilled", spill=True)
    assert len(calls) == 2 * IMAGES
    assert not list((tmp_path / "spilled").glob("features-*"))
    monkeypatch.setattr(sweep_module, "MEMORY", 0)
    _, again = sweep(active_runs, tmp_path / "nothing")
    assert len(calls) == 5 * IMAGES
    assert answers == spilled == again
    vision = [spec_of(quantize={**W4A4, "scope": ["language", "vision"]}), spec_of(quantize=W4A4), spec_of()]
    monkeypatch.setattr(sweep_module, "MEMORY", 1 << 30)
    calls.clear()
    records, _ = sweep(vision, tmp_path / "vision")
    assert len(calls) == 2 * IMAGES
    seen = {line.part for line in records[0].receipt.linears if line.calls}
    assert seen == {"language", "vision"}


def test_relevance_and_sensitivity_are_computed_once(
    spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qapbench.strategies.pruners.cdpruner import CDPruner

    calls = []
    each = CDPruner.relevance_each
    # What choosing costs is measured once more, on random tokens.
    monkeypatch.setattr("qapbench.running.scoring.run_cost", lambda *_: None)
    monkeypatch.setattr(CDPruner, "relevance_each", lambda self, several: calls.extend(several) or each(self, several))
    active_runs = [
        spec_of(prune={"method": "cdpruner", "keep": keep, "sensitivity": name})
        for keep in (4, 5)
        for name in ("l1", "l2", "combined")
    ]
    sweep(active_runs, tmp_path)
    assert len(calls) == IMAGES


def test_equal_selections_are_answered_once(spec_of: Spec, tmp_path: Path) -> None:
    """Keeping every token is the dense run, whatever chooses."""
    everything = [{"method": method, "keep": 16} for method in ("random", "attention")]
    active_runs = [spec_of(), *(spec_of(prune=prune) for prune in everything)]
    records, answers = sweep(active_runs, tmp_path, batch_size=1)
    assert [record.timing.computed for record in records] == [QUESTIONS, 0, 0]
    outputs = [[json.loads(line)["outputs"] for line in stored.splitlines()] for stored in answers]
    assert outputs[0] == outputs[1] == outputs[2]
    assert records[1].tokens == records[0].tokens


def test_answers_of_a_subset_are_used_for_the_whole(spec_of: Spec, tmp_path: Path) -> None:
    active_runs = [spec_of(quantize=W4A4, task={"limit": limit}) for limit in (6, QUESTIONS)]
    (part,), _ = sweep(active_runs[:1], tmp_path)
    (whole,), (answers,) = sweep(active_runs[1:], tmp_path)
    assert part.timing.computed == 6
    assert whole.timing.computed <= QUESTIONS - 5  # the first question is always measured
    assert [answers] == sweep(active_runs[1:], tmp_path / "alone")[1]


def test_a_cell_that_was_torn_is_completed_alone(spec_of: Spec, tmp_path: Path) -> None:
    active_runs = [spec_of(quantize=W4A4, prune=prune) for prune in prunes()[:3]]
    records, answers = sweep(active_runs, tmp_path)
    folder = tmp_path / records[1].run_id
    (folder / "record.json").unlink()
    (folder / "answers.jsonl").write_bytes(answers[1][: len(answers[1]) // 2])
    again, completed = sweep(active_runs, tmp_path)
    assert completed == answers
    assert again[0] == records[0]
    assert again[1].receipt == records[1].receipt


def test_workers_end_with_the_same_bytes(spec_of: Spec, tmp_path: Path) -> None:
    active_runs = [spec_of(), spec_of(quantize=W4A4), spec_of(quantize=W4A4, prune={"method": "visionzip", "keep": 5})]
    records, answers = sweep(active_runs, tmp_path / "two", workers=2)
    single, expected = sweep(active_runs, tmp_path / "one")
    assert answers == expected
    assert [record.receipt for record in records] == [record.receipt for record in single]
    assert [record.scores for record in records] == [record.scores for record in single]
    assert sum(record.timing.questions for record in records) == 3 * QUESTIONS


def test_a_mistake_in_a_worker_is_one_message(spec_of: Spec, tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(qapbench.UserError, match="cannot load"):
        sweep([{**spec_of(), "model": str(broken)}], tmp_path / "runs", workers=2)


class Said(BaseModel):
    """A line of a store that has nothing to do with runs."""

    writer: int
    number: int
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        return self.model_dump()


def _write(folder: Path, writer: int) -> None:
    for number in range(40):
        Store(folder, Said).append([Said(writer=writer, number=number, text="x" * 5000)])


def test_several_writers_of_one_store(tmp_path: Path) -> None:
    store = Store(tmp_path, Said)
    store.append([Said(writer=-1, number=0)])
    with store.path.open("ab") as handle:
        handle.write(b'{"torn')  # by a writer that was killed
    processes = [multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path, i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = store.read()
    assert len(lines) == 1 + 3 * 40
    for writer in range(3):
        assert [line.number for line in lines if line.writer == writer] == list(range(40))


def test_the_plan_says_what_is_shared(spec_of: Spec, tmp_path: Path) -> None:
    active_runs = [spec_of(), *(spec_of(quantize=W4A4, prune=prune) for prune in prunes()[:3])]
    planner = Planner(tmp_path, find_device(None))
    plans = [planner.plan(RunSpec.parse(active)) for active in active_runs]
    shared = planner.shared(plans)
    assert (shared.runs, shared.groups, shared.asked) == (4, 2, 4 * QUESTIONS)
    assert (shared.text, shared.with_image, shared.images) == (4 * IMAGES, 4 * IMAGES, IMAGES)
    assert shared.computed == 4 * IMAGES + 2 * IMAGES
    assert shared.prunings == 4
    assert len(shared.lines) == 3
    sweep(active_runs, tmp_path)
    assert planner.shared([planner.plan(RunSpec.parse(active)) for active in active_runs]).lines == []


def test_prune_keys_follow_content(spec_of: Spec) -> None:
    one, same, other = (
        RunSpec.parse(spec_of(name=name, prune={"method": "random", "keep": keep}))
        for name, keep in (("a", 5), ("b", 5), ("a", 6))
    )
    assert prune_key(one) == prune_key(same) != prune_key(other)
    assert prune_key(RunSpec.parse(spec_of())) is None


def test_the_model_is_as_before_after_a_sweep(spec_of: Spec, tmp_path: Path) -> None:
    settings = Settings(tmp_path, find_device(None))
    session, planner = Session(settings), Planner(tmp_path, settings.device)
    spec = RunSpec.parse(spec_of(quantize=W4A4))
    model, _ = session.model(spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plans = [planner.plan(one) for one in (spec, RunSpec.parse(spec_of()))]
    for plan in plans:
        plan.folder.mkdir()
    answer_runs(session, [ActiveRun(plan) for plan in plans])
    assert [planner.plan(plan.spec).answered for plan in plans] == [QUESTIONS, QUESTIONS]
    assert session.model(spec)[0] is model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
