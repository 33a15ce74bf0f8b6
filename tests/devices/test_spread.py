"""A model that accelerate spread over two devices gives the answers of one device, whatever compresses it.

There are no two GPUs here, so devices are simulated: see `far.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.kinds import pruners

ROOT = Path(__file__).parents[2]
INSIDE = [name for name in pruners.names() if isinstance(pruners.create(name), DecoderPruner)]
METHODS = ["dense", "rtn", "rtn packed", "quarot", "smoothquant", "kv", "fastv of rtn"]
CASES = [*METHODS, "runs", "cdpruner", "visionzip", "mmtok", *INSIDE]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case came to. The simulation changes its process for good, so it has one of its own."""
    command = [sys.executable, "-m", "tests.devices.cases", str(tmp_path_factory.mktemp("spread") / "llava")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


def test_every_case_was_computed_and_devices_cannot_mix_unnoticed(found: dict[str, Any]) -> None:
    assert set(found) == {*CASES, "mixed"}
    assert "tensors on far:0, far:1" in found["mixed"]["why"]


@pytest.mark.parametrize("case", CASES)
def test_two_devices_give_the_bits_of_one(found: dict[str, Any], case: str) -> None:
    assert found[case]["equal"], found[case]["why"]
