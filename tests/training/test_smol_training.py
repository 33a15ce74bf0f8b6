"""The training of `smol-llava` on a tiny random stand-in: what packs ask, what stages train, resume and export."""

import argparse
import itertools
import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("peft")

from assembly_parts import tiny_llama, write_gguf
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

from qapbench.checkpoints import assembly, find
from qapbench.hashing import digest_file
from qapbench.tasks.diagramqa.generate import sample
from training.labels import Labeller
from training.model import build_models, build_tokenizers
from training.smol import packs as packing
from training.smol import sizing, subset
from training.smol.model import BEGUN, add_lora, halve, start
from training.smol.packs import LETTER, WORDS, Feed, Mix, Packs, Wording, collate
from training.smol.stages import FedCompanion, Seeing
from training.smol.train import parser, train
from training.vision import Vision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("base") / "tiny_smol_package" / "tiny.gguf"
    file.parent.mkdir()
    (file.parent / "__init__.py").touch()
    write_gguf(tiny_llama(), file)
    return file


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory, speller: Any) -> Path:
    """diagram-llava's companion CLIP, untrained."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(3)
    _, clip = build_models(speller.bpe.get_vocab_size())
    clip.save_pretrained(folder)
    build_tokenizers(speller.bpe)[1].save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def longer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny vocabulary spells byte by byte, so that a question takes three times the tokens."""
    monkeypatch.setattr(packing, "LENGTH", 1280)


@pytest.fixture
def begun(base: Path, tower: Path, labeller: Labeller) -> tuple[Any, Any, Packs]:
    llava, processor, _ = start(base, tower, seed=0)
    wording = Wording(processor.tokenizer, processor.chat_template, llava.config.image_seq_length)
    return llava, processor, Packs(wording, labeller, seed=1)


def test_packed_questions_are_answered_as_if_alone(begun: tuple[Any, Any, Packs]) -> None:
    """Every letter of a pack gets the logits that the model gives the benchmark's single-question prompt, in the
    processor's own spelling."""
    llava, processor, data = begun
    checks = Packs(data.wording, data.labeller, 0, "val")
    vision = Vision(llava, data.labeller, 0)
    stage = Seeing("projector", llava, add_lora(llava, 2, 4), vision, data, checks, 2, 0)
    compared = 0
    for index in (0, 3):
        pack = checks[index]
        batch = collate([pack])
        with torch.no_grad():
            logits, _, _ = stage.forward(batch)
        letters = logits[batch["kind"][batch["kind"] > 0] == LETTER]
        prompts = []
        rng = np.random.default_rng([checks.seed, index])
        if "pixels" in pack:
            scene = sample(0, index, "val", modality="image")
            questions = [scene.questions[i] for i in rng.permutation(len(scene.questions))]
        else:
            scenes = [sample(0, index * 64 + i, "val", modality="text") for i in range(len(letters))]
            questions = [scene.questions[int(rng.integers(len(scene.questions)))] for scene in scenes]
        for question in questions[: len(letters)]:
            body = "\n".join([*([f"Context: {question.hint}"] if question.hint else []), question.question])
            options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDE", question.choices, strict=False))
            asked = f"{body}\n{options}\nAnswer with the option's letter from the given choices directly."
            content = [{"type": "image"}] * ("pixels" in pack) + [{"type": "text", "text": asked}]
            prompts.append(
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )
        for prompt, mine in zip(prompts, letters, strict=True):
            images = scene.image if "pixels" in pack else None
            inputs = processor(images=images, text=prompt, return_tensors="pt")
            with torch.no_grad():
                alone = llava(**inputs, logits_to_keep=1).logits[0, -1]
            torch.testing.assert_close(mine, alone, atol=2e-4, rtol=1e-3)
            compared += 1
    assert compared >= 4


def test_a_pack_follows_from_its_number(begun: tuple[Any, Any, Packs]) -> None:
    _, _, data = begun
    one, other = data[5], data[5]
    assert all(torch.equal(one[name], other[name]) for name in one)
    sent = pickle.loads(pickle.dumps(data))[5]  # as worker processes get it
    assert all(torch.equal(one[name], sent[name]) for name in one)
    assert not torch.equal(one["ids"], data[6]["ids"])
    assert "pixels" in one and "pixels" not in data[7]
    feed = Feed(data, 2, workers=0)
    second = [feed.at(0), feed.at(1)][1]
    assert torch.equal(second["ids"], Feed(data, 2, workers=0).at(1)["ids"])
    assert torch.equal(second["ids"], torch.stack([data[2]["ids"], data[3]["ids"]]))
    assert len(second["pixels"]) == 1
    image = sample(1, 2, "train", modality="image").image
    assert np.array_equal(second["pixels"][0].numpy(), np.asarray(image))


