"""The quantized KV cache: its values against plain loops, what the layers read of it, families, padding and pruners."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from qapbench import RunSpec, UserError, compress
from qapbench.methods.kv import KVFormat, KVSide
from qapbench.models.family import families
from qapbench.quantize.kv_cache import QuantizedLayer, QuantizedWindow
from qapbench.quantize.measured_bits import most_levels
from qapbench.quantize.receipts import KVUse
from qapbench.receipt import NotQuantizedError
from qapbench.records.store import answers_of
from qapbench.running import run

pytestmark = pytest.mark.usefixtures("one_thread")
KIVI = {"keys": {"bits": 2, "group_size": 8}, "values": {"bits": 2, "group_size": 8}, "residual": 16}
FP8 = {"keys": {"format": "fp8", "granularity": "tensor"}, "values": {"format": "fp8"}, "residual": 0}


def spec_of(kv: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", "kv": kv}, **more}


def by_loops(x: Tensor, bits: int, group: int, over: int) -> Tensor:
    """[H, n, D], groups along `over` (1: tokens, 2: channels), each operation rounded to x's dtype by NumPy."""
    kind = {torch.float32: np.float32, torch.float16: np.float16}[x.dtype]
    out = x.numpy().copy()
    rows = np.moveaxis(out, over, -1)
    for place in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], group):
            part = rows[place][start : start + group]
            low = part.min()
            step = kind((part.max() - low) / kind(2**bits - 1))
            levels = [kind(round(float(kind(kind(v - low) / step)))) if step else kind(0) for v in part]
            rows[place][start : start + group] = [kind(kind(level * step) + low) for level in levels]
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_match_loops(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(bits)).to(dtype)
    x[0, :8, 3], x[1, 5] = 1.5, -2.0  # groups of one value are exact
    keys, values = KVSide(bits=bits, granularity="channel", group_size=8), KVSide(bits=bits, granularity="token")
    assert torch.equal(keys(x), by_loops(x, bits, 8, 1))
    assert torch.equal(values(x), by_loops(x, bits, 32, 2))
    x[0, 0, 0] = torch.nan
    assert keys(x)[0, :8, 0].isnan().all()
    assert values(x)[0, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_widest_ranges_stay_finite(dtype: torch.dtype) -> None:
    """The width of such a range is infinite in the cache's dtype, in which each step is rounded."""
    largest = torch.finfo(dtype).max
    x = torch.rand(2, 8, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    for wide in (x.sign() * largest, 2 * (largest * x)):
        wide[0, :, 0] = 1.0
        for bits, granularity in itertools.product((1, 2, 4, 8), ("channel", "token")):
            out = KVSide(bits=bits, granularity=granularity, group_size=8)(wide.to(dtype))
            assert torch.isfinite(out).all()
            bound = 1.01 * largest / (2**bits - 1) + largest / 64
            assert ((out.double() - wide.to(dtype).double()).abs() <= bound).all()
            if granularity == "channel":
                assert (out[0, :, 0] == 1).all()


def test_levels_are_those_of_the_group_with_most() -> None:
    """Of each row the last group is short, and the first one has the most values."""
    x = torch.tensor([[[0.0, 1, 2, 3, 4, 5, 6, 7, 1, 1, 1]]])
    assert most_levels(x, KVSide(bits=4, granularity="token", group_size=8)) == 8
    assert most_levels(x.mT, KVSide(bits=4, granularity="channel", group_size=8)) == 8
    assert most_levels(x[..., :0], KVSide(bits=4, granularity="token")) == 0


def cached(kv: dict[str, Any], length: int = 0, x: Tensor | None = None) -> QuantizedLayer:
    layer = QuantizedLayer(KVFormat.model_validate(kv), lambda: None, 0, KVUse(format="", bits_asked=(8, 8)))
    if x is not None:
        layer.update(x[:, :, :length], -x[:, :, :length])
    return layer


def test_what_is_read_and_when() -> None:
    """Keys wait until a residual is full, values slide; a new token reads what was stored before it (KIVI)."""
    x = torch.randn(2, 3, 60, 8, generator=torch.Generator().manual_seed(0))
    layer = cached({**KIVI, "prefill": "exact"})
    keys, values = layer.update(x[:, :, :20], -x[:, :, :20])
    assert torch.equal(keys, x[:, :, :20])
    assert torch.equal(values, -x[:, :, :20])
    for place in range(20, 60):
        keys, values = layer.update(x[:, :, place : place + 1], -x[:, :, place : place + 1])
        whole, slid = place // 16 * 16, place - 16
        wanted = torch.cat(
            [torch.stack([by_loops(row[:, :whole], 2, 8, 1) for row in x]), x[:, :, whole : place + 1]], 2
        )
        assert torch.equal(keys, wanted)
        wanted = torch.cat(
            [torch.stack([by_loops(-row[:, :slid], 2, 8, 2) for row in x]), -x[:, :, slid : place + 1]], 2
        )
        assert torch.equal(values, wanted)
    layer.crop(-25)
    keys, values = layer.update(x[:, :, 35:36], -x[:, :, 35:36])
    other = cached(KIVI, 35, x)
    assert all(map(torch.equal, (keys, values), other.update(x[:, :, 35:36], -x[:, :, 35:36])))


def test_rows_follow_beams() -> None:
    x = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(1))
    for kv in (KIVI, FP8):
        layer, order = cached(kv, 39, x), torch.tensor([1, 0])
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0, 2]))
        layer.reorder_cache(order)
        swapped = cached(kv, 39, x[order])
        new = x[order, :, 39:]
        assert all(map(torch.equal, layer.update(new, -new), swapped.update(new, -new)))


