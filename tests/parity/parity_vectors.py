"""The reference vectors: an optional folder, named by QAPBENCH_PARITY."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

VECTORS = Path(os.environ.get("QAPBENCH_PARITY", "no reference vectors"))

needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="no reference vectors: QAPBENCH_PARITY names no folder of them"
)


def load(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = VECTORS / case
    if not path.with_suffix(".safetensors").is_file():
        pytest.skip(f"no case {case} among the reference vectors")
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())
