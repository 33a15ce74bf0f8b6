"""The command that checks what needs a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check


def checked(device: str, folder: Path, parts: list[str]) -> dict[str, Any]:
    found = gpu_check.checked(gpu_check.Check(torch.device(device), True, folder), parts)
    return json.loads(json.dumps(found))


def test_it_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where rows of one height are known not to depend on their neighbours. A part that fails says why."""

    def broken(check: gpu_check.Check) -> gpu_check.Part:
        raise ValueError("no such kernel\nat all")

    monkeypatch.setitem(gpu_check.PARTS, "kernels", broken)
    found = checked("cpu", tmp_path, list(gpu_check.PARTS))
    assert found["kernels"]["error"] == "ValueError: no such kernel"
    results = {name: found[name]["result"] for name in ("products", "fake_quantization", "runs")}
    assert results["products"]["invariant"]
    assert results["fake_quantization"]["equal_to_cpu"]
    assert results["runs"]["same_bytes"]
    assert len(results["runs"]["rows"]) == len(gpu_check.ROWS) + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_the_bits_and_the_bytes(tmp_path: Path) -> None:
    found = checked("cuda", tmp_path, list(gpu_check.PARTS))
    assert not [name for name in gpu_check.PARTS if "error" in found[name]]
    assert found["products"]["result"]["invariant"]
    assert found["fake_quantization"]["result"]["equal_to_cpu"]
    assert found["runs"]["result"]["same_bytes"]
