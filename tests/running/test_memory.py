"""Memory: what a run will need is said before it happens, refused where it cannot fit, and measured per phase."""

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import Results, measure_all
from qapbench import UserError
from qapbench.checkpoints.find import EMBEDDED
from qapbench.checkpoints.headers import stored
from qapbench.memory import Phases, free_bytes, peak_resident_bytes
from qapbench.models import loading
from qapbench.models.unread import UnreadWeight
from qapbench.running import estimate as estimates
from qapbench.running import session as sessions
from qapbench.running.estimate import estimate, of_all, refuse_unless_it_fits
from qapbench.running.execute import make_runs
from qapbench.running.settings import Settings
from qapbench.spec.run_spec import RunSpec

CPU = torch.device("cpu")
MODEL = "diagram-llava"
W4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}}
GPTQ = {**W4, "method": "gptq", "calibration": {"samples": 4}}


def spec_of(**sections: Any) -> RunSpec:
    return RunSpec.parse({"name": "one", "model": MODEL, "task": {"name": "diagramqa", "limit": 2}, **sections})


def weights_of(name: str) -> dict[str, torch.Tensor]:
    return {key: value for file in (EMBEDDED / name).glob("*.safetensors") for key, value in load_file(file).items()}


def test_headers_tell_what_a_checkpoint_holds(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"c": torch.zeros(())}, tmp_path / "model-00002-of-00002.safetensors")
    found = {one.name: one for one in stored(tmp_path)}
    assert {name: (one.shape, one.size, one.loaded(4)) for name, one in found.items()} == {
        "a": ((3, 5), 30, 60),
        "b": ((7,), 56, 56),
        "c": ((), 4, 4),
    }


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}", b"abc"])
def test_a_file_that_is_no_checkpoint_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored(tmp_path) == []


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_an_estimate_counts_weights_in_the_dtype_of_the_run(dtype: str, width: int) -> None:
    count = sum(value.numel() for value in weights_of(MODEL).values())
    one = estimate(spec_of(dtype=dtype), Settings(Path("runs"), CPU), 10)
    assert one.parts["weights"] == width * count
    assert one.total == sum(one.parts.values()) > one.certain > width * count
    assert one.disk == 10 * estimates.ANSWER
    three = estimate(spec_of(dtype=dtype), Settings(Path("runs"), CPU, workers=3))
    assert (three.total, three.certain) == (3 * one.total, 3 * one.certain)


def test_quantizing_calibrating_and_pruning_add_what_they_need() -> None:
    settings = Settings(Path("runs"), CPU)
    dense, quantized = estimate(spec_of(), settings), estimate(spec_of(quantize=W4), settings)
    calibrated = estimate(spec_of(quantize=GPTQ), settings)
    assert dense.total < quantized.total < calibrated.total
    assert calibrated.disk > quantized.disk == dense.disk
    towered = estimate(spec_of(prune={"method": "cdpruner", "keep": 4}), settings)
    assert towered.parts["text tower"] > 0
    inside = estimate(spec_of(prune={"method": "fastv", "keep": 4}), settings)
    assert inside.parts["activations"] == dense.parts["activations"]  # the first layers see all tokens
    tokens = {keep: estimates.WORDS + keep for keep in (4, 144)}
    assert towered.parts["activations"] * tokens[144] == dense.parts["activations"] * tokens[4]


def test_the_sentence_of_a_plan_has_the_largest_run_and_the_disk_of_all() -> None:
    settings = Settings(Path("runs"), CPU)
    (line,) = of_all([spec_of(), spec_of(quantize=GPTQ)], settings, [1000, 1000])
    largest = estimate(spec_of(quantize=GPTQ), settings)
    assert line.startswith(f"{MODEL} needs about {estimates._size(largest.total)} of memory on cpu (weights ")
    assert "calibration" in line and "on disk" in line and "free" in line


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_cannot_fit_stops_before_its_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def loads(*_: object) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(estimates, "free_bytes", lambda device: 10**8)
    monkeypatch.setattr(sessions, "load_model", loads)
    monkeypatch.setattr(sessions, "load_processor", loads)
    with pytest.raises(UserError) as caught:
        make_runs([spec_of()], Settings(tmp_path, CPU, workers=workers))
    said = str(caught.value)
    assert said.startswith("model: the run needs about ") and "0.1 GB are free" in said
    assert "`dtype: bfloat16`" in said and ("--workers" in said) == (workers > 1)
    assert not list(tmp_path.rglob("answers.jsonl"))


def test_nothing_is_refused_where_nobody_knows_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "free_bytes", lambda device: None)
    refuse_unless_it_fits(spec_of(), Settings(Path("runs"), CPU, workers=10**6))
    monkeypatch.setattr(estimates, "free_bytes", lambda device: 10**13)
    refuse_unless_it_fits(spec_of(), Settings(Path("runs"), CPU))


