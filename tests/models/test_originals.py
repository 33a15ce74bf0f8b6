"""Original weights while quantized ones are in their place: where they are, and that they come back to the bit."""

import contextlib
import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import save_llava
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, modeling_utils

from qapbench import UserError, compress
from qapbench.errors import RunFailedError
from qapbench.memory import page_out
from qapbench.models import family_of
from qapbench.models.loading import load_model
from qapbench.models.streaming import Part, streaming
from qapbench.quantize.originals import Originals
from qapbench.spec.run_spec import RunSpec

W4 = {"quantize": {"method": "rtn", "weights": {"bits": 4, "group_size": 16}}}
WAYS = ["memory", "file", "checkpoint"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return save_llava(tmp_path_factory.mktemp("originals") / "llava")


def loaded(folder: Path, dtype: str = "float32") -> Any:
    spec = RunSpec.parse({"model": str(folder), "task": "none", "dtype": dtype})
    return load_model(spec, torch.device("cpu"))[0]


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone().flatten().view(torch.uint8) for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("keep", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_back_to_the_bit_from_wherever_they_were(folder: Path, keep: str, dtype: str) -> None:
    model = loaded(folder, dtype)
    before, objects = bits(model), dict(model.named_parameters())
    linears = family_of(model).linears(["language"])
    held = [linear.weight for linear in linears.values()]
    for _ in range(2):
        with compress(model, W4, keep_originals=keep):
            assert [not weight.numel() for weight in held] == [keep != "memory"] * len(held)
            assert not same(before, bits(model))
        assert same(before, bits(model))
    assert all(value is objects[name] for name, value in model.named_parameters())


def test_the_ways_quantize_alike(folder: Path) -> None:
    found = []
    for keep in WAYS:
        model = loaded(folder)
        with compress(model, W4, keep_originals=keep):
            found.append(bits(model))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_a_weight_that_was_changed_since_it_was_loaded_is_not_taken_from_the_checkpoint(folder: Path) -> None:
    model = loaded(folder)
    changed = model.model.language_model.layers[0].mlp.up_proj.weight
    changed[0, 0] = float("nan")
    changed[1] = -0.0
    before = bits(model)
    originals = Originals(model, "checkpoint")
    with compress(model, {"quantize": {**W4["quantize"], "scope": ["projector"]}}, keep_originals=originals):
        pass
    restore = originals.set_aside(changed).restore
    assert not changed.numel()
    restore()
    assert same(before, bits(model))


def test_weights_that_several_modules_share_stay_in_memory(folder: Path) -> None:
    model = loaded(folder)
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[1].mlp.gate_proj.weight = nn.Parameter(layers[0].mlp.gate_proj.weight.data, requires_grad=False)
    originals = Originals(model, "file")
    for linear in (layers[0].mlp.up_proj, layers[0].mlp.gate_proj):
        originals.set_aside(linear.weight)
        assert linear.weight.numel()


def test_a_checkpoint_that_is_written_to_meanwhile_is_an_error_and_one_that_is_replaced_is_not(
    folder: Path, tmp_path: Path
) -> None:
    own = save_llava(tmp_path / "llava")
    file = own / "model.safetensors"
    model = loaded(own)
    before = bits(model)
    with compress(model, W4, keep_originals="checkpoint"):
        other = {name: value + 1 for name, value in load_file(file).items()}
        save_file(other, tmp_path / "new.safetensors", {"format": "pt"})
        (tmp_path / "new.safetensors").replace(file)
    assert same(before, bits(model))
    model = loaded(own)
    with pytest.raises(RunFailedError, match="load the model again"), compress(model, W4, keep_originals="checkpoint"):
        with file.open("r+b") as handle:
            handle.seek(-1, os.SEEK_END)
            handle.write(b"\0")
        os.utime(file, (1, 1))


def test_a_full_disk_keeps_weights_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> Any:
        raise OSError("no space left on device")

    model = loaded(folder)
    before = bits(model)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with compress(model, W4, keep_originals="file"):
        assert not same(before, bits(model))
    assert same(before, bits(model))


def test_an_unknown_way_is_refused_with_the_nearest_one(folder: Path) -> None:
    with pytest.raises(UserError, match=r"keep_originals.*'file'"), compress(loaded(folder), W4, keep_originals="fil"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_streamed_model_has_the_bits_of_one_that_transformers_maps_into_memory(folder: Path, dtype: str) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    streamed = loaded(folder, dtype)
    assert same(bits(plain), bits(streamed))
    assert all(weight.data_ptr() % 64 == 0 for weight in streamed.parameters())
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(plain.dtype)
    one, other = (model.model.language_model.layers[0].mlp.up_proj(x) for model in (plain, streamed))
    assert torch.equal(one, other)


def test_tensors_are_read_one_after_another_by_the_loading_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[threading.Thread] = []
    read = Part.__getitem__

    def noted(self: Part, index: Any) -> torch.Tensor:
        readers.append(threading.current_thread())
        return read(self, index)

    monkeypatch.setattr(Part, "__getitem__", noted)
    before = modeling_utils.safe_open
    with streaming():
        AutoModelForImageTextToText.from_pretrained(folder)
    assert len(readers) > 50 and set(readers) == {threading.current_thread()}
    assert modeling_utils.safe_open is before and "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_hooks_and_parameters_are_put_back_when_quantizing_fails_halfway(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folder)
    before, count = bits(model), [0]
    set_aside = Originals.set_aside

    def fails(self: Originals, weight: torch.Tensor) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise MemoryError
        return set_aside(self, weight)

    monkeypatch.setattr(Originals, "set_aside", fails)
    with contextlib.suppress(MemoryError), compress(model, W4, keep_originals="file"):
        pass
    assert count[0] == 5 and same(before, bits(model))


@pytest.mark.parametrize("keep", WAYS)
def test_a_model_that_transformers_mapped_into_memory_comes_back_too(folder: Path, keep: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False)
    changed = model.model.language_model.layers[1].mlp.down_proj.weight
    changed += 0.25  # in pages of its own, which the file does not have
    before = bits(model)
    with compress(model, W4, keep_originals=keep):
        assert not same(before, bits(model))
    assert same(before, bits(model))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")
def test_pages_of_a_mapped_file_leave_memory_and_changed_ones_stay(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2**22)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        value = file.get_tensor("x")
    value[-1] = 7
    assert value.sum() == 2**22 + 6
    before = resident()
    page_out(value)
    after = resident()
    assert value.sum() == 2**22 + 6
    assert before - after > 2**23 or resident() - after < 2**20  # an old kernel does nothing


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_closed_place_holds_no_file_open(folder: Path) -> None:
    model = loaded(folder)
    count = len(list(Path("/proc/self/fd").iterdir()))
    for keep in ("file", "checkpoint"):
        with compress(model, W4, keep_originals=keep):
            pass
    assert count == len(list(Path("/proc/self/fd").iterdir()))
