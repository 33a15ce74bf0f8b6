"""The cost is what is counted while the model runs: for pruners of both kinds on every family, prompt and answer.

`python -m benchmarks.cost` compares all pairs of pruner and family, of which this is a sample.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cost import PROMPTS, agreement, sampled, specs_of, tiny_model
from qapbench.costing.shape import shape_of
from qapbench.models import family_of
from qapbench.models.family import families


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_a_prompt_and_its_answer_cost_what_is_counted(name: str) -> None:
    model, inputs = tiny_model(families.create(name))
    specs = specs_of(model, sampled(name))
    found = {str(spec): agreement(model, inputs, spec, PROMPTS[name]) for spec in specs}
    assert len(found) > 1
    assert {spec: one for spec, one in found.items() if not one.agrees} == {}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_linears_that_read_a_norm_are_known(name: str) -> None:
    """What is counted for rotations depends on it."""
    model, inputs = tiny_model(families.create(name))
    normed: list[Tensor] = []
    found: dict[str, bool] = {}

    def reads(path: str) -> Any:
        return lambda module, args: found.update({path: any(args[0] is one for one in normed)})

    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_hook(lambda module, args, output: normed.append(output))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(reads(path))
    with torch.inference_mode():
        model(**inputs)
    shape = shape_of(family_of(model))
    products = [product for layer in (*shape.tower, *shape.decoder) for product in layer if product.name in found]
    products = [one for one in products if ".vit_merger.self_attn." not in one.name]  # a norm's output by windows
    assert len(products) > 10
    assert {one.name: one.of_norm for one in products} == {one.name: found[one.name] for one in products}
