"""What every PTQ method makes of linears with formats of their own (`quantize.overrides`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import THREE
from test_ptq_contract import each_ptq, made_by
from test_ptq_on_a_model import logits, quantize, samples_of
from torch import nn

from qapbench import CalibrationSamples, UserError, compress, ptqs
from qapbench.methods.formats import by_formats

WIDE = 4096  # channels, more than any linear here has: one group a row, as without groups
SECOND = "layers.1.*"


@pytest.fixture(scope="module")
def samples(processor: Any) -> list[dict[str, Any]]:
    return samples_of(processor, THREE[:2])


def linears(model: nn.Module) -> Mapping[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model." in name}


@each_ptq
def test_linears_of_equal_formats_are_quantized_alike_whoever_names_them(
    name: str, model: Any, samples: Any, asked: Any
) -> None:
    """A group that is wider than a row is the row: another format, which the method goes through by itself."""
    both = {SECOND: None}
    wide = {**both, "down_proj": {"weights": {"group_size": WIDE}}, "q_proj": {"weights": {"group_size": WIDE}}}
    before = {key: linear.weight.clone() for key, linear in linears(model).items()}
    with compress(model, quantize(name, overrides=both), calibration=samples) as receipt:
        wanted = logits(model, asked)
        kept = [key for key, linear in linears(model).items() if torch.equal(linear.weight, before[key])]
    receipt.check()
    assert sorted(kept) == sorted(key for key in before if ".layers.1." in key)
    assert sorted(line.name for line in receipt.linears if not line.planned) == sorted(kept)
    assert receipt.fallbacks == []
    try:
        with compress(model, quantize(name, overrides=wide), calibration=samples) as receipt:
            assert torch.equal(logits(model, asked), wanted)
        receipt.check()
    except UserError as error:
        assert "by definition" in str(error)
        weights, _ = ptqs.create(name).formats or (None, None)
        assert weights is not None or name == "llm_int8"


def test_a_block_sees_the_blocks_before_it_in_their_own_formats(model: Any, samples: Any, asked: Any) -> None:
    """Both layers, with linears of two formats in each: as if there were one format."""
    outputs = []
    for overrides in (None, {"down_proj": {"weights": {"group_size": WIDE}}}):
        spec = {"method": "gptq", "weights": {"bits": 3}, "overrides": overrides}
        with compress(model, {"quantize": spec}, calibration=samples):
            outputs.append(logits(model, asked))
    assert torch.equal(*outputs)


def test_bits_are_counted_and_their_mean_is_said(model: Any, samples: Any, asked: Any) -> None:
    overrides = {"layers.0.*": None, "down_proj": {"weights": {"bits": 8}}}
    spec = {"method": "gptq", "weights": {"bits": 2}, "activations": {"bits": 8}, "overrides": overrides}
    with compress(model, {"quantize": spec}, calibration=samples) as receipt:
        logits(model, asked)
    receipt.check()
    want = {name: 16 if ".0." in name else 8 if "down_proj" in name else 2 for name in linears(model)}
    assert {line.name: min(line.weight_bits, 16) for line in receipt.linears} == want
    sizes = {name: linear.weight.numel() for name, linear in linears(model).items()}
    mean = sum(sizes[name] * bits for name, bits in want.items()) / sum(sizes.values())
    assert receipt.mean_weight_bits == pytest.approx(mean)
    assert f"W2A8 at 6, W32A32 at 7, W8A8 at 1 (mean {mean:.4g} bits per weight)" in receipt.summary()
    assert [line.asked for line in receipt.linears if "down_proj" in line.name] == [(16, 16), (8, 8)]
    worse = receipt.model_copy(deep=True)
    for line in worse.linears:
        line.weight_bits = 8
    with pytest.raises(Exception, match="1 of 7 linears in use show it"):
        worse.check()


def test_packed_weights_of_several_formats(model: Any, samples: Any, asked: Any) -> None:
    overrides = {"k_proj": {"weights": None}, "down_proj": {"weights": {"format": "fp8"}}, "layers.0.*": None}
    spec = {"method": "gptq", "weights": {"bits": 3, "group_size": 8}, "overrides": overrides}
    with compress(model, {"quantize": spec}, calibration=samples):
        wanted = logits(model, asked)
    with compress(model, {"quantize": {**spec, "storage": "packed"}}, calibration=samples) as receipt:
        assert torch.equal(logits(model, asked), wanted)
    receipt.check()
    stored = {line.name.rpartition(".")[2] for line in receipt.linears if line.stored_bytes}
    assert stored == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_kept_calibration_is_that_of_these_formats(model: Any, samples: Any, tmp_path: Path) -> None:
    source = CalibrationSamples(samples, cache=tmp_path, fingerprints={"model": "one"})
    keys = []
    for changed in ({}, {"down_proj": {"weights": {"bits": 8}}}, {"up_proj": {"weights": {"bits": 8}}}) * 2:
        overrides = {SECOND: None, "mlp.gate_proj": None, "self_attn.*": None, **changed}
        spec = {"method": "gptq", "weights": {"bits": 3}, "overrides": overrides}
        with compress(model, {"quantize": spec}, calibration=source) as receipt:
            assert receipt.calibration is not None
            keys.append((receipt.calibration.key, receipt.calibration.reused))
    assert [reused for _, reused in keys] == [False] * 3 + [True] * 3
    assert len({key for key, _ in keys}) == 3


def test_a_glob_that_fits_nothing_is_told_before_anything_is_done(model: Any, samples: Any) -> None:
    spec = {"method": "gptq", "weights": {"bits": 3}, "overrides": {"down_prj": None}}
    with (
        pytest.raises(UserError, match=r"overrides\.down_prj: fits no linear in scope; did you mean 'down_proj'\?"),
        compress(model, {"quantize": spec}, calibration=samples),
    ):
        pass


def test_linears_are_grouped_by_their_formats_in_order() -> None:
    formats = {"a": made_by("rtn"), "b": (None, None), "c": made_by("rtn")}
    assert list(by_formats("abc", formats).values()) == [["a", "c"], ["b"]]  # type: ignore[arg-type]
