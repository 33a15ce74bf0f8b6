"""Features in a spill file: what is dropped makes room for what comes, and nothing that is kept is ever overwritten."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import torch

from qapbench.prune.prompt import PrunedPrompt
from qapbench.receipt import ImageTokens
from qapbench.running.feature_cache import FeatureCache

CPU = torch.device("cpu")
PAGE = mmap.ALLOCATIONGRANULARITY


def prompt(seed: int, pages: int) -> dict[str | None, PrunedPrompt]:
    """A prompt whose features fill that many pages of the file, apart from some 500 bytes."""
    features = torch.randn((pages * PAGE - 1000) // 4, generator=torch.Generator().manual_seed(seed)).unsqueeze(0)
    return {"a": PrunedPrompt({"input_ids": torch.tensor([[seed]])}, [features], [ImageTokens(available=7)], removed=3)}


def same(one: dict[str | None, PrunedPrompt], two: dict[str | None, PrunedPrompt]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[key].features[0], two[key].features[0])
        and torch.equal(one[key].inputs["input_ids"], two[key].inputs["input_ids"])
        and (one[key].images, one[key].removed) == (two[key].images, two[key].removed)
        for key in one
    )


def length(cache: FeatureCache) -> int:
    return int(cache._file.seek(0, 2))


def test_what_is_dropped_makes_room(tmp_path: Path) -> None:
    cache = FeatureCache(0, tmp_path)
    for name, pages in (("a", 3), ("b", 1), ("c", 2)):
        cache.put(name, prompt(ord(name), pages))
    assert 5 * PAGE < length(cache) <= 6 * PAGE
    cache.drop("a")
    cache.drop("b")
    cache.put("d", prompt(1, 1))  # in the place of b: the smallest that fits
    cache.put("e", prompt(2, 2))  # in that of a, of which a page is left
    cache.put("f", prompt(3, 1))
    assert length(cache) <= 6 * PAGE
    cache.put("g", prompt(4, 1))  # there is no place left
    assert 6 * PAGE < length(cache) <= 7 * PAGE
    for name, seed, pages in (("c", ord("c"), 2), ("d", 1, 1), ("e", 2, 2), ("f", 3, 1), ("g", 4, 1)):
        assert same(cache.get(name, CPU), prompt(seed, pages)), name
    assert cache.get("a", CPU) == {}
    cache.drop("a")  # a second time is nothing
    cache.close()


def test_nothing_that_is_kept_is_overwritten(tmp_path: Path) -> None:
    """Random puts and drops: every prompt reads back, and the file is no larger than what was ever held at once."""
    draw, held, most = random.Random(0), dict[int, int](), 0
    cache = FeatureCache(0, tmp_path)
    for step in range(150):
        if held and draw.random() < 0.5:
            gone = draw.choice(sorted(held))
            cache.drop(gone)
            del held[gone]
        else:
            held[step] = draw.choice((1, 1, 2, 3, 5))
            cache.put(step, prompt(step, held[step]))
        most = max(most, sum(held.values()))
        for name in draw.sample(sorted(held), min(3, len(held))):
            assert same(cache.get(name, CPU), prompt(name, held[name]))
    assert all(same(cache.get(name, CPU), prompt(name, held[name])) for name in held)
    assert length(cache) <= 2 * most * PAGE
    cache.close()
