"""The cost is what is counted while the model runs: for pruners of both kinds on every family, prompt and answer.

`python -m benchmarks.cost` compares all pairs of pruner and family, of which this is a sample.
"""

import pytest

from benchmarks.cost import PROMPTS, agreement, sampled, specs_of, tiny_model
from qapbench.models.family import families


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_a_prompt_and_its_answer_cost_what_is_counted(name: str) -> None:
    model, inputs = tiny_model(families.create(name))
    specs = specs_of(model, sampled(name))
    found = {str(spec): agreement(model, inputs, spec, PROMPTS[name]) for spec in specs}
    assert len(found) > 2
    assert {spec: one for spec, one in found.items() if not one.agrees} == {}
