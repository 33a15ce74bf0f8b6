"""Pictures of extreme shapes: what a family's processor accepts works with every pruner, and keep = all is the model.

`python -m benchmarks.geometry` tries the full product, of which this is a sample.
"""

from pathlib import Path
from typing import Any

import pytest
from family_checkpoints import PROCESSORS, save_family
from llava_checkpoints import save_llava

from benchmarks.geometry import RIGHT, SIZES, UNFIT, cases, loaded, outcome
from qapbench import pruners

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ["llava", *sorted(set(PROCESSORS) - {"idefics3"})]  # which is SmolVLM2's code, and so has its shapes

AT_DEPTH = {"pyramiddrop", "sparsevlm", "vscan_decoder", "vscan_two_stage", "vtw"}
"""Pruners whose first drop a tiny model with linear attention refuses, since it lies in front of its second layer."""


@pytest.fixture(scope="module", params=FAMILIES)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    save_llava(folder) if request.param == "llava" else save_family(request.param, folder)
    return request.param, *loaded(folder)


def test_every_pruner_takes_what_the_processor_takes(shown: tuple[str, Any, Any]) -> None:
    """The pruners take turns with the shapes: at all tokens alone, at one token with a sensitivity."""
    name, model, processor = shown
    names = pruners.names()
    sample = [
        case
        for case in cases(model)
        if names.index(case.pruner) % len(SIZES) == SIZES.index(case.size)
        and case.everything == (case.sensitivity is None)
    ]
    assert {case.pruner for case in sample} == set(names)
    assert {case.size for case in sample} == set(SIZES)
    found = [(case, outcome(model, processor, case)) for case in sample]
    assert [(case, what) for case, what in found if what not in RIGHT] == []
    unfit = {case.pruner for case, what in found if what == UNFIT}
    assert unfit <= (AT_DEPTH if name in ("qwen3_5", "minicpmv4_6") else set())
    refused = {case.size for case, what in found if what == "refused"}
    assert refused == ({(1, 2000), (2000, 4)} if name.startswith("qwen") else set())
