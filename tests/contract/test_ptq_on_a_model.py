"""What every PTQ method owes to a whole model that it is put on, and taken off, by `compress`."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import THREE, batch_of, picture
from test_ptq_contract import FORMATS, QUICK, each_ptq, made_by, method
from torch import Tensor, nn

from qapbench import Block, CalibrationSamples, LinearPlan, RunSpec, Tokens, UserError, compress, ptqs
from qapbench.models import family_of
from qapbench.models.loading import load_model
from qapbench.quantize.install import installed
from qapbench.receipt import CalibrationUse

SEVERAL = 3
calibrating = pytest.mark.parametrize("name", [name for name in ptqs.names() if ptqs.create(name).calibrates])


def labelled(inputs: dict[str, Any]) -> dict[str, Any]:
    """The last two tokens are the answer."""
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return {**inputs, "labels": labels}


def samples_of(processor: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
    """A calibration sample of each text, whose last two tokens are the answer."""
    return [
        labelled(batch_of(processor, [text], [picture(index)] if "<image>" in text else []))
        for index, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def samples(processor: Any) -> list[dict[str, Any]]:
    return samples_of(processor, (THREE * SEVERAL)[:SEVERAL])


def quantize(name: str, **more: Any) -> dict[str, Any]:
    weights, activations = (format.model_dump() for format in made_by(name))
    asked = {"method": {name: QUICK.get(name, {})}, "weights": weights, "activations": activations}
    return {"quantize": {**asked, **more}}


def logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@each_ptq
def test_quantized_while_open_and_restored_to_the_bit(name: str, model: Any, samples: Any, asked: Any) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = {key: id(value) for key, value in model.named_parameters()}
    plain, hooked = logits(model, asked), hooks(model)
    outputs = []
    for _ in range(2):
        with compress(model, quantize(name), calibration=samples) as receipt:
            outputs.append(logits(model, asked))
        receipt.check()
    assert torch.equal(*outputs), "another result the second time"
    assert torch.isfinite(outputs[0]).all()
    assert not torch.equal(outputs[0], plain)
    assert (outputs[0] - plain).norm() < plain.norm(), "nothing of the model is left"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert tensors == {key: id(value) for key, value in model.named_parameters()}
    assert hooks(model) == hooked
    assert torch.equal(logits(model, asked), plain)
    assert not receipt.fallbacks
    assert (receipt.calibration is not None) == ptqs.create(name).calibrates


@each_ptq
def test_packed_weights_give_the_same_logits(name: str, model: Any, samples: Any, asked: Any) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with compress(model, quantize(name), calibration=samples) as unpacked:
        wanted = logits(model, asked)
    with compress(model, quantize(name, storage="packed"), calibration=samples) as receipt:
        assert torch.equal(logits(model, asked), wanted)
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.isnan().all()]
        assert len(weights) == len(receipt.linears), "a weight is unpacked"
        assert {weight.untyped_storage().nbytes() for weight in weights} == {4}
        with torch.inference_mode():
            assert torch.equal(model(**asked).logits, wanted)
    receipt.check()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    bits = made_by(name)[0].bits
    for line, plain in zip(receipt.linears, unpacked.linears, strict=True):
        assert (line.weight_bits, line.weight_levels) == (plain.weight_bits, plain.weight_levels)
        assert plain.stored_bytes is None
        assert bits < (line.stored_bits or 0) < 32
        assert not set(plain.model_dump()) & {"stored_bits", "stored_bytes"}
    assert "stored packed: " in receipt.summary()
    assert "stored packed" not in unpacked.summary()


@each_ptq
def test_weights_that_are_still_in_their_file_are_packed_alike(
    name: str, folder: Path, model: Any, samples: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than one block of the decoder is in memory at any time, and afterwards none is."""
    spec = RunSpec.parse({"model": str(folder), "task": "none", **quantize(name, storage="packed")})
    left, _ = load_model(spec, torch.device("cpu"))
    linears = family_of(left).linears(["language"])

    def in_memory() -> int:
        return sum(linear.weight.untyped_storage().nbytes() > 4 for linear in linears.values())

    counts, forward = [in_memory()], Block.forward

    def counted(self: Block, *args: Any) -> Tensor:
        counts.append(in_memory())
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", counted)
    with compress(left, spec, calibration=samples) as receipt:
        counts.append(in_memory())
        found = logits(left, asked)
    monkeypatch.undo()
    with compress(model, quantize(name, storage="packed"), calibration=samples) as wanted:
        assert torch.equal(found, logits(model, asked))
    timed = {"calibration"}
    assert receipt.model_dump(exclude=timed) == wanted.model_dump(exclude=timed)
    assert (counts[0], counts[-1], in_memory()) == (0, 0, 0)
    assert max(counts) <= len(linears) // 2


