"""Weights that stay in the file of their checkpoint: read when they are computed with, and packed from there."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import save_clip, save_llava
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, CLIPModel

from qapbench import UserError, compress
from qapbench.errors import RunFailedError
from qapbench.models import family_of, loading
from qapbench.models.loading import left_in_files, load_model
from qapbench.models.relevance import TextTower
from qapbench.models.row_products import CACHED, SHORT, row_by_row
from qapbench.models.unread import Postponed, UnreadWeight, any_unread, narrow, present, read_all, values
from qapbench.quantize.install import full_weight
from qapbench.running.execute import make_runs
from qapbench.running.session import Session
from qapbench.running.settings import Settings
from qapbench.spec.run_spec import RunSpec

CPU = torch.device("cpu")
W4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return save_llava(tmp_path_factory.mktemp("unread") / "llava")


def loaded(folder: Path, dtype: str = "float32", scope: tuple[str, ...] = ("language",), packed: bool = True) -> Any:
    quantize = {**W4, "scope": list(scope), "storage": "packed" if packed else "unpacked"}
    spec = RunSpec.parse({"model": str(folder), "task": "none", "dtype": dtype, "quantize": quantize})
    return load_model(spec, CPU)[0]


def unread(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if isinstance(weight, UnreadWeight)}


def equal(one: Any, other: Any) -> bool:
    here, there = dict(one.named_parameters()), dict(other.named_parameters())
    return here.keys() == there.keys() and all(torch.equal(values(here[key]), values(there[key])) for key in here)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", [("language",), ("language", "projector", "vision")])
def test_what_will_be_packed_stays_in_the_file_and_has_the_same_bits(
    folder: Path, dtype: str, scope: tuple[str, ...]
) -> None:
    plain, model = (loaded(folder, dtype, scope, packed) for packed in (False, True))
    inside = {f"{name}.weight" for name in family_of(model).linears(scope) if ".layers." in name}
    assert unread(model) == inside and inside and not unread(plain)
    assert {weight.untyped_storage().nbytes() for weight in model.parameters() if isinstance(weight, UnreadWeight)} == {
        torch.finfo(getattr(torch, dtype)).bits // 8
    }
    assert equal(plain, model)
    read_all(model)
    assert not any_unread(model) and equal(plain, model)


def test_it_has_the_shape_of_the_weight_and_computes_as_the_weight(folder: Path) -> None:
    plain, model = loaded(folder, packed=False), loaded(folder)
    one, other = (each.model.language_model.layers[1].mlp.up_proj for each in (plain, model))
    weight = other.weight
    assert isinstance(weight, UnreadWeight) and isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (one.weight.shape, one.weight.dtype, one.weight.device)
    assert (weight.numel(), weight.nbytes, len(weight)) == (one.weight.numel(), one.weight.nbytes, len(one.weight))
    assert not weight.requires_grad and weight.detach() is weight
    x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(one(x), other(x))
    with torch.inference_mode(), row_by_row([one], 2), row_by_row([other], 2):
        assert torch.equal(one(x), other(x))
    assert torch.equal(weight.float().abs().amax(dim=0), one.weight.float().abs().amax(dim=0))
    assert torch.equal(torch.stack([weight, weight]), torch.stack([one.weight, one.weight]))
    assert torch.equal(full_weight(other), one.weight)
    wanted = torch.randn(5, len(weight))
    gradients = []
    for linear in (one, other):
        given = x[0].clone().requires_grad_()
        (linear(given) * wanted).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.__setitem__(0, 0.0),
        lambda weight: setattr(weight, "data", torch.zeros(weight.shape)),
    ],
)
def test_it_cannot_be_written_to(folder: Path, write: Any) -> None:
    weight = loaded(folder).model.language_model.layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="cannot be written to"):
        write(weight)


def test_weights_are_in_memory_for_a_while_only(folder: Path) -> None:
    model = loaded(folder)
    before, linears = unread(model), list(family_of(model).linears(["language"]).values())
    with pytest.raises(KeyError), present(linears[:3]):
        assert len(unread(model)) == len(before) - 3
        raise KeyError
    assert unread(model) == before


def test_a_file_that_was_changed_is_an_error(tmp_path: Path) -> None:
    model = loaded(save_llava(tmp_path / "llava"))
    path = next((tmp_path / "llava").glob("*.safetensors"))
    content = path.read_bytes()
    path.rename(path.with_suffix(".old"))  # the open file is still the one that was loaded
    path.write_bytes(bytes(len(content)))
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.read().any()
    with path.with_suffix(".old").open("r+b") as file:
        file.write(content[:8])
    os.utime(path.with_suffix(".old"), ns=(0, 0))
    with pytest.raises(RunFailedError, match="was changed while its weights were in use"):
        weight.read()


def test_a_model_whose_tensors_were_changed_while_it_was_loaded_is_loaded_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, of = [], Postponed.of

    def changed(self: Postponed, weights: Any, name: str) -> Any:
        given.append(name)
        stand_in = of(self, weights, name)
        return stand_in.clone() if stand_in is not None and name.endswith("up_proj.weight") else stand_in

    monkeypatch.setattr(Postponed, "of", changed)
    model = loaded(folder)
    assert given and not any_unread(model)
    assert equal(model, AutoModelForImageTextToText.from_pretrained(folder))


def test_runs_that_pack_and_runs_that_do_not_share_a_model(folder: Path, tmp_path: Path) -> None:
    """In any order they answer as they do alone, and the weights are read once for all that do not pack."""
    sections: list[dict[str, Any]] = [{"quantize": {**W4, "storage": "packed"}}, {}, {"quantize": W4}]
    sections.append({"quantize": {**W4, "weights": {"bits": 3}, "storage": "packed"}})
    task = {"name": "diagramqa", "limit": 1, "answers": "letter"}
    specs = [RunSpec.parse({"name": "t", "model": str(folder), "task": task, **one}) for one in sections]

    def answers(runs: Path, some: list[RunSpec], session: Session | None = None) -> list[bytes]:
        records = make_runs(some, Settings(runs, CPU), session=session)
        return [(runs / record.run_id / "answers.jsonl").read_bytes() for record in records]

    session = Session(Settings(tmp_path / "shared", CPU))
    shared = []
    for spec in specs:
        shared += answers(tmp_path / "shared", [spec], session)
    assert not any_unread(session.model(specs[1])[0])
    packs = Session(Settings(tmp_path / "packs", CPU))
    alone = [*answers(tmp_path / "packs", specs[:1], packs), *answers(tmp_path / "whole", specs[1:])]
    assert len(unread(packs.model(specs[0])[0])) == 14
    assert shared == alone
    assert shared[0] == shared[2]


def test_an_offloaded_decoder_answers_as_one_in_memory(folder: Path, tmp_path: Path) -> None:
    """In full precision, quantized, and pruned inside the decoder; its weights are in memory before and after at no
    time."""
    sections: list[dict[str, Any]] = [{}, {"quantize": W4}, {"prune": {"method": "fastv", "keep": 4}}]
    task = {"name": "diagramqa", "limit": 2, "answers": "letter"}
    specs = [RunSpec.parse({"name": "t", "model": str(folder), "task": task, **one}) for one in sections]
    found = []
    for offload in (False, True):
        settings = Settings(tmp_path / str(offload), CPU, offload=offload)
        session = Session(settings)
        records = make_runs(specs, settings, session=session)
        found.append([(settings.runs / record.run_id / "answers.jsonl").read_bytes() for record in records])
        assert len(unread(session.model(specs[0])[0])) == (14 if offload else 0)
    assert found[0] == found[1]


def test_a_model_that_accelerate_left_on_disk_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    whole = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.layers.0")
    whole += ("language_model.norm", "language_model.rotary_emb")
    places: dict[str, Any] = {f"model.{name}": "cpu" for name in whole}
    places |= {"lm_head": "cpu", "model.language_model.layers.1": "disk"}
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    with (
        pytest.raises(UserError, match=r"layers\.1\..* is not in memory: accelerate .*`--offload`"),
        compress(model, {"quantize": W4}),
    ):
        pass
    placed = AutoModelForImageTextToText.from_pretrained(folder, device_map={"": "cpu"}).eval()
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    x = {"input_ids": torch.tensor([[1, 7, 9, 30, 12]])}
    logits = []
    for one in (placed, plain):
        with torch.no_grad(), compress(one, {"quantize": W4}):
            logits.append(one(**x).logits)
    assert torch.equal(*logits)


def stored_in(folder: Path, dtype: torch.dtype) -> Path:
    """The checkpoint with its weights in another dtype."""
    for path in folder.glob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, {"format": "pt"})
    return folder


def test_a_checkpoint_of_16_bits_is_held_in_16_bits_and_computed_with_in_float32(tmp_path: Path) -> None:
    """Answers are those of a model that is all in memory in float32: packed and offloaded, with a text tower too."""
    folder = stored_in(save_llava(tmp_path / "llava"), torch.bfloat16)
    stored_in(save_clip(folder / "clip"), torch.bfloat16)
    cases: list[tuple[str, bool, dict[str, Any]]] = [
        ("unpacked", False, {"quantize": {**W4, "scope": ["language", "projector"]}}),
        ("packed", False, {"quantize": {**W4, "scope": ["language", "projector"], "storage": "packed"}}),
        ("whole", False, {}),
        ("offloaded", True, {}),
    ]
    found: dict[str, list[bytes]] = {}
    held: dict[str, set[str]] = {}
    for name, offload, section in cases:
        settings = Settings(tmp_path / name, CPU, offload=offload)
        session, specs = Session(settings), []
        for answers, prune in (("letter", {"method": "cdpruner", "keep": 4}), ("generate", None)):
            task = {"name": "diagramqa", "limit": 2, "answers": answers}
            fields = {"name": "t", "model": str(folder), "task": task, **section, **({"prune": prune} if prune else {})}
            specs.append(RunSpec.parse(fields))
        records = make_runs(specs, settings, session=session)
        found[name] = [(settings.runs / one.run_id / "answers.jsonl").read_bytes() for one in records]
        weights = dict(session.model(specs[0])[0].named_parameters())
        held[name] = {
            key for key, w in weights.items() if isinstance(w, UnreadWeight) and w.held_bytes == 2 * w.numel()
        }
    assert found["unpacked"] == found["packed"] and found["whole"] == found["offloaded"]
    outside = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    projector = {f"model.multi_modal_projector.linear_{n}.weight" for n in (1, 2)}
    tower = {key for key in held["packed"] if ".vision_tower." in key}
    assert len(tower) == 3 * 6 + 1 and held["packed"] == outside | tower
    assert held["offloaded"] == outside | tower | projector
    assert not held["unpacked"] and not held["whole"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_what_loses_no_bit_is_held_in_16_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    fits = torch.randn(40, 8, generator=generator).to(dtype).float()
    late = fits.clone()
    late[-1, -1] += 1e-7
    odd = fits.clone()
    odd[0, :3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    model = nn.ModuleList([nn.Linear(8, 40) for _ in range(4)] + [nn.Embedding(40, 8)])
    for module, value in zip(model, (fits, late, odd, fits, fits), strict=True):
        module.weight = nn.Parameter(value.clone(), requires_grad=False)
    model[4].weight = model[0].weight  # tied
    narrow(model, [model[3]])
    kinds = [isinstance(module.weight, UnreadWeight) for module in model]
    assert kinds == [True, False, True, False, True] and model[4].weight is model[0].weight
    assert torch.equal(model[2].weight.read().view(torch.int32), odd.view(torch.int32))
    ids = torch.tensor([[3, 39, 0]])
    assert torch.equal(model[4](ids), fits[ids])
    read_all(model)
    assert not any_unread(model) and model[4].weight is model[0].weight
    assert all(torch.equal(one.weight, value) for one, value in zip(model, (fits, late, odd, fits, fits), strict=True))


@pytest.mark.parametrize("tokens", [1, 5, SHORT + 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_with_a_weight_in_16_bits_have_the_same_bits(tokens: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    one, other = nn.Linear(520, CACHED // 512), nn.Linear(520, CACHED // 512)
    value = torch.randn(one.weight.shape, generator=generator).bfloat16().float()
    for linear in (one, other):
        linear.weight = nn.Parameter(value.clone(), requires_grad=False)
        linear.bias = one.bias
    narrow(other)
    assert isinstance(other.weight, UnreadWeight) and other.weight.numel() > CACHED
    x = torch.randn(rows, tokens, 520, generator=generator)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
        with row_by_row([one], rows), row_by_row([other], rows):
            assert torch.equal(one(x), other(x))


def test_a_text_tower_has_the_same_bits_whichever_way_it_is_held(tmp_path: Path) -> None:
    folder = stored_in(save_clip(tmp_path / "clip"), torch.bfloat16)
    plain, other = (TextTower(folder, 32, "cpu", narrowly) for narrowly in (False, True))
    assert any_unread(other.text) and not any_unread(plain.text)
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    assert all(torch.equal(values(w), clip.text_model.get_parameter(n)) for n, w in plain.text.named_parameters())
    texts = ["What is this?", "Where does the red fox live?", "cat"]
    for one, same in zip(plain.embed_texts(texts), other.embed_texts(texts), strict=True):
        assert torch.equal(one, same)
    patches = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.embed_patches(patches), other.embed_patches(patches))
    assert torch.equal(plain.visual_projection.weight, clip.visual_projection.weight)


AUTHORS = {"model_type": "llava_llama", "mm_vision_tower": "x"}  # in the layout of LLaVA's authors
COMPRESSED = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}}


@pytest.mark.parametrize(
    ("device", "config", "accelerate", "why"),
    [
        ("cpu", COMPRESSED, True, "it is quantized already"),
        ("cuda", COMPRESSED, True, "it is quantized already"),
        (
            "cuda",
            {"model_type": "llava_llama", "mm_vision_tower": "x"},
            True,
            "a checkpoint in its authors' layout .* before it goes to cuda",
        ),
        ("cuda", {"model_type": "llava"}, False, "without the package accelerate .* before it goes to cuda"),
        ("cuda", {"model_type": "llava"}, True, None),
        ("cpu", AUTHORS, False, None),
    ],
)
def test_a_model_that_cannot_be_offloaded_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, config: dict[str, Any], accelerate: bool, why: str | None
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: accelerate or None)
    spec = RunSpec.parse({"model": "diagram-llava", "task": "none", "quantize": {**W4, "storage": "packed"}})
    assert left_in_files(spec, torch.device(device), config, False) == ([] if why else ["language"])
    if why is None:
        assert left_in_files(spec, torch.device(device), config, True) == ["language"]
    else:
        with pytest.raises(UserError, match=f"^model: --offload has no effect on this model, because {why}"):
            left_in_files(spec, torch.device(device), config, True)
