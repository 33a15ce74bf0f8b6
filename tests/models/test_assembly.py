"""Embedded models that are put together on first use, from a tiny GGUF and random parts."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("gguf")
pytest.importorskip("peft")

from assembly_parts import TEMPLATE, tiny_clip, tiny_llama, write_gguf, write_parts
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from qapbench import UserError
from qapbench.checkpoints import assembly, find, made
from qapbench.checkpoints.gguf import read_llama
from qapbench.hashing import digest_file
from qapbench.models.family import family_of
from qapbench.progress import assembly_progress

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("package") / "tiny_base_package" / "tiny.gguf"
    file.parent.mkdir()
    # Importing the real package would load somebody else's inference engine, so nothing may.
    (file.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(tiny_llama(), file)
    return file


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


@pytest.fixture
def embedded(tmp_path: Path, parts: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`tiny-llava` among the embedded models, its base importable, an empty cache."""
    folder = tmp_path / "embedded" / "tiny-llava"
    folder.parent.mkdir()
    shutil.copytree(parts, folder)
    base = {
        "package": "tiny_base_package",
        "file": "tiny.gguf",
        "sha256": digest_file(gguf_file),
        "extra": "tiny",
        "install": "pip install tiny",
    }
    (folder / "assembly.json").write_text(json.dumps({"base": base, "made_by": "python -m make.it"}))
    (folder / "status.txt").write_text("never trained")
    monkeypatch.setattr(find, "EMBEDDED", folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(gguf_file.parent.parent), *sys.path])
    yield folder


def test_weights_and_tokenizer_are_those_of_transformers(gguf_file: Path) -> None:
    found = read_llama(gguf_file)
    theirs: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).eval()
    state = theirs.state_dict()
    assert set(found.weights) == set(state) - {"lm_head.weight"}
    for name, weight in found.weights.items():
        assert torch.equal(weight, state[name]), name
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"):
        assert getattr(found.config, key) == getattr(theirs.config, key), key
    assert found.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for text in ("the cat<|im_end|>\nthe", "<|im_start|>user\n It's  the day, naïve!"):
        assert found.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert found.tokenizer.decode(found.tokenizer("the 12 é").input_ids) == "the 12 é"


def test_digits_stand_alone_under_smollm(gguf_file: Path, tmp_path: Path) -> None:
    """The merge of 1 and 2 is in the vocabulary, and must not be used."""
    assert read_llama(gguf_file).tokenizer.tokenize("12") == ["1", "2"]
    write_gguf(tiny_llama(), tmp_path / "other.gguf", pre="gpt-2")
    assert read_llama(tmp_path / "other.gguf").tokenizer.tokenize("12") == ["12"]


@pytest.mark.parametrize(("changed", "said"), [({"architecture": "phi3"}, "phi3"), ({"pre": "smolly"}, "smollm")])
def test_another_file_is_refused(tmp_path: Path, changed: dict[str, str], said: str) -> None:
    write_gguf(tiny_llama(), tmp_path / "other.gguf", **changed)
    with pytest.raises(UserError, match=said):
        read_llama(tmp_path / "other.gguf")


def by_hand(parts: Path, file: Path) -> dict[str, torch.Tensor]:
    """The state of the assembled model, written out: W + (alpha / r) B A."""
    llama = read_llama(file)
    lora = load_file(parts / "lora" / "adapter_model.safetensors")
    state = {}
    for name, weight in llama.weights.items():
        core = name.removeprefix("model.").removesuffix(".weight")
        a, b = (lora.get(f"base_model.model.{core}.lora_{which}.weight") for which in "AB")
        state[f"model.language_model.{core}.weight"] = weight if a is None else weight + 8 / 4 * b @ a
    state |= {f"model.vision_tower.{k}": v for k, v in tiny_clip().vision_model.state_dict().items()}
    projector = load_file(parts / "projector.safetensors")
    return state | {f"model.multi_modal_projector.{k}": v for k, v in projector.items()}


