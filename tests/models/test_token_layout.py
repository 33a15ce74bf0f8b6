"""The mask of a layer that holds fewer columns than the prompt."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qapbench.prune.token_layout import TokenLayout, causal, cut_mask


@st.composite
def layouts(draw) -> tuple[TokenLayout, TokenLayout]:
    """(a prompt without padding, what is left of it). Rows may lose different numbers of tokens, but none its last."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    prompt = TokenLayout.of(torch.arange(length).expand(batch, -1), torch.ones(batch, length, dtype=torch.bool))
    gone = torch.tensor([[draw(st.booleans()) for _ in range(length - 1)] + [False] for _ in range(batch)])
    return prompt, prompt.without(gone)[0]


def seen(keys: TokenLayout, queries: int) -> torch.Tensor:
    """[B, Q, S], from the meaning: a query sees the tokens of its row up to itself."""
    batch, length = keys.columns.shape
    mask = torch.zeros(batch, queries, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(queries):
            own = length - queries + query
            mask[row, query, : own + 1] = keys.valid[row, : own + 1]
    return mask


@pytest.mark.parametrize("whole", ["none", "bool", "additive"])
@given(layouts=layouts(), data=st.data())
def test_a_query_sees_what_is_left_before_it(whole, layouts, data):
    prompt, keys = layouts
    batch, length = keys.columns.shape
    queries = data.draw(st.integers(1, length))
    dtype = torch.bool if whole == "bool" else torch.float32
    mask = None if whole == "none" else causal(prompt, prompt.columns.shape[1], dtype)
    short = cut_mask(mask, keys, queries, flat=False)
    if short is None:
        assert whole == "none" and keys.full
        return
    assert short.shape == (batch, 1, queries, length)
    visible = (short if short.dtype == torch.bool else short == 0)[:, 0]
    tokens = keys.valid[:, -queries:]
    assert torch.equal(visible[tokens], seen(keys, queries)[tokens])
    assert visible.any(dim=-1).all()  # also of padding: softmax over no key at all is undefined


@given(layouts=layouts())
def test_layers_that_take_flat_masks_are_told_which_columns_are_padding(layouts):
    prompt, keys = layouts
    length = keys.columns.shape[1]
    without = cut_mask(None, keys, length, flat=True)
    assert without is None if keys.full else torch.equal(without, keys.valid)
    assert torch.equal(cut_mask(prompt.valid.long(), keys, length, flat=True).bool(), keys.valid)
