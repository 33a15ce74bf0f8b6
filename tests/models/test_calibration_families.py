"""Calibration on a small random model of every family: blocks see what a forward pass sees."""

from typing import Any

import pytest
import torch

from qapbench import Block, CalibrationResult, CalibrationSamples, Gram, UserError, compress
from qapbench.models.family import families, family_of
from qapbench.quantize.calibration import Calibration

SCOPE = ["language", "projector", "vision"]
each_family = pytest.mark.parametrize("model_type", families.names())


def tiny(model_type: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = families.create(model_type).tiny()
    return model.eval().requires_grad_(False), inputs


def text_of(inputs: dict[str, Any], image_token: int) -> dict[str, Any]:
    ids = inputs["input_ids"]
    ids = ids[:, ids[0] != image_token]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@each_family
def test_blocks_see_what_a_forward_pass_sees(model_type: str) -> None:
    model, inputs = tiny(model_type)
    family = family_of(model)
    linears = family.linears(SCOPE)
    samples = [inputs, text_of(inputs, family.image_token)]
    calibration = Calibration(model, CalibrationSamples(samples), family)
    whole = calibration.observe(linears, lambda _: Gram())
    order: list[str] = []

    def find(block: Block) -> CalibrationResult:
        order.append(block.name)
        return {name: {"gram": gram.value} for name, gram in block.observe(lambda _: Gram()).items()}

    found = calibration.block_by_block(linears, find)
    assert set(found) == set(whole)
    assert len(order) > 3
    for name, gram in whole.items():
        torch.testing.assert_close(found[name]["gram"], gram.value, rtol=1e-4, atol=1e-4)


@each_family
def test_no_later_block_is_computed_while_inputs_are_captured(model_type: str) -> None:
    """A block of the decoder runs once per sample, to hand its outputs on, and the first one once more."""
    model, inputs = tiny(model_type)
    family = family_of(model)
    blocks = family.blocks("language")
    calls = [0] * len(blocks)

    def count(index: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            calls[index] += 1

        return hook

    for index, block in enumerate(blocks):
        next(inner for inner in block.modules() if isinstance(inner, torch.nn.Linear)).register_forward_pre_hook(
            count(index)
        )
    samples = CalibrationSamples([inputs, text_of(inputs, family.image_token)])
    Calibration(model, samples, family).block_by_block(family.linears(["language"]), lambda block: {})
    assert calls == [4, *[2] * (len(blocks) - 2), 0]
    assert not any("forward" in block.__dict__ for block in blocks)


@each_family
def test_visual_tokens_are_told_from_text(model_type: str) -> None:
    model, inputs = tiny(model_type)
    family = family_of(model)
    linears = family.linears(SCOPE)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears}

    def make(linear: Any) -> Any:
        name = next(key for key, value in linears.items() if value is linear)
        return lambda x, vision: seen[name].append(vision)

    Calibration(model, CalibrationSamples([inputs]), family).observe(linears, make)
    wanted = (inputs["input_ids"] == family.image_token).flatten()
    valid = inputs["attention_mask"].bool().flatten() if "attention_mask" in inputs else torch.ones_like(wanted)
    language = family.linears(["language"])
    for name, calls in seen.items():
        for vision in calls:
            assert torch.equal(vision, wanted[valid]) if name in language else vision.all()


@each_family
def test_gptq_on_every_part(model_type: str) -> None:
    model, inputs = tiny(model_type)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    format = {"bits": 4, "group_size": 16}
    spec = {"method": "gptq", "weights": format, "activations": {"bits": 8}, "scope": SCOPE}
    with compress(model, {"quantize": spec}, calibration=[inputs]) as receipt, torch.no_grad():
        out = model(**inputs).logits
    receipt.check()
    assert torch.isfinite(out).all()
    assert all(line.planned for line in receipt.linears if line.calls)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@each_family
def test_answers_are_told_from_questions(model_type: str) -> None:
    """In every block of the language model, for samples with an image and without; nowhere else."""
    model, inputs = tiny(model_type)
    family = family_of(model)
    samples = [inputs, text_of(inputs, family.image_token)]
    for sample in samples:
        sample["labels"] = torch.full_like(sample["input_ids"], -100)
        sample["labels"][:, -2:] = sample["input_ids"][:, -2:]
    blocks = 0

    def find(block: Block) -> CalibrationResult:
        nonlocal blocks
        language = any(name in family.linears(["language"]) for name in block.linears)
        blocks += language
        for one, sample in zip(block.passes, samples, strict=False):
            if language:
                x = torch.zeros(*sample["input_ids"].shape, 1)
                assert torch.equal(one.answer(x), (sample["labels"] != -100).flatten())
            else:
                assert one.labelled is None
        return {}

    Calibration(model, CalibrationSamples(samples), family).block_by_block(family.linears(SCOPE), find)
    assert blocks


def test_a_model_on_mps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("llava")
    monkeypatch.setattr(type(model), "device", torch.device("mps"))
    with pytest.raises(UserError, match=r"^device: mps has no float64"), compress(model, {}):
        pass
