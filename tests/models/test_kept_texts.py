"""Embeddings of questions on disk."""

from pathlib import Path

import pytest
import torch
from llava_checkpoints import save_clip
from safetensors.torch import load_file

from qapbench.models.kept_texts import KeptTexts
from qapbench.models.relevance import TextTower


def test_what_is_kept_is_found_again_and_nothing_else(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    made = {text: torch.randn(1, size, 6, generator=draw) for text, size in (("what?", 1), ("why\ud800", 2))}
    first = KeptTexts(tmp_path, "tower", "cpu")
    assert first.of(["what?"]) == {}
    first.keep({})
    assert not first.folder.exists()
    first.keep(made)
    found = KeptTexts(tmp_path, "tower", "cpu").of([*made, "who?"])
    assert list(found) == list(made)
    assert all(torch.equal(found[text], made[text]) for text in made)
    assert KeptTexts(tmp_path, "another tower", "cpu").of([*made]) == {}
    assert KeptTexts(tmp_path, "tower", "cuda").of([*made]) == {}
    (file,) = first.folder.iterdir()
    assert not any("what" in name for name in load_file(file)), "no text is stored"


def test_a_damaged_file_counts_as_not_there(tmp_path: Path) -> None:
    kept = KeptTexts(tmp_path, "tower", "cpu")
    kept.keep({"one": torch.ones(1, 1, 4)})
    (file,) = kept.folder.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1]), b"{}" + whole[2:]):
        file.write_bytes(damaged)
        again = KeptTexts(tmp_path, "tower", "cpu")
        assert again.of(["one"]) == {}
        again.keep({"two": torch.zeros(1, 1, 4)})
        assert list(KeptTexts(tmp_path, "tower", "cpu").of(["one", "two"])) == ["two"]
    kept.keep({"one": torch.ones(1, 1, 4)})
    assert torch.equal(KeptTexts(tmp_path, "tower", "cpu").of(["one"])["one"], torch.ones(1, 1, 4))


def test_a_tower_embeds_a_text_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second tower, as in another process, reads what the first embedded, and embeds the rest."""
    folder, root, device = save_clip(tmp_path / "clip"), tmp_path / "texts", torch.device("cpu")
    texts = ["what is this", "is this a", "a b " * 30, "b"]
    alone = TextTower(folder, 32, device).embed_texts(texts)
    TextTower(folder, 32, device).embed_texts(texts[:3], KeptTexts(root, "tower", "cpu"))
    second, embedded = TextTower(folder, 32, device), list[int]()
    embed = second._embed
    monkeypatch.setattr(second, "_embed", lambda rows: [embedded.append(len(rows)), embed(rows)][1])
    found = second.embed_texts(texts, KeptTexts(root, "tower", "cpu"))
    assert embedded == [1]
    assert all(map(torch.equal, found, alone))
    assert len(list(KeptTexts(root, "tower", "cpu").folder.iterdir())) == 2