def test_fp8_keeps_the_scale_of_the_first_call() -> None:
    x = torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(2))
    x[:, :, 11] *= 100
    layer = cached(FP8, 10, x)
    keys, values = layer.update(x[:, :, 10:], -x[:, :, 10:])
    scale = x[:, :, :10].abs().amax() / 448
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(keys, codes.float() * scale)
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    assert torch.equal(values, (-x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)


@pytest.mark.parametrize("family", families.names())
def test_every_family_reads_it(family: str) -> None:
    torch.manual_seed(0)
    model, inputs = families.create(family).tiny()
    with torch.no_grad():
        plain = model(**inputs).logits
        for kv, changes in (
            (KIVI, True),
            (FP8, True),
            ({**KIVI, "residual": 4096}, False),
            ({**KIVI, "prefill": "exact"}, False),
        ):
            with compress(model, spec_of(kv)) as receipt:
                assert torch.equal(model(**inputs).logits, plain) != changes
            receipt.check()
            assert receipt.kv is not None
            assert receipt.kv.tokens == inputs["input_ids"].shape[1]
            assert receipt.kv.token_bits == receipt.kv.tokens * receipt.kv.bits
            assert (receipt.kv.bits < 32) == (kv["residual"] != 4096)
        with compress(model, spec_of({**KIVI, "prefill": "exact"})):
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, use_cache=True)
        assert torch.equal(model(**inputs).logits, plain)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_window_reads_the_newest_tokens() -> None:
    """What a layer without a window reads, cut to the window; masks of the size that transformers expects."""
    x = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(3))
    use = KVUse(format="", bits_asked=(2, 2))
    whole, plain = cached(KIVI), DynamicSlidingWindowLayer(sliding_window=12)
    window = QuantizedWindow(KVFormat.model_validate(KIVI), lambda: None, 0, use, 12)
    start = 0
    for count in (7, 1, 20, 1, 1, 3, 1):
        new, start = x[:, :, start : start + count], start + count
        assert window.get_mask_sizes(count) == plain.get_mask_sizes(count)
        wide, narrow = whole.update(new, -new), window.update(new, -new)
        length = plain.update(new, -new)[0].shape[2]
        assert all(torch.equal(one[:, :, -length:], other) for one, other in zip(wide, narrow, strict=True))
        assert window.get_seq_length() == plain.get_seq_length() == start
    assert use.tokens == 7
    window.crop(-10)
    assert window.get_seq_length() == 24


def test_a_window_shorter_than_the_prompt() -> None:
    """Gemma 3 with a window of 8: without rounding it generates as it does without `kv`, with rounding otherwise."""
    torch.manual_seed(0)
    model, inputs = families.create("gemma3").tiny()
    model.config.text_config.sliding_window = 8
    for layer in model.model.language_model.layers:
        if layer.self_attn.is_sliding:
            layer.self_attn.sliding_window = 8
    more = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        plain = torch.stack(model.generate(**inputs, **more, **kept).logits)
        for residual, same in ((4096, True), (16, False)):
            with compress(model, spec_of({**KIVI, "residual": residual})) as receipt:
                found = torch.stack(model.generate(**inputs, **more, **kept).logits)
            assert torch.equal(found, plain) == same
            assert receipt.kv is not None
            assert receipt.kv.tokens == (3 * 7 + length) / 4, "three of four layers hold seven tokens"


