"""DART against its rule taken literally, in float64, and VTW's layer."""

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given

from qapbench import VisionTokens, pruners
from qapbench.strategies.pruners.dart import least_alike

LEAD = 1e-5  # float32 may decide otherwise below it


def best(values: oracle.Array, most: int) -> tuple[list[int], float]:
    """The `most` highest values' places, the highest first, and the smallest lead of one over the next."""
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    leads = [values[a] - values[b] for a, b in itertools.pairwise(order[: most + 1])]
    return order[:most], min(leads, default=np.inf) / max(np.abs(values).max(), 1e-30)


def turns(image: oracle.Array, pivots: oracle.Array, kept: list[int], keep: int) -> tuple[set[int], float]:
    """What is kept when pivots take their turns, and the smallest lead of a token taken over one that is not.

    Args:
        image: [N, D] the image's tokens.
        pivots: [P, D] the pivots in the order of their turns.
        kept: tokens that are kept already.
        keep: tokens to keep.
    """
    taken, lead = set(kept), np.inf
    share, more = divmod(keep - len(kept), len(pivots))
    for turn, pivot in enumerate(pivots):
        likeness = {token: float(image[token] @ pivot) for token in range(len(image)) if token not in taken}
        order = sorted(likeness, key=lambda token: (likeness[token], token))
        size = share + (turn < more)
        if 0 < size < len(order):
            lead = min(lead, likeness[order[size]] - likeness[order[size - 1]])
        taken |= set(order[:size])
    return taken, lead


def images(seed: int, count: int, words: int = 6, batch: int = 2) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=draw)

    return VisionTokens(
        projected=normal(count, 12),
        prompt_embeds=normal(words, 12),
        rotated_keys=normal(count, 8),
        text_keys=normal(words, 8),
        final_states=normal(count, 12),
        text_states=normal(words, 12),
    )


FIELDS = {
    "dart": ("rotated_keys", "text_keys", "final_states", "text_states"),
    "dart_projected": ("projected", "prompt_embeds", "projected", "prompt_embeds"),
}


@given(
    st.sampled_from(sorted(FIELDS)),
    st.integers(0, 2**32 - 1),
    st.integers(2, 40),
    st.integers(1, 7),
    st.integers(0, 5),
    st.booleans(),
    st.data(),
)
def test_each_pivot_takes_its_turn(
    method: str, seed: int, count: int, words: int, text: int, fused: bool, data: Any
) -> None:
    """Its source: llava/model/language_model/modeling_llama_self.py of ZichenWen1/DART at 5a19452."""
    keep = data.draw(st.integers(1, count - 1), label="keep")
    first = data.draw(st.integers(1, 5), label="image pivots")
    tokens = images(seed, count, words)
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    pruner = pruners.create(method, image_pivots=first, text_pivots=text)
    got = pruner.select(tokens, keep, sensitivity).indices
    for image in range(2):
        keys, said, states, spoken = (tokens.require(name, "test")[image].double().numpy() for name in FIELDS[method])
        norm = oracle.min_max(np.abs(keys).sum(axis=1)[None])[0]
        if sensitivity is not None:
            norm = 0.7 * norm + 0.3 * oracle.min_max(sensitivity[image].double().numpy()[None])[0]
        own, lead = best(norm, min(first, keep))
        other, second = best(np.abs(said).sum(axis=1), min(text, words))
        states, spoken = oracle.unit(states), oracle.unit(spoken)
        pivots = np.concatenate([states[own], spoken[other]])
        kept, third = turns(states, pivots, own, keep)
        if min(lead, second, third) > LEAD:
            assert set(got[image].tolist()) == kept


def test_a_released_budget_gives_every_pivot_as_many() -> None:
    """4 + 8 * 16 of 576: each of eight pivots takes 16, in the order in which they are given."""
    draw = torch.Generator().manual_seed(0)
    cosine, kept = torch.rand(1, 8, 576, generator=draw), torch.tensor([[3, 500, 17, 42]])
    order = least_alike(cosine, kept, 132)
    assert order[0, :4].tolist() == kept[0].tolist()
    assert len(set(order[0].tolist())) == 132
    free = cosine[0, 0].clone()
    free[kept[0]] = 9.0
    assert set(order[0, 4:20].tolist()) == set(free.topk(16, largest=False).indices.tolist())
    turned = least_alike(cosine.flip(1), kept, 132)
    assert set(turned[0].tolist()) != set(order[0].tolist()), "the order of the turns counts"


@pytest.mark.parametrize("keep", [1, 3, 4])
def test_few_tokens_are_pivots_alone(keep: int) -> None:
    tokens = images(1, 30)
    norms = tokens.require("rotated_keys", "test").abs().sum(dim=-1)
    wanted = norms.topk(keep, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(pruners.create("dart").select(tokens, keep).indices, wanted)


def test_vtw_sees_whole_layers_and_the_rest_by_sensitivity() -> None:
    """Its source: llava/model/language_model/VTW.py of lzhxmu/VTW at a3d8cfc: before layer 15 of 32 all leave."""
    vtw: Any = pruners.create("vtw")
    assert vtw.stages(576, 270, 32) == [(15, 0)]
    assert vtw.stages(576, 64, 32) == [(3, 320), (4, 0)]
    assert vtw.stages(576, 16, 32) == [(1, 0)], "the first layer sees all tokens"
    assert vtw.stages(16, 15, 4) == [(3, 12)], "there is no layer left to withdraw before"
    tokens = images(2, 9, batch=1)
    sensitivity = torch.tensor([[0.0, 5.0, 1.0, 2.0, 7.0, 3.0, 6.0, 4.0, 0.5]])
    assert vtw.select(tokens, 3, sensitivity).indices.tolist() == [[1, 4, 6]]
    assert vtw.select(tokens, 3).indices.tolist() == [[0, 1, 2]]