def test_whoever_loads_a_model_sees_that_it_is_put_together(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    find.find_checkpoint("tiny-llava")
    assert "tiny-llava: first use" in sys.stderr.getvalue()
    assert assembly_progress.get() is None


def test_assembled_is_what_is_assembled_by_hand(embedded: Path, parts: Path, gguf_file: Path) -> None:
    told: list[tuple[str, int, int]] = []
    token = assembly_progress.set(lambda *step: told.append(step))
    try:
        checkpoint = find.find_checkpoint("tiny-llava")
    finally:
        assembly_progress.reset(token)
    assert checkpoint.embedded
    assert checkpoint.status == "never trained"
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert {name for name, _, _ in told} == {"tiny-llava"}
    assert told[-1][1] == told[-1][2]
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    state = model.state_dict()
    expected = by_hand(parts, gguf_file)
    assert set(state) - {"lm_head.weight"} == set(expected)
    rows = len(tiny_llama().lm_head.weight)
    for name, weight in expected.items():
        mine = state[name][:rows] if "embed_tokens" in name else state[name]
        assert torch.equal(mine, weight.bfloat16().float()), name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert len(model.lm_head.weight) % 64 == 0

    processor = AutoProcessor.from_pretrained(checkpoint.folder)
    family_of(model).complete(processor)
    content = [{"type": "image"}, {"type": "text", "text": "the 12?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.new("RGB", (32, 32), (9, 99, 200))
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1]
    # A row that stands for no token is the mean of the others, and so is its logit.
    torch.testing.assert_close(logits[rows], logits[:rows].mean(), atol=2e-2, rtol=2e-2)


def test_the_chat_template_is_the_files_own(embedded: Path) -> None:
    processor = AutoProcessor.from_pretrained(find.find_checkpoint("tiny-llava").folder)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    own = processor.tokenizer.apply_chat_template(turns, chat_template=TEMPLATE, tokenize=False)
    assert processor.apply_chat_template(turns) == own
    listed = [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns]
    assert processor.apply_chat_template(listed) == own
    with pytest.raises(ValueError, match="content"):
        assembly.with_images("{{ bos_token }}")


def test_the_second_use_takes_what_is_there(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find.find_checkpoint("tiny-llava").folder
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "build", lambda *_: pytest.fail("built again"))
        assert find.find_checkpoint("tiny-llava").folder == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing half-made stays
    # Other parts make another folder; the first stays as it is.
    (embedded / "status.txt").write_text("trained")
    assert find.find_checkpoint("tiny-llava").folder != folder
    assert not made.broken_file(folder)


def test_a_broken_cache_is_detected_and_made_anew(embedded: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = find.find_checkpoint("tiny-llava").folder
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert made.broken_file(folder) == "model.safetensors"
    assert find.find_checkpoint("tiny-llava").folder == folder
    assert file.read_bytes() == whole
    assert "model.safetensors is not what was written" in caplog.text
    (folder / "manifest.json").unlink()
    assert made.broken_file(folder) == "manifest.json"


def test_a_failed_build_leaves_nothing(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(assembly, "build", fail)
    with pytest.raises(MemoryError):
        find.find_checkpoint("tiny-llava")
    assert not list(made.cache_folder().iterdir())


def test_what_is_missing_is_named(embedded: Path) -> None:
    recipe = json.loads((embedded / "assembly.json").read_text())

    def message() -> str:
        with pytest.raises(UserError) as caught:
            find.find_checkpoint("tiny-llava")
        return str(caught.value)

    recipe["base"]["sha256"] = "0" * 64
    (embedded / "assembly.json").write_text(json.dumps(recipe))
    assert "tiny.gguf has SHA-256" in message()
    recipe["base"]["package"] = "no_such_package_here"
    (embedded / "assembly.json").write_text(json.dumps(recipe))
    assert "needs no_such_package_here: pip install 'qapbench[tiny]'" in message()
    (embedded / "projector.safetensors").unlink()
    said = message()
    assert said.startswith("model: 'tiny-llava' has no trained parts yet (projector.safetensors")
    assert "python -m make.it" in said
    assert "\n" not in said


def test_names_offer_what_is_assembled(embedded: Path) -> None:
    assert find.is_embedded("tiny-llava")
    with pytest.raises(UserError, match="did you mean 'tiny-llava'"):
        find.find_checkpoint("tiny-lava")


def test_what_is_not_trained_is_no_model() -> None:
    """A name that could only be refused is not offered; its recipe is kept beside its training."""
    with pytest.raises(UserError, match=r"no embedded model or folder 'smol-llava'; did you mean 'diagram-llava'"):
        find.find_checkpoint("smol-llava")
    for recipe in find.EMBEDDED.glob(f"*/{assembly.RECIPE}"):
        assert all((recipe.parent / part).is_file() for part in assembly.PARTS)