@each_ptq
def test_transforms_alone_change_nothing(name: str, model: Any, samples: Any, asked: Any) -> None:
    """Rotated, scaled or shifted, but not rounded: the function is that of the model."""
    linears = {key: m for key, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model." in key}
    plans = method(name).prepare(model, linears, *made_by(name), samples)
    plain = logits(model, asked)
    with contextlib.ExitStack() as stack:
        for key, plan in plans.items():
            stack.enter_context(installed(linears[key], LinearPlan(transform=plan.transform)))
        changed = logits(model, asked)
    torch.testing.assert_close(changed, plain, rtol=1e-3, atol=1e-4)


@each_ptq
def test_padding_and_neighbours_do_not_count(name: str, model: Any, samples: Any) -> None:
    """A sample alone, and behind padding full of large values beside two others: the same quantized input."""
    linears = {key: m for key, m in model.named_modules() if isinstance(m, nn.Linear) and "layers.0.mlp" in key}
    linears = {key: linear for key, linear in linears.items() if "language_model." in key}
    plans = method(name).prepare(model, linears, *made_by(name), samples)
    draw = torch.Generator().manual_seed(5)
    lengths, longest = (7, 4, 9), 9
    valid = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)
    vision = valid & (torch.arange(longest) % 3 == 0)
    for key, plan in plans.items():
        x = 3 * torch.randn(3, longest, linears[key].in_features, generator=draw)
        x[~valid] *= 100
        batch = plan.new_input(x, Tokens(vision, valid))
        for row in range(3):
            stays = valid[row]
            alone = Tokens(vision[row : row + 1, stays], valid[row : row + 1, stays])
            assert torch.equal(batch[row, stays], plan.new_input(x[row : row + 1, stays], alone)[0])


@each_ptq
def test_wrong_formats_are_refused_readably(name: str, model: Any, samples: Any) -> None:
    for format in FORMATS:
        asks = {
            "quantize": {
                "method": {name: QUICK.get(name, {})},
                "weights": format.model_dump(),
                "activations": format.model_dump(),
            }
        }
        try:
            ptqs.create(name).check(format, format)
        except UserError:
            with pytest.raises(UserError, match=r"weights|activations"), compress(model, asks, calibration=samples):
                pass
        else:
            with compress(model, asks, calibration=samples[:1]):
                pass


@calibrating
def test_without_samples_it_says_so(name: str, model: Any) -> None:
    with pytest.raises(UserError, match="calibration"), compress(model, quantize(name)):
        pass


@calibrating
def test_what_no_sample_reaches_falls_back_visibly(name: str, model: Any, samples: Any, asked: Any) -> None:
    texts = [sample for sample in samples if "pixel_values" not in sample]
    with compress(model, quantize(name, scope=["projector", "language"]), calibration=texts) as receipt:
        logits(model, asked)
    receipt.check()
    left = [line.name for line in receipt.linears if not line.planned]
    assert left
    assert all("projector" in key for key in left)
    assert all(any(fallback.startswith(key) for fallback in receipt.fallbacks) for key in left)


@calibrating
def test_pruned_calibration_sees_the_tokens_that_stay(name: str, model: Any, samples: Any, asked: Any) -> None:
    spec = {**quantize(name, calibration={"pruned": True}), "prune": {"method": "random", "keep": 4}}
    with compress(model, spec, calibration=samples) as receipt:
        out = logits(model, asked)
    receipt.check()
    assert receipt.images == 2, "what calibration pruned is not counted"
    assert torch.isfinite(out).all()


@calibrating
def test_a_kept_result_is_the_result(name: str, model: Any, samples: Any, asked: Any, tmp_path: Path) -> None:
    kept = CalibrationSamples(samples, cache=tmp_path, fingerprints={"model": "one"})

    def outcome(source: CalibrationSamples) -> tuple[Tensor, CalibrationUse]:
        with compress(model, quantize(name), calibration=source) as receipt:
            assert receipt.calibration is not None
            return logits(model, asked), receipt.calibration

    fresh, first = outcome(kept)
    read, second = outcome(kept)
    assert (first.reused, second.reused) == (False, True)
    assert torch.equal(fresh, read)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        again, third = outcome(kept)
        assert not third.reused
        assert third.made_again is not None
        assert file.name in third.made_again
        assert torch.equal(again, fresh)
        assert file.read_bytes() == whole
    for other in (
        CalibrationSamples(samples[1:], cache=tmp_path, fingerprints={"model": "one"}),
        CalibrationSamples(samples, cache=tmp_path, fingerprints={"model": "two"}),
    ):
        assert not outcome(other)[1].reused
