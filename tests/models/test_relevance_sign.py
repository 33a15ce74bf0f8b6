"""The sign of relevance comes from the text tower, and the receipt says which and why."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import save_clip, save_llava
from transformers import AutoModelForImageTextToText

from qapbench import UserError, compress, pruners
from qapbench.checkpoints.find import EMBEDDED
from qapbench.models.relevance_sign import KNOWN, TowerSign, tower_sign
from qapbench.receipt import Receipt

SIGNED = ["cdpruner", "trim"]


def folder_with(place: Path, **config: Any) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("hub_id", sorted(KNOWN))
def test_openai_clips_are_known_by_any_of_their_names(hub_id: str, tmp_path: Path) -> None:
    """The name in config.json with and without owner and slash, the folder's, and that of the hub's cache."""
    short = hub_id.rpartition("/")[2]
    cache = tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "0123abcd"
    places = [
        folder_with(tmp_path / "a", _name_or_path=hub_id),
        folder_with(tmp_path / "b", _name_or_path=f"{short}/"),
        folder_with(tmp_path / short),
        folder_with(cache),
    ]
    for place in places:
        assert tower_sign(place) == TowerSign("negative", f"as known of {hub_id}", True)


def test_the_config_comes_before_the_table(tmp_path: Path) -> None:
    place = folder_with(tmp_path / "tower", _name_or_path="openai/clip-vit-base-patch16", relevance_sign="positive")
    found = tower_sign(place)
    assert (found.value, found.known) == ("positive", True)
    assert "config.json" in found.reason


def test_an_unknown_tower_has_the_sign_of_the_released_codes(tmp_path: Path) -> None:
    for name, config in (("x", {}), ("clip", {"_name_or_path": "laion/clip-vit-large-patch14-336-laion2b"})):
        found = tower_sign(folder_with(tmp_path / name, **config))
        assert (found.value, found.known) == ("negative", False)


@pytest.mark.parametrize(
    "text, told", [('{"relevance_sign": "upwards"}', "'upwards'"), ("[1]", "is not a mapping"), ("{", "cannot be read")]
)
def test_a_config_that_says_nonsense_is_one_sentence(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="text_tower") as caught:
        tower_sign(tmp_path)
    assert told in str(caught.value)


def test_the_embedded_tower_says_positive() -> None:
    assert tower_sign(EMBEDDED / "diagram-llava" / "clip").value == "positive"


@pytest.mark.parametrize("name", SIGNED)
def test_auto_is_the_sign_of_the_tokens(name: str, tokens_of: Callable[..., Any]) -> None:

    tokens = tokens_of()
    auto, positive, negative = (
        pruners.create(name, relevance_sign=sign).relevance for sign in ("auto", "positive", "negative")
    )
    aligned = dataclasses.replace(tokens, relevance_sign="positive")
    assert torch.equal(auto(tokens), negative(tokens))
    assert torch.equal(auto(aligned), positive(aligned))
    assert torch.equal(negative(aligned), -positive(tokens))
    assert aligned[0].relevance_sign == aligned.take(torch.tensor([1])).relevance_sign == "positive"
    with pytest.raises(UserError, match="relevance_sign"):
        dataclasses.replace(tokens, relevance_sign="auto")


def kept_by(model: Any, tower: Path, inputs: dict[str, Any], method: Any) -> tuple[list[int], Receipt]:
    """The tokens that a method keeps of one image, and the receipt."""
    seen: list[Any] = []
    spec = {"prune": {"method": method, "keep": 5}}
    with compress(model, spec, text_tower=str(tower), on_images=seen.append) as receipt, torch.inference_mode():
        model(**inputs, relevance_text=["a red cat"])
    return seen[0][0].indices.tolist(), receipt


@pytest.mark.parametrize("name", SIGNED)
def test_what_the_tower_says_chooses_the_tokens(name: str, model: Any, one: dict[str, Any], tmp_path: Path) -> None:
    """The same weights under three configs: what is kept follows the field, and the spec's own sign overrules it."""
    towers = {}
    for said in ("negative", "positive", None):
        towers[said] = save_clip(tmp_path / str(said) / "tower")
        config = json.loads((towers[said] / "config.json").read_text())
        config.pop("relevance_sign", None)
        (towers[said] / "config.json").write_text(json.dumps(config | ({"relevance_sign": said} if said else {})))
    kept = {said: kept_by(model, tower, one, name) for said, tower in towers.items()}
    assert kept["positive"][0] != kept["negative"][0] == kept[None][0]
    for said in ("negative", "positive"):
        receipt = kept[said][1]
        assert receipt.relevance_sign == f"{said}: said by the text tower's config.json"
        assert receipt.fallbacks == []
        explicit, receipt = kept_by(model, towers[None], one, {name: {"relevance_sign": said}})
        assert explicit == kept[said][0]
        assert (receipt.relevance_sign, receipt.fallbacks) == (f"{said}: said by the spec", [])
    unknown = kept[None][1]
    assert unknown.relevance_sign is not None
    assert unknown.fallbacks == [f"relevance_sign: {unknown.relevance_sign.replace(': ', ', ')}"]


def test_without_a_tower_the_sign_is_said_too(model: Any, one: dict[str, Any], tmp_path: Path) -> None:
    bare = AutoModelForImageTextToText.from_pretrained(save_llava(tmp_path / "bare")).eval()
    with compress(bare, {"prune": {"method": "cdpruner", "keep": 5}}) as receipt:
        pass
    assert (receipt.relevance_sign or "").startswith("negative: as in the released codes; nothing is known")
    with compress(model, {"prune": {"method": "attention", "keep": 5}}) as receipt:
        pass
    assert receipt.relevance_sign is None