def test_memory_is_measured_for_each_phase_and_stored_in_the_record(tmp_path: Path) -> None:
    (record,) = make_runs([spec_of(quantize=W4)], Settings(tmp_path, CPU))
    timing = record.timing
    assert set(timing.memory_mb) == {"load", "quantize", "answer"} and timing.gpu_memory_mb == {}
    assert 0 < max(timing.memory_mb.values()) <= (timing.peak_memory_mb or 0)
    stored_record = json.loads((tmp_path / record.run_id / "record.json").read_text(encoding="utf-8"))
    assert stored_record["timing"]["memory_mb"] == timing.memory_mb


@pytest.mark.skipif(free_bytes(CPU) is None, reason="only Linux sets its mark back")
def test_the_peak_of_a_phase_is_its_own_and_that_of_the_process_is_kept() -> None:
    phases = Phases(CPU)
    phases.begin("large")
    held = mmap.mmap(-1, 2**28)  # pages that the process did not have before, and that go back at once
    for at in range(0, 2**28, mmap.PAGESIZE):
        held[at] = 1
    phases.begin("small")
    held.close()
    phases.begin("smaller")
    phases.end()
    large, smaller = phases.resident["large"], phases.resident["smaller"]
    assert large - smaller > 200
    assert phases.peaks["peak_memory_mb"] >= large and phases.peaks["memory of smaller"] == smaller
    assert peak_resident_bytes() >= (large - 1) * 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_are_estimated_to_the_byte(dtype: str, tmp_path: Path) -> None:
    spec = spec_of(dtype=dtype, quantize={**W4, "storage": "packed"})
    settings = Settings(tmp_path, CPU)
    session = sessions.Session(settings)
    (record,) = make_runs([spec], settings, session=session)
    model, _ = session.model(spec)
    packed = {line.name: line.stored_bytes or 0 for line in record.receipt.linears}
    others = (w for name, w in model.named_parameters() if name.removesuffix(".weight") not in packed)
    plain = sum(w.held_bytes if isinstance(w, UnreadWeight) else w.nbytes for w in others)
    one = estimate(spec, settings)
    assert len(packed) > 10 and one.parts["weights"] == plain + sum(packed.values())
    assert one.total < estimate(spec_of(dtype=dtype, quantize=W4), settings).total


def test_a_run_that_does_not_fit_is_told_of_packed_weights_and_one_that_packs_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(Path("runs"), CPU)
    plain, packed = spec_of(quantize=W4), spec_of(quantize={**W4, "storage": "packed"})
    needs = estimate(packed, settings)
    monkeypatch.setattr(estimates, "free_bytes", lambda device: needs.certain)
    refuse_unless_it_fits(packed, settings)
    with pytest.raises(UserError) as caught:
        refuse_unless_it_fits(plain, settings)
    size = estimates._size(needs.parts["weights"])
    assert f"`storage: packed` under `quantize` (weights of {size})" in str(caught.value)
    with pytest.raises(UserError) as caught:
        refuse_unless_it_fits(spec_of(), settings)
    assert "packed" not in str(caught.value) and "`--offload`" in str(caught.value)
    monkeypatch.setattr(loading, "_why_all_is_read", lambda device, config: "of something")
    with pytest.raises(UserError) as caught:
        refuse_unless_it_fits(spec_of(), settings)
    assert "offload" not in str(caught.value)


def test_measurements_are_printed_and_kept_as_they_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"before": 4e8, "peak": 3e9, "weights": 2.5e9, "held": 2.5e9, "seconds": 60.0}
    path, asked = tmp_path / "results.json", []

    def measured(mode: str) -> dict[str, float]:
        asked.append(mode)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return one

    with pytest.raises(KeyboardInterrupt):
        measure_all(["full", "w4a4"], Results(path, "a model"), measured)
    printed = "full     weights 2.50 GB, before 0.40 GB, peak 3.00 GB; whole 1.20, over 1.040 (goal ≤ 1.05: ok); 60 s\n"
    assert capsys.readouterr().out == printed
    assert measure_all(["full", "w4a4"], Results(path, "a model"), measured)
    assert asked == ["full", "w4a4", "w4a4"] and capsys.readouterr().out.startswith(printed)
    other = {**one, "peak": 4e9}
    assert not measure_all(["w4a4"], Results(path, "another"), lambda mode: other)
    assert Results(path, "a model").found == {"full": one, "w4a4": one}


@pytest.mark.parametrize("content", ["", "[]", '{"a model": {"full": {}}}', '{"a model": 3}'])
def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"--results: .* holds no results"):
        Results(path, "a model")
    assert path.read_text(encoding="utf-8") == content
