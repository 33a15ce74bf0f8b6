"""Activations that depend on their tokens are told those that the layer holds: padding, images, and behind a drop."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import THREE, TOKENS, batch_of, picture, save_llava
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.cost import drops_fit
from qapbench import (
    PTQ,
    CalibrationSamples,
    DecoderPruner,
    Format,
    LinearPlan,
    TokenActivation,
    Tokens,
    compress,
    pruners,
    ptq,
    ptqs,
)
from qapbench.models.family import families, family_of
from qapbench.quantize.call_tokens import tokens_of, watch_of

pytestmark = pytest.mark.usefixtures("one_thread")

INSIDE = [entry.name for entry in pruners if issubclass(entry.target, DecoderPruner)]  # type: ignore[arg-type]
KEEP = 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # quantization computes in float32, whatever the model's dtype
TENSOR = {"bits": 8, "symmetric": True, "granularity": "tensor"}
INT8 = {"bits": 8, "symmetric": True}
METHODS: dict[str, dict[str, Any]] = {
    "tensor-wide": {"method": "rtn", "activations": TENSOR},
    "outliers": {"method": {"llm_int8": {"threshold": 1.0}}, "weights": INT8, "activations": INT8},
    "by modality": {
        "method": {"mquant": {"rounding": "rtn"}},
        "weights": {"bits": 8, "symmetric": True},
        "activations": TENSOR,
    },
    "running ranges": {"method": "qvlm"},
}
SEEN: list[tuple[Tensor, Tokens | None]] = []


class Watching(TokenActivation):
    """Notes the inputs and what it is told of them."""

    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        SEEN.append((x.detach().clone(), tokens))
        return x


@pytest.fixture
def noting() -> Iterator[str]:
    """A method that quantizes nothing and notes what its activations are told."""

    @ptq("noting")
    @dataclass(frozen=True)
    class Noting(PTQ):
        """Notes."""

        def prepare(
            self,
            model: nn.Module,
            linears: Mapping[str, nn.Linear],
            weights: Format | None,
            activations: Format | None,
            calibration: Any = None,
        ) -> dict[str, LinearPlan]:
            return {name: LinearPlan(activation=Watching()) for name in linears}

    SEEN.clear()
    yield "noting"
    del ptqs._entries["noting"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Any, Any]:
    """A LLaVA in float64, so that rounding before quantization moves no level, and its processor."""
    folder = save_llava(tmp_path_factory.mktemp("deep"), layers=4)
    return AutoModelForImageTextToText.from_pretrained(folder).double().eval(), AutoProcessor.from_pretrained(folder)


def alone(processor: Any, row: int) -> dict[str, Any]:
    return batch_of(processor, [THREE[row]], {0: [picture(1)], 1: [], 2: [picture(2)]}[row])


@pytest.mark.parametrize("quantizer", METHODS)
def test_a_padded_batch_gives_each_row_what_it_gets_alone(
    quantizer: str, deep: tuple[Any, Any], tmp_path: Path
) -> None:
    """Padded on either side, dense, pruned in front of the decoder and inside it."""
    model, processor = deep
    left = batch_of(processor, THREE, [picture(1), picture(2)])
    mask = left["attention_mask"]
    lengths = mask.sum(dim=1).tolist()
    rolled = [row.roll(length) for row, length in zip(left["input_ids"], lengths, strict=True)]
    right = {**left, "input_ids": torch.stack(rolled), "attention_mask": mask.flip(-1)}
    calibration = CalibrationSamples([alone(processor, row) for row in range(3)], cache=tmp_path)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    for method in (None, "random", *INSIDE):
        spec: dict[str, Any] = {"quantize": METHODS[quantizer]}
        if method is not None:
            spec["prune"] = {"method": method, "keep": KEEP}
        with torch.no_grad(), compress(model, spec, calibration=calibration) as receipt:
            padded_left, padded_right = model(**left).logits, model(**right).logits
            written = model.generate(**left, **options)
            if method is None:  # there, `generate` hands on a mask of queries and keys
                assert torch.equal(model.generate(**left, **options, cache_implementation="static"), written)
            for row in range(3):
                own = alone(processor, row)
                wanted = model(**own).logits[0]
                end = len(wanted) - 1  # in front of the decoder, pruning makes the row shorter
                torch.testing.assert_close(padded_left[row, -1], wanted[-1], **CLOSE)
                torch.testing.assert_close(padded_right[row, end], wanted[-1], **CLOSE)
                assert torch.equal(written[row, -3:], model.generate(**own, **options)[0, -3:]), method
        receipt.check()


class Held:
    """A cache that holds some tokens."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_seq_length(self) -> int:
        return self.count


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("room", [0, 4])
@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_found_in_a_mask_of_queries_and_keys(before: int, room: int, additive: bool) -> None:
    """On either side, whatever the cache holds before and has room for behind; the same as from a mask of tokens."""
    ids = torch.tensor([[9, 9, 7, 5], [9, 7, 5, 6], [7, 5, 6, 9]])
    length = ids.shape[1]
    present = ids != 9 if before == 0 else torch.ones_like(ids, dtype=torch.bool)
    whole = torch.cat([torch.ones(3, before, dtype=torch.bool), present], dim=1)
    whole[0, : before // 2] = False  # padding that lies in the cache
    causal = torch.ones(length, before + length, dtype=torch.bool).tril(before)
    both = torch.nn.functional.pad(causal & whole[:, None, None], (0, room))  # [B, 1, L, K]
    mask = torch.where(both, 0.0, torch.finfo(torch.float32).min) if additive else both
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": Held(before)}
    for said in (mask, {"full_attention": mask}, whole, torch.nn.functional.pad(whole, (0, room)), present):
        found = tokens_of(inputs | {"attention_mask": said}, image_token=7)
        assert found is not None
        assert torch.equal(found.valid, present)
        assert torch.equal(found.vision, ids == 7)
        assert found.prefill is (before == 0)
    one_row = tokens_of({"input_ids": ids, "attention_mask": causal[None, None, :, before:]}, image_token=7)
    assert one_row is not None
    assert one_row.valid.all()
    assert one_row.valid.shape == ids.shape


@pytest.mark.parametrize("model_type", families.names())
@pytest.mark.parametrize("method", [None, *INSIDE])
def test_what_a_layer_is_told_is_what_it_holds(noting: str, model_type: str, method: str | None) -> None:
    """Every family: as many tokens as the input has, the image's among them as many as the receipt counts."""
    torch.manual_seed(0)
    model, inputs = families.create(model_type).tiny()
    ids = inputs["input_ids"]
    spec: dict[str, Any] = {"quantize": {"method": noting, "activations": {"bits": 8}}}
    if method is not None:
        spec["prune"] = {"method": method, "keep": KEEP}
        if not drops_fit(family_of(model), pruners.create(method), KEEP):
            return
    with torch.no_grad(), compress(model, spec) as receipt:
        model(**inputs)
    placeholders = int((ids == family_of(model).image_token).sum())
    separators = placeholders - receipt.available if method else 0
    told = [tokens for _, tokens in SEEN]
    assert all(tokens is not None for tokens in told)
    for x, tokens in SEEN:
        assert tokens is not None
        assert tokens.vision.shape == tokens.valid.shape == x.shape[:2]
        assert tokens.valid.all()
        assert tokens.prefill
    counts = [int(tokens.vision.sum()) for tokens in told if tokens is not None]
    text = ids.shape[1] - placeholders
    assert {x.shape[1] - count for (x, _), count in zip(SEEN, counts, strict=True)} == {text}
    assert counts[0] == (receipt.layers[0] + separators if method else placeholders)
    if method and pruners.create(method).front is None:
        assert counts[0] == placeholders
    assert counts[-1] == (receipt.layers[-1] + separators if method else placeholders)
    assert watch_of(family_of(model).core) is None


@pytest.mark.parametrize("method", INSIDE)
def test_behind_a_drop_the_range_is_that_of_what_is_there(method: str, deep: tuple[Any, Any]) -> None:
    """The last layer's input, quantized over its own tokens: one level grid from their range, and no other."""
    model, processor = deep
    inputs = batch_of(processor, THREE, [picture(1), picture(2)])
    given: list[Tensor] = []
    made: list[Tensor] = []
    projection = model.model.language_model.layers[-1].mlp.gate_proj
    format = Format(**TENSOR)
    spec = {"quantize": {"method": "rtn", "activations": TENSOR}, "prune": {"method": method, "keep": KEEP}}
    before = projection.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    try:
        with torch.no_grad(), compress(model, spec):
            after = projection.register_forward_pre_hook(lambda _, args: made.append(args[0].clone()))
            model(**inputs)
            after.remove()
    finally:
        before.remove()
    gone = TOKENS - pruners.create(method).stages(TOKENS, KEEP, 4)[-1].keep  # type: ignore[attr-defined]
    lengths = (inputs["attention_mask"].sum(dim=1) - torch.tensor([gone, 0, gone])).tolist()
    (x,), (quantized,) = given, made
    assert x.shape[1] == max(lengths)
    for row, length in enumerate(lengths):  # rows are padded on the left behind a drop
        assert torch.equal(quantized[row, -length:], format(x[row : row + 1, -length:])[0])


def test_nested_contexts_share_a_watch_and_an_error_ends_the_call(deep: tuple[Any, Any]) -> None:
    model, processor = deep
    spec = {"quantize": {"method": "rtn", "activations": TENSOR}}
    core = family_of(model).core
    with compress(model, spec), torch.no_grad():
        watch = watch_of(core)
        assert watch is not None
        with compress(model, spec):
            assert watch_of(core) is watch
        assert watch_of(core) is watch

        def fail(module: nn.Module, args: Any) -> None:
            assert watch() is not None
            raise ZeroDivisionError

        handle = model.model.language_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**alone(processor, 0))
        handle.remove()
        assert watch() is None
    assert watch_of(core) is None


def test_only_what_spans_tokens_asks_for_them() -> None:
    asks: Callable[[Any], bool] = lambda activation: LinearPlan(activation=activation).needs_tokens  # noqa: E731
    assert asks(Format(bits=8, granularity="tensor"))
    assert asks(Format(bits=8, granularity="channel"))
    assert asks(Watching())
    assert not asks(Format(bits=8))
    assert not asks(None)
