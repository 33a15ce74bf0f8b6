"""JSON files of a checkpoint that are broken, or hold no mapping: one sentence that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from llava_checkpoints import save_clip, save_llava

from qapbench import RunSpec, UserError
from qapbench.analysis.pictures import image_processor_config
from qapbench.checkpoints.find import find_checkpoint
from qapbench.checkpoints.json_files import SETTINGS, read_mapping
from qapbench.models.loading import load_model, load_processor
from qapbench.models.relevance import TextTower, find_tower
from qapbench.running.planner import Planner

CPU = torch.device("cpu")
NO_MAPPING = [b"[]", b"[1]", b'"text"', b"null", b"3", b"NaN"]
NO_JSON = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llava(tmp_path_factory.mktemp("whole") / "llava")
    save_clip(folder / "clip")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to break."""
    return Path(shutil.copytree(whole, tmp_path / "llava"))


@pytest.mark.parametrize("pattern", SETTINGS)
def test_a_broken_settings_file_is_named_before_anything_is_loaded(pattern: str, folder: Path, tmp_path: Path) -> None:
    """Also those that transformers passes over in silence, such as generation_config.json."""
    spec = RunSpec.parse({"model": str(folder), "task": "diagramqa"})
    check = Planner(tmp_path / "runs", CPU).check
    check(spec, ["model"])
    file = folder / pattern.replace("*", "model")
    kept = file.read_bytes() if file.exists() else b"{}"
    for content in (*NO_MAPPING, *NO_JSON):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            check(spec, ["model"])
        (problem,) = caught.value.problems
        said = "is not a mapping, but " if content in NO_MAPPING else "cannot be read: "
        assert str(problem).startswith(f"model: {file} {said}")
        assert len(str(problem)) < len(str(file)) + 250
    file.write_bytes(kept)
    check(spec, ["model"])


def test_all_broken_files_are_named_at_once(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text("[]")
    with pytest.raises(UserError) as caught:
        find_checkpoint(str(folder))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("section", ["vision_config", "text_config"])
@pytest.mark.parametrize("value", ["3", '"x"', "[]", "[{}]"])
def test_a_section_that_is_no_mapping_is_named(section: str, value: str, folder: Path) -> None:
    (folder / "config.json").write_text(f'{{"model_type": "llava", "{section}": {value}}}')
    with pytest.raises(UserError, match=rf"^model: .*config\.json: {section} is not a mapping, but "):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"null", b"{", b"\xff"])
def test_a_broken_tokenizer_is_named_when_it_is_loaded(content: bytes, folder: Path) -> None:
    spec = RunSpec.parse({"model": str(folder), "task": "diagramqa"})
    (folder / "tokenizer.json").write_bytes(content)
    for load in (load_model, load_processor):
        with pytest.raises(UserError, match=r"^model: .*/tokenizer\.json (is not a mapping|cannot be read)"):
            load(spec, CPU)
    (folder / "clip" / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^text_tower: .*/clip/tokenizer\.json (is not a mapping|cannot be read)"):
        TextTower(folder / "clip", 32)


def test_a_broken_text_tower_beside_the_model_is_named(folder: Path) -> None:
    assert find_tower(None, str(folder), None)[0] == folder / "clip"
    (folder / "clip" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"^text_tower: .*/clip/config\.json is not a mapping"):
        find_tower(None, str(folder), None)


def test_the_page_reads_the_image_processor_or_says_why_not(folder: Path) -> None:
    assert "image_mean" in image_processor_config(folder)
    (folder / "processor_config.json").write_text('{"image_processor": [1]}')
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read"):
        image_processor_config(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {}}')
    assert image_processor_config(folder) == read_mapping(folder / "preprocessor_config.json") == {"size": {}}