def test_drills_name_the_option_whose_letter_they_ask_for(begun: tuple[Any, Any, Packs]) -> None:
    _, processor, data = begun
    drilled = Packs(data.wording, data.labeller, 1, mix=Mix(text=1, drills=1.0))
    pack = drilled[0]
    assert "pixels" not in pack
    letters = pack["target"][pack["kind"] == LETTER].tolist()
    text = [processor.tokenizer.decode(pack["ids"][pack["segment"] == at]) for at in range(1, len(letters) + 1)]
    assert len(letters) >= 3
    for asked, letter in zip(text, letters, strict=True):
        named = asked.split("Find: ")[1].split("\n")[0]
        options = dict(re.findall(r"^([A-E])\. (.*)$", asked, re.MULTILINE))
        assert options[processor.tokenizer.decode([letter])] == named
    for plain, index in ((Packs(data.wording, data.labeller, 1), 3), (Packs(data.wording, data.labeller, 0, "val"), 3)):
        assert "Find:" not in processor.tokenizer.decode(plain[index]["ids"])


def test_captions_of_the_validation_split_stand_behind_its_questions(
    begun: tuple[Any, Any, Packs], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, data = begun
    monkeypatch.setattr(packing, "LENGTH", 4096)  # so that there is room for them
    for index in (0, 1):
        kinds = Packs(data.wording, data.labeller, 0, "val")[index]["kind"]
        letters, words = (kinds == LETTER).nonzero(), (kinds == WORDS).nonzero()
        assert len(letters) and len(words)
        assert int(words.min()) > int(letters.max())


def test_every_stage_trains_its_own_parts(begun: tuple[Any, Any, Packs]) -> None:
    llava, _, data = begun
    adapted, vision = add_lora(llava, 2, 4), Vision(llava, data.labeller, 0)
    for name, parts in (("projector", {"projector", "heads"}), ("joint", {"projector", "heads", "tower", "lora"})):
        stage = Seeing(name, llava, adapted, vision, data, data, 2, 0)
        assert set(stage.trained) == parts
        trained = {id(p) for module in stage.trained.values() for p in module.parameters()}
        assert {id(p) for p in llava.parameters() if p.requires_grad} <= trained
        before = {n: p.detach().clone() for n, p in llava.named_parameters()}
        optimizer = stage.optimizer()
        for step in range(2):  # LoRA's second half starts at zero, so its first moves a step later
            loss, logged = stage.loss(step, 0.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isfinite(loss)
        assert 0 <= logged["image_acc"] <= 1
        moved = {n for n, p in llava.named_parameters() if not torch.equal(p, before[n])}
        roots = {"projector": "multi_modal_projector", "tower": "vision_tower", "lora": "lora_"}
        for part, root in roots.items():
            assert any(root in n for n in moved) == (part in parts), part
        assert all(any(root in n for root in roots.values()) for n in moved)


def test_bfloat16_trains_float32_weights_to_the_same_loss(begun: tuple[Any, Any, Packs]) -> None:
    """What runs on a GPU, on a CPU: the decoder fixed in bfloat16, everything that is trained in float32."""
    llava, _, data = begun
    adapted, vision = add_lora(llava, 2, 4), Vision(llava, data.labeller, 0)
    exact, _ = Seeing("joint", llava, adapted, vision, data, data, 1, 0).loss(0, 0.0)
    halve(llava)
    stage = Seeing("joint", llava, adapted, vision, data, data, 1, 0, bf16=True)
    assert llava.lm_head.weight.dtype == torch.bfloat16
    loss, _ = stage.loss(0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    grads = {
        part: [p.grad for p in module.parameters() if p.grad is not None] for part, module in stage.trained.items()
    }
    assert all(grads.values())
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for part in grads.values() for grad in part)


@pytest.fixture
def arguments(base: Path, tower: Path, tmp_path: Path) -> argparse.Namespace:
    line = [
        "--out",
        tmp_path / "run",
        "--export",
        tmp_path / "embedded" / "tiny-smol",
        "--minutes",
        0.8,
        "--batch",
        2,
        "--workers",
        0,
        "--gguf",
        base,
        "--tower",
        tower,
        "--rank",
        2,
        "--alpha",
        4,
        "--slots",
        20,
        "--log-every",
        1,
        "--device",
        "cpu",
    ]
    return parser().parse_args([str(word) for word in line])


@pytest.fixture
def recipe(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "embedded" / "tiny-smol"
    folder.mkdir(parents=True)
    about = {
        "package": "tiny_smol_package",
        "file": "tiny.gguf",
        "sha256": digest_file(base),
        "extra": "tiny",
        "install": "pip install tiny",
    }
    (folder / "assembly.json").write_text(json.dumps({"base": about, "made_by": "python -m make.it"}))
    monkeypatch.setattr(find, "EMBEDDED", folder.parent)
    monkeypatch.setattr(sys, "path", [str(base.parent.parent), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder


def test_one_command_trains_resumes_and_exports_what_is_assembled(
    arguments: argparse.Namespace, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in (Seeing, FedCompanion):  # hundreds of scenes each
        monkeypatch.setattr(stage, "validate", lambda self: {"val_image": 0.5})
    ticks = itertools.count()  # every look at the clock takes a second, so that the budget is a number of steps
    clock = SimpleNamespace(time=lambda: float(next(ticks)))
    monkeypatch.setattr("training.loop.time", clock)
    monkeypatch.setattr("training.smol.train.time", clock)
    stopped = argparse.Namespace(**{**vars(arguments), "call_minutes": 0.0})
    for step in (1, 2):
        assert train(stopped) is False  # the call is over after one step, with a checkpoint
        state = torch.load(arguments.out / "projector.pt", weights_only=True)
        assert state["step"] == step
        assert not recipe.joinpath("lora").exists()
    assert train(arguments) is True
    log = [json.loads(line) for line in (arguments.out / "log.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in log if "loss" in line]
    ends = {stage: max(at for name, at in steps if name == stage) for stage in ("projector", "joint", "companion")}
    assert steps == [(stage, at + 1) for stage, end in ends.items() for at in range(end)]
    assert ends["joint"] > 3
    assert json.loads(capsys.readouterr().out)["megabytes"] < 40
    assert all((recipe / part).is_file() for part in assembly.PARTS)
    assert (recipe / "README.md").read_text() == (BEGUN / "README.md").read_text()
    assert assembly.Recipe.model_validate_json((BEGUN / "assembly.json").read_text()).base.extra == "smollm2"
    assert json.loads((recipe / "assembly.json").read_text())["base"]["extra"] == "tiny", "its own recipe stays"

    folder = find.find_checkpoint("tiny-smol").folder
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    trained = torch.load(arguments.out / "joint.pt", weights_only=True)["modules"]
    assert all(
        torch.equal(model.model.vision_tower.state_dict()[key], value.bfloat16().float())
        for key, value in trained["tower"].items()
        if "post_layernorm" not in key
    )
    assert any(float(value.abs().max()) for name, value in trained["lora"].items() if "lora_B" in name)
    Tokenizer.from_file(str(folder / "clip" / "tokenizer.json"))
    assert processor.image_token_id == model.config.image_token_id
    shutil.rmtree(folder)


def test_sizing_counts_the_model_that_is_trained(begun: tuple[Any, Any, Packs]) -> None:
    """The arithmetic of the table on the real shapes, against a model of the tiny ones."""
    llava, _, _ = begun
    text, vision = llava.config.text_config, llava.config.vision_config
    adapted = add_lora(llava, 2, 4)
    lora = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    decoder = sum(
        p.numel() for n, p in llava.model.language_model.named_parameters() if "proj" in n and "lora_" not in n
    )
    projector = sum(p.numel() for p in llava.model.multi_modal_projector.parameters())
    tower = sum(p.numel() for p in llava.model.vision_tower.parameters())
    shape = sizing.Decoder(
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        text.num_key_value_heads * text.head_dim,
        text.vocab_size,
    )
    eyes = sizing.Tower(vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size)
    assert shape.linears == decoder
    assert shape.lora(2) == lora
    assert eyes.parameters == tower
    assert eyes.projector(text.hidden_size) == projector
    assert "samples/s" in sizing.table()


def test_the_subset_is_stratified_and_seeded() -> None:
    rows = [
        {
            "pid": str(i),
            "image": {"bytes": b""} if i % 4 == 0 else None,
            "choices": ["x"] * (2 + i % 3),
            "subject": ["natural science", "social science"][i % 2],
        }
        for i in range(400)
    ]
    frame = pd.DataFrame(rows)
    drawn = subset.subset(frame, 60, seed=1)
    assert len(drawn) == 60
    assert drawn.image.isna().all()
    assert drawn.pid.is_unique
    assert list(drawn.pid) == list(subset.subset(frame, 60, seed=1).pid)
    text = frame[frame.image.isna()]
    expected = text.choices.map(len).value_counts(normalize=True) * 60
    assert all(abs(n - expected[k]) <= 2 for k, n in drawn.choices.map(len).value_counts().items())
