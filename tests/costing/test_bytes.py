"""Bytes of quantized caches and weights, and prompts without an image."""

import pytest
import torch

from benchmarks.cost import PROMPTS, tiny_model
from qapbench import Format, Prompt, UserError, compress, cost
from qapbench.costing.bits import stored_bytes
from qapbench.models.family import families


@pytest.mark.parametrize("pruning", [{}, {"prune": {"method": "fastv", "keep": 5}}])
@pytest.mark.parametrize(
    "kv",
    [
        {"keys": {"bits": 2, "group_size": 4}, "values": {"bits": 4, "group_size": 4}, "residual": 8},
        {"keys": {"bits": 4, "group_size": 4}, "residual": 4},
    ],
)
def test_a_quantized_cache_has_the_bytes_that_the_receipt_measures(kv: dict, pruning: dict) -> None:
    model, inputs = tiny_model(families.create("llava"))
    spec = {"quantize": {"method": "rtn", "kv": kv}, **pruning}
    with torch.no_grad(), compress(model, spec) as receipt:
        model(**inputs, use_cache=True)
    assert receipt.kv
    layers, heads, width = 4, 2, 12
    measured = receipt.kv.token_bits * layers * 2 * heads * width / 8
    assert cost(model, spec, PROMPTS["llava"]).kv_bytes == pytest.approx(measured)


def test_stored_bytes_by_hand() -> None:
    assert stored_bytes(Format(bits=4, group_size=16, symmetric=True), 48, 32, 2) == 48 * 16 + 48 * 2 * 2
    assert stored_bytes(Format(bits=4, group_size=16), 48, 32, 2) == 48 * 16 + 48 * 2 * 2 + 2 * 24
    assert stored_bytes(Format(bits=3, symmetric=True), 48, 30, 2) == 48 * 12 + 48 * 2, "90 bits fill 12 bytes"
    assert stored_bytes(Format(bits=8, symmetric=True, granularity="tensor"), 48, 32, 4) == 48 * 32 + 4
    assert stored_bytes(Format.model_validate({"format": "mxfp4"}), 48, 64, 2) == 48 * 32 + 48 * 2
    assert stored_bytes(Format.model_validate({"format": "nvfp4"}), 48, 64, 2) == 48 * 32 + 48 * 4 + 4


def test_linears_with_formats_of_their_own() -> None:
    """Weights and work are those of the dense model, less what each linear's own bits save; a receipt says the same."""
    model, inputs = tiny_model(families.create("llava"))
    overrides = {"layers.0.*": None, "down_proj": {"weights": {"bits": 8}, "activations": {"bits": 4}}}
    spec = {"quantize": {"method": "rtn", "weights": {"bits": 4, "symmetric": True}, "overrides": overrides}}
    with torch.no_grad(), compress(model, spec) as receipt:
        model(**inputs)
    prompt = PROMPTS["llava"]
    planned, dense = cost(model, spec, prompt), cost(model, None, prompt)
    measured = cost(model, spec, prompt, receipt=receipt.linears)
    bits = {line.name: min(line.weight_bits, 16) for line in receipt.linears}
    assert sorted(set(bits.values())) == [4, 8, 16]
    shapes = {line.name: line.shape for line in receipt.linears if line.shape}
    saved = sum(out * into * 4 - out * (into * bits[n] // 8 + 4) for n, (out, into) in shapes.items() if bits[n] < 16)
    assert planned.weight_bytes == dense.weight_bytes - saved == measured.weight_bytes
    columns = prompt.text + planned.available
    shares = {n: 1 - bits[n] * (4 if bits[n] == 8 else 16) / 256 for n in bits}
    less = sum(2 * out * into * columns * shares[n] for n, (out, into) in shapes.items())
    assert planned.bops.prefill == pytest.approx(dense.bops.prefill - less)
    assert measured.bops.prefill == pytest.approx(planned.bops.prefill)
    with pytest.raises(UserError, match=r"overrides\.dwn_proj: fits no linear in scope; did you mean 'down_proj'"):
        cost(model, {"quantize": {**spec["quantize"], "overrides": {"dwn_proj": None}}}, prompt)


HYBRID = ("qwen3_5", "minicpmv4_6")  # families of which every second layer has linear attention


@pytest.mark.parametrize("family", sorted(PROMPTS))
def test_a_prompt_without_an_image_costs_its_text(family: str) -> None:
    model, _ = tiny_model(families.create(family))
    found = cost(model, {"prune": {"method": "attention", "keep": 5}}, Prompt(before=0, after=9, images=()))
    assert (found.flops.tower, found.flops.projector, found.flops.selection) == (0, 0, 0)
    assert (found.available, found.layer_mean, found.tokens_share) == (0, 0, 1)
    of_a_layer = 9 * 2 * 2 * 12 * 4  # tokens, keys and values, heads, width, bytes
    state = 4 * 8 * 8 * 4 + (2 * 2 * 8 + 4 * 8) * 4 * 4  # of linear attention: state, and inputs of the convolution
    assert found.kv_bytes == (2 * of_a_layer + 2 * state if family in HYBRID else 4 * of_a_layer)
    assert found.flops.prefill > 0
