"""One random LLaVA for all model tests, loaded from its folder."""

import copy
from pathlib import Path
from typing import Any

import pytest
from llava_checkpoints import THREE, batch_of, picture, save_clip, save_llava
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the companion CLIP in `clip/`."""
    folder = save_llava(tmp_path_factory.mktemp("llava"))
    save_clip(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def processor(llava_folder: Path) -> Any:
    return AutoProcessor.from_pretrained(llava_folder)


@pytest.fixture(scope="session")
def as_loaded(llava_folder: Path) -> Any:
    """The model as it was loaded, which nobody changes."""
    return AutoModelForImageTextToText.from_pretrained(llava_folder).eval()


@pytest.fixture
def model(as_loaded: Any) -> Any:
    """A copy of the model for one test, which takes a fifth of the time of loading it."""
    return copy.deepcopy(as_loaded)


@pytest.fixture
def one(processor: Any) -> dict[str, Any]:
    """One question with an image."""
    return batch_of(processor, ["USER: <image>\nWhat is this? ASSISTANT:"], [picture(0)])


@pytest.fixture
def three(processor: Any) -> dict[str, Any]:
    """Two questions with images and one without, of different lengths, padded on the left."""
    return batch_of(processor, THREE, [picture(1), picture(2)])
