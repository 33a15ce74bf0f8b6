"""Metrics that look at the language model's first linears: against float64, on real families, under quantization."""

from typing import Any

import numpy as np
import pytest
import strategy_oracles as oracle
import torch

from qapbench import UserError, compress, metrics, ptqs
from qapbench.models import family_of
from qapbench.models.families.llava import Llava
from qapbench.models.families.qwen2_5_vl import Qwen25VL
from qapbench.prune.build import build_pruning
from qapbench.prune.first_reads import first_reads, on_model
from qapbench.receipt import Receipt
from qapbench.spec.run_spec import PruneSpec

NAMES = ("output_error", "attended_error")
W4A4 = {"quantize": {"method": "rtn", "weights": {"bits": 4}, "activations": {"bits": 4}}}


def tiny(kind: Any) -> Any:
    torch.manual_seed(0)
    model = kind.tiny()[0].eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens_of(model: Any, count: int = 7) -> torch.Tensor:
    width = model.config.get_text_config().hidden_size
    tokens = torch.randn(2, count, width, generator=torch.Generator().manual_seed(1))
    tokens[0, 3, 5] = 40.0  # one token with an outlier
    return tokens


def by_hand(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Both metrics of one image [N, D], from the weights, in float64."""
    layer = family_of(model).parts["language"].layers[0]
    gain = layer.input_layernorm.weight.detach().double().numpy()
    eps = layer.input_layernorm.variance_epsilon
    x = tokens / np.sqrt((tokens**2).mean(-1, keepdims=True) + eps) * gain
    error = x - oracle.fake_quantize(x, 4, 128, False)[0]
    linears = [getattr(layer.self_attn, f"{part}_proj") for part in "qkv"]
    weights = [linear.weight.detach().double().numpy() for linear in linears]
    biases = [0.0 if linear.bias is None else linear.bias.detach().double().numpy() for linear in linears]
    whole = np.concatenate(weights)
    query, key = x @ weights[0].T + biases[0], x @ weights[1].T + biases[1]
    width = layer.self_attn.head_dim
    heads, groups = query.shape[1] // width, query.shape[1] // key.shape[1]
    attention = np.zeros(len(x))
    for head in range(heads):
        mine = query[:, head * width : (head + 1) * width].mean(0)
        theirs = key[:, head // groups * width : (head // groups + 1) * width]
        logits = theirs @ mine * layer.self_attn.scaling
        attention += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() / heads
    return {
        "output_error": np.linalg.norm(error @ whole.T, axis=1) / np.linalg.norm(x @ whole.T, axis=1),
        "attended_error": -attention * np.linalg.norm(error @ weights[2].T, axis=1),
    }


@pytest.mark.parametrize("kind", [Llava, Qwen25VL])
def test_scores_are_those_of_the_formula(kind: Any) -> None:
    model = tiny(kind)
    tokens = tokens_of(model)
    for name in NAMES:
        found = on_model(metrics.create(name), family_of(model))(tokens)
        for image in range(2):
            wanted = by_hand(model, tokens[image].double().numpy())[name]
            # A value on a rounding boundary may go either way in float32.
            np.testing.assert_allclose(found[image].double().numpy(), wanted, rtol=2e-2, atol=1e-6)
    relative = on_model(metrics.create("output_error"), family_of(model))(tokens)
    robust = on_model(metrics.create("output_error", keep="robust"), family_of(model))(tokens)
    assert torch.equal(robust, -relative)
    absolute = on_model(metrics.create("output_error", relative=False), family_of(model))(tokens)
    assert not torch.allclose(absolute, relative)


def test_the_weights_are_those_of_full_precision_while_quantized() -> None:
    """So that all quantizers of a sweep choose the same tokens, and no order of the work matters."""
    model = tiny(Llava)
    family, tokens = family_of(model), tokens_of(model)
    before = {name: on_model(metrics.create(name), family)(tokens) for name in NAMES}
    original = model.model.language_model.layers[0].self_attn.q_proj.weight
    with compress(model, W4A4):
        assert model.model.language_model.layers[0].self_attn.q_proj.weight is not original
        with compress(model, {"quantize": {"method": "rtn", "weights": {"bits": 3}}}):
            inner = {name: on_model(metrics.create(name), family)(tokens) for name in NAMES}
        during = {name: on_model(metrics.create(name), family)(tokens) for name in NAMES}
    after = first_reads(family.decoder).weights[0]
    assert torch.equal(after, original)
    for name in NAMES:
        assert torch.equal(before[name], during[name]) and torch.equal(before[name], inner[name])


def test_a_pruning_gives_the_metric_its_model() -> None:
    """The kept tokens are those with the highest scores, quantized or not."""
    model, inputs = Llava.tiny()
    prune = {"method": "attention", "keep": 5, "sensitivity": "output_error", "fusion": {"convex": {"semantic": 0.0}}}
    kept = []
    with torch.inference_mode():
        tokens = family_of(model.eval()).encode_images(inputs, frozenset()).single.projected
        wanted = on_model(metrics.create("output_error"), family_of(model))(tokens)[0].topk(5).indices.sort().values
        for spec in ({"prune": prune}, {"prune": prune, **W4A4}):
            with compress(model, spec, on_images=lambda images: kept.append(images[0].indices)):
                model(**inputs)
    assert all(torch.equal(torch.as_tensor(one), wanted) for one in kept) and len(kept) == 2


def test_where_there_is_no_model_it_is_said() -> None:
    model = tiny(Llava)
    with pytest.raises(UserError, match="metric 'output_error' looks at the language model, and none is given"):
        metrics.create("output_error")(tokens_of(model))
    inside = PruneSpec.model_validate({"method": "fastv", "keep": 5, "sensitivity": "output_error"})
    with pytest.raises(UserError, match="output_error looks at the language model's first layer, and fastv drops"):
        build_pruning(family_of(model), inside, Receipt())
    with pytest.raises(UserError, match="'output_error' looks at the language model"):
        ptqs.create("weighted_gptq", importance="output_error").check(None, None)
