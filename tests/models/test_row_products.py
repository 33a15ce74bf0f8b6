"""Rows side by side have the bits that they have alone."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from qapbench.models.row_products import row_by_row
from qapbench.models.tower import unread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(
    ("rows", "length", "width"), [(16, 1, 512), (7, 1, 1376), (5, 1, 33), (3, 2, 64), (9, 40, 192)]
)
def test_activations(name: str, dtype: torch.dtype, rows: int, length: int, width: int) -> None:
    """Also of widths that leave a remainder of a vector, and of batches that are split among threads."""
    activation = ACT2FN[name]
    x = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with row_by_row([activation], rows):
        together = activation(x)
    assert torch.equal(together, torch.cat([activation(row) for row in x.split(1)]))


@pytest.mark.parametrize("bias", [False, True])
def test_linears(bias: bool) -> None:
    linear = nn.Linear(96, 320, bias=bias).requires_grad_(False)
    x = torch.randn(11, 1, 96)
    with row_by_row([linear], len(x)):
        together = linear(x)
    alone = []
    for row in x.split(1):
        with row_by_row([linear], 1):
            alone.append(linear(row))
    assert torch.equal(together, torch.cat(alone))


def test_an_unread_layer_runs_only_where_hooks_watch_it() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))]
    x, calls = torch.randn(2, 4), []
    layers[1][0].register_forward_pre_hook(lambda module, args: calls.append(module))
    with unread(layers):
        assert torch.equal(layers[0](x), x)
        assert not torch.equal(layers[1](x), x)
    assert calls == [layers[1][0]]
    assert not torch.equal(layers[0](x), x)
