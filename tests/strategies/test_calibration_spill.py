"""Tensors of a calibration that take more than a limit move to files, and change no bit of what is found."""

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from qapbench.memory import page_out
from qapbench.methods.formats import Format
from qapbench.methods.kinds import ptqs
from qapbench.models.family import families, family_of
from qapbench.quantize.calibration import Calibration, CalibrationSamples, spill, store
from qapbench.quantize.calibration.spill import Spill


def test_what_is_beyond_the_limit_is_in_a_file_with_the_same_bits() -> None:
    kept = Spill(limit=300_000)
    values = [torch.randn(50_000), torch.randn(50_000).to(torch.bfloat16), torch.randint(9, (50_000,))]
    values += [torch.full((50_000,), float("nan"))]
    mine = [kept.keep(value) for value in values]
    assert kept.held == 300_000 and kept.spilled == 400_000 + 200_000
    for one, value in zip(mine, values, strict=True):
        assert torch.equal(one.view(torch.uint8), value.view(torch.uint8)) and one.data_ptr() % 64 == 0
    del mine, one
    gc.collect()
    assert kept.held == 0


def test_small_and_strided_tensors_stay_in_memory() -> None:
    kept = Spill(limit=0)
    small, strided = torch.ones(10), torch.ones(500, 500).mT[:, ::2]
    assert kept.keep(small).data_ptr() == small.data_ptr()
    assert kept.keep(strided).stride() == strided.stride()
    assert kept.spilled == 0


def test_a_full_disk_keeps_tensors_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    kept = Spill(limit=0)
    value = torch.ones(100_000)
    assert kept.keep(value).data_ptr() == value.data_ptr() and kept.spilled == 0


@pytest.mark.parametrize("method", ["gptq", "omniquant"])
def test_a_calibration_in_files_finds_the_same_bits(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = families.create("llava").tiny()
    model.requires_grad_(False)
    family = family_of(model)
    linears = family.linears(["language"])
    params = {"epochs": 1} if method == "omniquant" else {}
    found = []
    for limit in (2**30, 0):
        monkeypatch.setattr(spill, "WHOLE", 0)
        calibration = Calibration(model, CalibrationSamples([inputs, inputs]), family)
        calibration._activations, calibration._results = Spill(limit), Spill(limit)
        made: Any = ptqs.create(method, **params)
        found.append(made.calibrate(calibration, linears, Format(bits=4, group_size=16), None))
        assert bool(calibration._activations.spilled and calibration._results.spilled) == (limit == 0)
    assert found[0].keys() == found[1].keys() and found[0]
    for linear, named in found[0].items():
        for name, tensor in named.items():
            assert torch.equal(tensor, found[1][linear][name]), (linear, name)


def test_a_stored_result_is_the_same_file_however_it_is_held(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    found = {"a": {"x": shared, "y": torch.ones(4)}, "b": {"x": shared, "z": shared[:, 1:], "w": torch.arange(8.0)[:4]}}
    store.write(tmp_path, "key", found)
    (file,) = tmp_path.iterdir()
    tensors = {f"{a}{store.BETWEEN}{b}": t.clone().contiguous() for a, named in found.items() for b, t in named.items()}
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    plain = save(tensors, {"qapbench": "x"})
    assert content[8 + length :] == plain[8 + int.from_bytes(plain[:8], "little") :]
    back, why = store.read(tmp_path, "key")
    assert why == "" and back is not None
    assert all(torch.equal(back[a][b], t) for a, named in found.items() for b, t in named.items())


def test_a_result_that_cannot_be_written_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensors: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    store.write(tmp_path, "key", {"a": {"x": torch.ones(3)}})
    before = (tmp_path / "key.safetensors").read_bytes()
    monkeypatch.setattr(store, "save_file", fails)
    with pytest.raises(OSError, match=r"key\.safetensors"):
        store.write(tmp_path, "key", {"a": {"x": torch.zeros(3)}})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("key.safetensors", before)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells, and drops, the pages of one file")
def test_what_is_read_later_can_leave_memory_at_once() -> None:
    size = 2**24

    def in_files() -> int:
        """Bytes of files that are mapped into memory and lie there."""
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    value, before = torch.arange(size, dtype=torch.float32), in_files()
    kept = Spill(limit=0).keep(value, later=True)
    assert in_files() - before > 0.9 * kept.nbytes
    page_out(kept)
    assert in_files() - before < 0.1 * kept.nbytes
    assert torch.equal(kept, value)
