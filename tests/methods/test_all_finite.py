"""Whether all values are numbers, in every dtype, wherever the one that is not stands."""

import pytest
import torch

from qapbench.methods.tokens import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 8, 33, 1000])
def test_one_value_that_is_no_number_is_found(dtype: torch.dtype, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    assert all_finite(values)
    for at in {0, count // 2, count - 1}:
        for odd in (torch.nan, torch.inf, -torch.inf):
            assert not all_finite(values.index_fill(0, torch.tensor(at), odd))


def test_large_values_and_none_are_fine() -> None:
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.full((1000,), largest))
    assert all_finite(torch.tensor([largest, -largest]))
    assert all_finite(torch.empty(0))
