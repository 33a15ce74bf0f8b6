"""Token-weighted GPTQ: its matrix in float64, attention received against the whole softmax, what it falls back to."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qapbench import Calibration, CalibrationSamples, Format, metrics, ptqs
from qapbench.models.family import families, family_of
from qapbench.spec.run_spec import QuantizeSpec
from qapbench.strategies.ptq.weighted_gptq import WeightedGram

W3 = Format(bits=3)


def by_hand(samples: list[np.ndarray], scores: list[np.ndarray], most: float) -> np.ndarray:
    """Sum of w x x^T in float64: scores to [1, most] by minimum and maximum, over their mean."""
    total = np.zeros((samples[0].shape[1],) * 2)
    for x, s in zip(samples, scores, strict=True):
        w = 1 + (most - 1) * (s - s.min()) / (s.max() - s.min())
        total += (x * (w / w.mean())[:, None]).T @ x
    return total


def test_the_matrix() -> None:
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randn(size, 12, generator=draw) for size in (7, 30)]
    scores = [torch.rand(len(x), generator=draw) for x in samples]
    gram = WeightedGram(3.0, lambda index, x: scores[index])
    for x in samples:
        gram(x, torch.zeros(len(x), dtype=torch.bool))
    wanted = by_hand([x.double().numpy() for x in samples], [s.double().numpy() for s in scores], 3.0)
    np.testing.assert_allclose(gram.value.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["l2", "variance"])
def test_any_metric_weighs_the_inputs_of_each_linear(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8)).requires_grad_(False)
    linears = {"0": model[0], "2": model[2]}
    samples = [torch.randn(9, 24) * torch.rand(9, 1) for _ in range(4)]
    plain, even, uneven = (
        ptqs.create(method, **more).prepare(model, linears, W3, None, samples)  # type: ignore[arg-type]
        for method, more in (
            ("gptq", {}),
            ("weighted_gptq", {"importance": name, "most": 1.0}),
            ("weighted_gptq", {"importance": name, "most": 30.0}),
        )
    )
    rounded = [plans["0"].new_weight(model[0].weight) for plans in (plain, even, uneven)]
    assert torch.equal(rounded[0], rounded[1])
    assert not torch.equal(rounded[0], rounded[2])
    x, scores = torch.cat(samples), torch.cat([metrics.create(name)(x[None])[0] for x in samples])
    gram = WeightedGram(30.0, lambda index, x: metrics.create(name)(x[None])[0])
    for sample in samples:
        gram(sample, torch.zeros(len(sample), dtype=torch.bool))
    harm = [float((((w - model[0].weight) @ gram.value) * (w - model[0].weight)).sum()) for w in rounded]
    assert harm[2] < harm[0], "it is better for the tokens that count"
    assert scores.shape == (len(x),)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_attention_received_is_the_column_sum_of_the_softmax(family: str) -> None:
    torch.manual_seed(0)
    model, inputs = families.create(family).tiny()
    model.set_attn_implementation("eager")
    calibration = Calibration(model, CalibrationSamples([inputs]), family_of(model))
    linears = {name: linear for name, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    linears = {name: linear for name, linear in linears.items() if "language_model.layers" in name}
    found: dict[str, Any] = {}

    def find(block: Any) -> dict[str, Any]:
        found[block.name] = block.attention_received()
        return {}

    calibration.block_by_block(linears, find)
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True).attentions
    received = [rows for name, rows in found.items() if "language_model.layers" in name]
    assert len(received) == len(whole)
    for (own,), attention in zip(received, whole, strict=True):
        torch.testing.assert_close(own, attention[0].double().mean(dim=0).sum(dim=0).float(), rtol=1e-4, atol=1e-5)


def test_without_attention_it_is_gptq_and_an_unknown_metric_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).requires_grad_(False)
    samples = [torch.randn(9, 24) for _ in range(3)]
    first, second = (
        ptqs.create(m).prepare(model, {"0": model[0]}, W3, None, samples) for m in ("gptq", "weighted_gptq")
    )
    assert torch.equal(first["0"].new_weight(model[0].weight), second["0"].new_weight(model[0].weight))
    quantize = {"method": {"weighted_gptq": {"importance": "l3"}}, "weights": {"bits": 4}}
    with pytest.raises(ValueError, match=r"importance: no metric 'l3'; it is one of attention, .*l2"):
        QuantizeSpec.model_validate(quantize)
