"""The cost is what is counted while the model runs: for pruners of both kinds on every family, prompt and answer.

`python -m benchmarks.cost` compares all pairs of pruner and family, of which this is a sample.
"""

import pytest

from benchmarks.cost import PROMPTS, agreement, specs_of, tiny_model
from qapbench import pruners
from qapbench.models.family import families

NAMES = sorted(PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_and_its_answer_cost_what_is_counted(name: str) -> None:
    model, inputs = tiny_model(families.create(name))
    sample = [pruner for at, pruner in enumerate(pruners.names()) if at % len(NAMES) == NAMES.index(name)]
    found = {str(spec): agreement(model, inputs, spec, PROMPTS[name]) for spec in specs_of(model, sample)}
    assert len(found) > 2
    assert {spec: one for spec, one in found.items() if not one.agrees} == {}