def test_generated_tokens_read_what_is_stored(model: Any, one: dict[str, Any]) -> None:
    """The second step's logits are those over a cache that was rounded by hand after an exact prompt."""
    kv = {**KIVI, "residual": 8, "prefill": "exact"}
    more = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        with compress(model, spec_of(kv)):
            out = model.generate(**one, **more, output_logits=True, return_dict_in_generate=True)
        first = model(**one, use_cache=True)
        cache, length = first.past_key_values, one["input_ids"].shape[1]
        for layer in cache.layers:
            whole = length // 8 * 8
            layer.keys[0, :, :whole] = by_loops(layer.keys[0, :, :whole], 2, 8, 1)
            layer.values[0, :, : length - 8] = by_loops(layer.values[0, :, : length - 8], 2, 8, 2)
        token = out.sequences[:, length : length + 1]
        second = model(input_ids=token, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(out.logits[0], first.logits[:, -1], rtol=0, atol=1e-6)
    torch.testing.assert_close(out.logits[1], second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv", [KIVI, FP8], ids=["kivi", "fp8"])
@pytest.mark.parametrize("prune", [None, "cdpruner", "fastv"])
def test_padding_and_neighbours_count_for_nothing(
    kv: dict[str, Any], prune: str | None, model: Any, three: dict[str, Any], processor: Any
) -> None:
    """Each row of a padded batch generates from the logits that it has alone."""
    spec = spec_of(kv, **({"prune": {"method": prune, "keep": 5}} if prune else {}))
    more = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), compress(model, spec, processor) as receipt:
        together = model.generate(**three, **more, **kept)
        pictures = iter(three["pixel_values"])
        for row, (ids, mask) in enumerate(zip(three["input_ids"], three["attention_mask"], strict=True)):
            alone = {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
            if (ids == model.config.image_token_id).any():
                alone["pixel_values"] = next(pictures)[None]
            own = model.generate(**alone, **more, **kept)
            for step in range(3):
                torch.testing.assert_close(together.logits[step][row], own.logits[step][0], rtol=0, atol=2e-5)
    receipt.check()


@pytest.mark.parametrize("prune", [None, "cdpruner", "fastv"])
def test_generation_has_a_cache_to_quantize(prune: str | None, model: Any, one: dict[str, Any]) -> None:
    """Without one, or with drafts behind the prompt, other tokens would be quantized; a checkpoint's wish is none."""
    more = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), compress(model, spec_of(FP8, **({"prune": {"method": prune, "keep": 5}} if prune else {}))):
        cached = model.generate(**one, **more, **kept)
        model.generation_config.use_cache = False
        try:
            without = model.generate(**one, **more, **kept)
        finally:
            model.generation_config.use_cache = True
        assert torch.equal(torch.stack(without.logits), torch.stack(cached.logits))
        for asked in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
            with pytest.raises(UserError, match=r"use_cache: cannot be false with quantize\.kv"):
                model.generate(**one, **{**more, **asked})
        with pytest.raises(UserError, match=r"prompt_lookup_num_tokens: cannot be combined with quantize\.kv"):
            model.generate(**one, **more, prompt_lookup_num_tokens=2)
    assert "generate" not in vars(model)


def test_runs_do_not_depend_on_the_batch(llava_folder: Path, tmp_path: Path) -> None:
    task = {"name": "diagramqa", "limit": 4}
    prunes = (None, {"method": "fastv", "keep": 4}, {"method": "cdpruner", "keep": 4})
    quantize = {"method": "rtn", "kv": KIVI}
    specs = [
        RunSpec.parse({"model": str(llava_folder), "task": task, "prune": prune, "quantize": quantize})
        for prune in prunes
    ]
    found = []
    for size in (1, 3):
        records = run(specs, tmp_path / str(size), batch_size=size, device="cpu", progress=False)
        found.append([answers_of(tmp_path / str(size) / record.run_id).read() for record in records])
    assert found[0] == found[1]
    assert [record.receipt.kv is not None for record in records] == [True] * 3
    dense, fastv, cdpruner = (record.receipt.kv.tokens for record in records if record.receipt.kv)
    assert cdpruner < fastv < dense
    assert "KV2: " in records[0].receipt.summary


def test_as_data_and_mistakes(model: Any, one: dict[str, Any]) -> None:
    plain = {"method": "rtn", "weights": {"bits": 4}}
    spec = RunSpec.parse({"model": "m", "task": "t", "quantize": {**plain, "kv": KIVI}})
    assert spec.quantize is not None
    assert spec.quantize.label == "rtn W4A16 KV2"
    assert RunSpec.parse(spec.model_dump()) == spec
    without = RunSpec.parse({"model": "m", "task": "t", "quantize": plain})
    assert "kv" not in without.model_dump()["quantize"]
    for kv, message in (
        ({}, "give `keys`, `values` or both"),
        ({"keys": {"bits": 2}, "residual": 100}, "`residual` is 100, no multiple of the 32 tokens"),
        ({"keys": {"bits": 2}, "residual": 0}, "leaves no group of keys"),
        ({"values": {"bits": 2, "granularity": "tensor"}}, "is that of `format: fp8`"),
        ({"values": {"format": "fp8", "bits": 4}}, "`bits` of fp8 is 8"),
    ):
        with pytest.raises(ValidationError, match=message):
            KVFormat.model_validate(kv)
    with torch.no_grad(), compress(model, spec_of(KIVI)) as receipt:
        with pytest.raises(UserError, match=r"quantize\.kv: the layers need a dynamic KV cache"):
            model.generate(**one, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(NotQuantizedError, match="KV2: no layer has read the KV cache"):
            receipt.check()
