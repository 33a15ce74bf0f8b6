"""`random`, `attention`, `top_k`, and the default methods' relation to their scores."""

import torch

from qapbench import VisionTokens, pruners, top_k


def test_top_takes_the_lower_index_on_a_tie() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_attention_is_top_k(tokens: VisionTokens) -> None:
    assert tokens.cls_attention is not None
    wanted = tokens.cls_attention.topk(10, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(pruners.create("attention").select(tokens, 10).indices, wanted)


def chosen(count: int, keep: int, seed: int, *ids: str) -> torch.Tensor:
    tokens = VisionTokens(torch.zeros(len(ids), count, 2), image_ids=ids)
    return pruners.create("random", seed=seed).select(tokens, keep).indices


def test_random_depends_on_seed_and_image_only() -> None:
    both = chosen(40, 8, 0, "a", "b")
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[1], chosen(40, 8, 0, "b")[0])
    assert not torch.equal(both[0], chosen(40, 8, 1, "a")[0])
    assert torch.equal(chosen(40, 8, 0, "a", "a")[0], chosen(40, 8, 0, "a", "a")[1])


def test_random_is_uniform() -> None:
    """2000 images, 5 of 20 positions: 500 times each, give or take 4.5 standard deviations."""
    draws = chosen(20, 5, 0, *(str(index) for index in range(2000)))
    counts = torch.bincount(draws.flatten(), minlength=20)
    assert (counts - 500).abs().max() < 4.5 * (2000 * 0.25 * 0.75) ** 0.5


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    chosen(20, 5, 0, "a")
    assert torch.equal(torch.rand(4), wanted)


def test_random_without_ids_gives_every_image_the_same_draw() -> None:
    both = pruners.create("random").select(VisionTokens(torch.zeros(2, 20, 2)), 5).indices
    assert torch.equal(both[0], both[1])
