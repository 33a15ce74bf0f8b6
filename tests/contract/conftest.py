from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llava_checkpoints import THREE, batch_of, picture, save_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from qapbench.strategies.ptq import awq, mquant


@pytest.fixture(autouse=True, scope="module")
def _fast(one_thread: None) -> None:
    """Every test of this folder runs on one thread."""


@pytest.fixture(autouse=True, scope="module")
def _short_searches() -> Iterator[None]:
    """Methods that search a grid try a few of its points. What the contract says holds for whichever is best.

    The whole grids are those of tests/strategies and tests/parity.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq, "STEPS", 4)
        patch.setattr(mquant, "SHARES", mquant.SHARES[::20])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random LLaVA."""
    return save_llava(tmp_path_factory.mktemp("contract-llava"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def asked(processor: Any) -> dict[str, Any]:
    """A batch of prompts with and without images, none of them a calibration sample."""
    return batch_of(processor, THREE, [picture(101), picture(102)])
