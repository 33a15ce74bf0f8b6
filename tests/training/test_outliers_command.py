"""Finding directions of outliers and putting outliers into checkpoints of a user's: other families, other dtypes."""

from typing import Any

import pytest
import torch

from qapbench import UserError
from qapbench.checkpoints.outliers import Outliers
from qapbench.models.family import families
from training.outliers import activations_of, find, put, rarest_direction

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = families.create(name).tiny()
    return model.double().eval(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def test_the_direction_of_few_far_tokens_is_found() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 24, generator=generator, dtype=torch.float64)
    hidden = torch.zeros(24, dtype=torch.float64)
    hidden[3], hidden[9] = 0.6, 0.8
    x = x + 8 * (torch.rand(4000, 1, generator=generator) < 0.02).double() * hidden
    found = rarest_direction(x, torch.zeros(0, 24, dtype=torch.float64), generator)
    assert abs(float(found @ hidden)) > 0.95
    second = rarest_direction(x, found[None], generator)
    assert abs(float(second @ found)) < 1e-12 and float(second.norm()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("place", ["norms", "neurons"])
def test_a_users_model_gets_outliers_and_answers_as_before(name: str, place: Any) -> None:
    """1e-5 of the largest logit: transformers computes RMSNorm in float32. The channels get s times larger."""
    model, inputs = model_of(name)
    found = find(model, [inputs], each=1)
    depth = len(found["visual.neurons"])
    assert found["visual.directions"].shape[:2] == found["text.directions"].shape[:2] == (2 * depth, 1)
    flat = found["visual.directions"].flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(2 * depth, dtype=torch.float64), atol=1e-10, rtol=0)
    outliers = Outliers(found["visual.directions"], found["visual.neurons"])
    before = activations_of(model, [inputs])["visual"][1]
    change = put(model, outliers, 20.0, place, [inputs])
    assert change < 1e-5
    _, driven = activations_of(model, [inputs])["visual"]
    for old, new, at in zip(before, driven, found["visual.neurons"], strict=True):
        factor = 20.0 if place == "neurons" else 1.0
        torch.testing.assert_close(new[:, at], factor * old[:, at], rtol=1e-3, atol=1e-6)
    language = model.model.language_model
    gains = torch.stack([layer.input_layernorm.weight for layer in language.layers])
    assert ((gains - 20).abs() < 1e-9).sum() == (depth if place == "norms" else 0)


def test_a_model_whose_outputs_would_change_is_refused() -> None:
    """Here because a layer scales its output by a constant that the tool knows nothing of."""
    model, inputs = model_of("llava")
    found = find(model, [inputs], each=1)
    language = model.model.language_model
    bias = torch.randn(language.config.hidden_size, dtype=torch.float64)
    language.layers[1].register_forward_hook(lambda module, args, output: output + bias)
    outliers = Outliers(found["visual.directions"], found["visual.neurons"])
    with pytest.raises(UserError, match="a llava answers otherwise with another basis"):
        put(model, outliers, 4.0, "norms", [inputs])
