"""The projector in closed form: what a patch should mean, and that the weights solve the regression."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("peft")

from assembly_parts import tiny_llama, write_gguf

from qapbench.tasks.diagramqa.generate import sample
from training.labels import Labeller
from training.model import build_models, build_tokenizers
from training.smol import packs as packing
from training.smol import train as command
from training.smol.closed_form import Meanings, _pairs, fit_projector, reading
from training.smol.model import start
from training.smol.packs import Wording
from training.smol.stages import Seeing
from training.smol.train import parser, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, speller: Any) -> tuple[Path, Path]:
    """The file of a tiny language model, and the folder of an untrained CLIP."""
    folder = tmp_path_factory.mktemp("parts")
    write_gguf(tiny_llama(), folder / "tiny.gguf")
    torch.manual_seed(3)
    build_models(speller.bpe.get_vocab_size())[1].save_pretrained(folder / "clip")
    build_tokenizers(speller.bpe)[1].save_pretrained(folder / "clip")
    return folder / "tiny.gguf", folder / "clip"


@pytest.fixture
def begun(files: tuple[Path, Path]) -> tuple[Any, Wording]:
    llava, processor, _ = start(*files, seed=0)
    return llava, Wording(processor.tokenizer, processor.chat_template, llava.config.image_seq_length)


def test_a_patch_means_the_mean_of_its_words(begun: tuple[Any, Wording], labeller: Labeller) -> None:
    llava, wording = begun
    words = llava.get_input_embeddings().weight.detach()
    labels = torch.full((3, len(labeller.slots)), -1)
    labels[:, labeller.places["name"]] = 0  # background
    labels[1:, labeller.places["name"]] = 5
    labels[1, labeller.places["color"]] = 2
    labels[2, labeller.places["eater"]] = 0  # names another thing
    name, color = labeller.slots["name"][5], labeller.slots["color"][2]
    expected = [["empty"], [name, color], [name]]
    meant = Meanings(labeller, wording, words)(labels)
    for row, said in zip(meant, expected, strict=True):
        ids = [token for word in said for token in wording.ids(f" {word}")]
        torch.testing.assert_close(row, words[ids].mean(0))


def test_the_weights_solve_the_ridge_regression(begun: tuple[Any, Wording], labeller: Labeller) -> None:
    llava, wording = begun
    projector = llava.model.multi_modal_projector
    ridge = 1e-2
    explained = fit_projector(llava, wording, labeller, 4, 40, ridge)
    assert 0.02 < explained < 1, "even an untrained tower tells things from the background"
    meanings = Meanings(labeller, wording, llava.get_input_embeddings().weight.detach())
    patches, wanted = _pairs(llava, labeller, meanings, 4, "train", 40)
    with torch.no_grad():
        hidden = projector.act(projector.linear_1(patches)).double()
        left = wanted - hidden @ projector.linear_2.weight.T.double() - projector.linear_2.bias.double()
    ones = torch.ones(len(hidden), 1, dtype=torch.float64)
    gram = torch.cat([hidden, ones], 1).square().mean(0).mean()
    pull = hidden.T @ left / len(left)
    torch.testing.assert_close(pull, ridge * gram * projector.linear_2.weight.T.double(), rtol=1e-2, atol=1e-6)
    half = projector.linear_1.out_features // 2
    torch.testing.assert_close(projector.linear_1.weight[:half], -projector.linear_1.weight[half : 2 * half])


def test_reading_compares_things_in_the_picture_with_others(begun: tuple[Any, Wording], labeller: Labeller) -> None:
    """A model that says exactly what the picture shows reads with probability 1."""
    llava, wording = begun
    shown: list[set[str]] = []
    names = [name for name in labeller.slots["name"] if name.islower() and name.isalpha()]

    def told(**inputs: Any) -> SimpleNamespace:
        logits = torch.zeros(1, 1, llava.config.text_config.vocab_size)
        index = next(i for i in indices)
        scene = sample(0, index, "val", modality="image")
        shown.append({thing.name for thing in scene.things} & set(names))
        logits[..., [wording.ids(f" {name}")[0] for name in shown[-1]]] = 1.0
        return SimpleNamespace(logits=logits)

    some = [
        index
        for index in range(12)
        if {thing.name for thing in sample(0, index, "val", modality="image").things} & set(names)
    ]
    indices = iter(some)
    assert reading(told, wording, labeller, 12) == 1.0
    assert len(shown) == len(some) > 2 and all(shown)


def test_a_fitted_projector_takes_the_place_of_the_first_stage(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf, tower = files
    line = f"--out {tmp_path} --minutes 9 --batch 2 --workers 0 --gguf {gguf} --tower {tower} --rank 2 --alpha 4"
    more = "--slots 20 --log-every 1 --device cpu --fit 8 --checks 2 --call-minutes 0"
    args: argparse.Namespace = parser().parse_args(f"{line} {more}".split())
    monkeypatch.setattr(packing, "LENGTH", 1280)
    counts: list[int] = []
    monkeypatch.setattr(Seeing, "validate", lambda self: counts.append(self.count) or {})
    ticks = iter(range(10**6))
    clock = SimpleNamespace(time=lambda: 60.0 * next(ticks))
    monkeypatch.setattr("training.loop.time", clock)
    monkeypatch.setattr(command, "time", clock)
    assert train(args) is False
    assert "explained" in json.loads(capsys.readouterr().out)
    first = torch.load(tmp_path / "fitted.pt", weights_only=True)
    assert first["step"] == 1
    assert set(first["modules"]) == {"projector", "tower", "heads", "lora"}
    assert train(args) is False
    assert not capsys.readouterr().out, "a checkpoint is not fitted again"
    assert torch.load(tmp_path / "fitted.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "projector.pt").exists()
    assert set(counts) == {2}
