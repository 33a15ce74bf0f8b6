"""GPTQ, AWQ, SmoothQuant and LLM.int8() against their formulas, written out in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qapbench import CalibrationSamples, Format, Scaling, Tokens, ptqs
from qapbench.quantize.calibration import Calibration
from qapbench.strategies.ptq.awq import best_clip
from qapbench.strategies.ptq.gptq import GPTQ, inverse_root
from qapbench.strategies.ptq.llm_int8 import Int8Rows, Mixed, int8_rows

WIDTH, OUT, TOKENS = 24, 10, 60


def inputs(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """Channels of very different size, correlated with each other."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=draw)
    return torch.randn(tokens, WIDTH, generator=draw) @ mix * torch.logspace(-1, 1, WIDTH)


def weights(seed: int = 1) -> Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(seed))


def grid(row: np.ndarray, bits: int) -> tuple[float, float]:
    """(scale, zero point) of asymmetric levels whose range holds zero."""
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, np.round(-low / scale)


def on_grid(value: float, scale: float, zero: float, bits: int) -> float:
    return (np.clip(np.round(value / scale) + zero, 0, 2**bits - 1) - zero) * scale


def gptq_oracle(w: np.ndarray, gram: np.ndarray, bits: int, size: int, damping: float, static: bool) -> np.ndarray:
    """Row by row by the optimal brain quantizer's update: no blocks, and an inverse anew for every column."""
    width = w.shape[1]
    hessian = gram + damping * gram.diagonal().mean() * np.eye(width)
    w, done = w.copy(), np.zeros_like(w)
    original = w.copy()
    for column in range(width):
        inverse = np.linalg.inv(hessian[column:, column:])
        start = column - column % size
        for row in range(len(w)):
            if column == start:
                source = original if static else w
                ranges = grid(source[row, start : start + size], bits)
                if row == 0:
                    known = []
                known.append(ranges)
            value = on_grid(w[row, column], *known[row], bits)
            done[row, column] = value
            w[row, column:] -= (w[row, column] - value) / inverse[0, 0] * inverse[0]
    return done


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("size", "block"), [(WIDTH, 128), (8, 128), (8, 5), (6, 4), (10, 7)])
def test_gptq_is_the_optimal_update_column_by_column(size: int, block: int, static: bool) -> None:
    """Whatever the block, groups take their ranges from weights with every correction in them."""
    x, w = inputs(), weights()
    wanted = gptq_oracle(w.double().numpy(), (x.double().T @ x.double()).numpy(), 4, size, 0.01, static)
    method = GPTQ(block=block, static_groups=static)
    ours = method.solve(w, x.T @ x, Format(bits=4, group_size=size))
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_changes_the_output_less_than_rounding(bits: int) -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, 8, generator=draw) @ torch.randn(8, WIDTH, generator=draw)  # channels that say the same
    x, w, format = x + 0.1 * torch.randn(TOKENS, WIDTH, generator=draw), weights(), Format(bits=bits)
    ours = GPTQ().solve(w, x.T @ x, format)
    assert ((ours - w) @ x.T).norm() < 0.8 * ((format(w) - w) @ x.T).norm()


def test_gptq_where_inputs_are_zero_or_do_not_span() -> None:
    x, w = inputs(tokens=3), weights()
    x[:, 4] = 0
    ours = GPTQ().solve(w, x.T @ x, Format(bits=4))
    assert torch.isfinite(ours).all()
    assert (ours[:, 4] == 0).all()
    upper = inverse_root(torch.zeros(5, 5) + torch.ones(5, 5), 0.0)  # rank one, undamped
    assert torch.isfinite(upper).all()


class Block(nn.Module):
    """A norm that feeds two linears, and a linear that none feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.left, self.right = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.out(torch.relu(self.left(y)) * self.right(y))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(3)
    made = Block().requires_grad_(False)
    made.norm.weight.copy_(torch.logspace(-1, 1.5, WIDTH))
    return made


def linears_of(block: Block) -> dict[str, nn.Linear]:
    return {"left": block.left, "right": block.right, "out": block.out}


SAMPLES = [inputs(seed)[:20] for seed in range(4)]
W4 = Format(bits=4, group_size=8)
W8A8 = Format(bits=8, symmetric=True)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_smoothquant_is_equation_4(alpha: float, block: Block) -> None:
    plans = ptqs.create("smoothquant", alpha=alpha).prepare(block, linears_of(block), W8A8, W8A8, SAMPLES)
    seen = torch.cat([block.norm(x) for x in SAMPLES]).double()
    both = torch.cat([block.left.weight, block.right.weight]).double()
    wanted = seen.abs().amax(0) ** alpha / both.abs().amax(0) ** (1 - alpha)
    for name in ("left", "right"):
        transform = plans[name].transform
        assert isinstance(transform, Scaling)
        torch.testing.assert_close(transform.scale.double(), wanted, rtol=1e-5, atol=1e-6)
    assert plans["out"].transform is None


def test_awq_takes_the_best_scale_of_the_grid(block: Block) -> None:
    plans = ptqs.create("awq", clip=False).prepare(block, linears_of(block), W4, None, SAMPLES)
    x = torch.cat([block.norm(sample) for sample in SAMPLES]).double()
    mean = x.abs().mean(0)
    errors, scales = [], []
    for step in range(20):
        scale = (mean ** (step / 20)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        left, right = ((W4(linear.weight * scale).double() / scale) for linear in (block.left, block.right))
        # The smallest module that holds both is the block itself.
        y = (torch.relu(x @ left.T) * (x @ right.T)) @ block.out.weight.double().T
        plain = torch.cat([block(sample) for sample in SAMPLES])
        errors.append(float((y - plain).square().sum()))
        scales.append(scale)
    transform = plans["left"].transform
    assert isinstance(transform, Scaling)
    found = [float((transform.scale - scale).abs().max()) < 1e-4 for scale in scales]
    assert errors[found.index(True)] == pytest.approx(min(errors), rel=1e-4)
    assert errors[0] > min(errors), "nothing to gain: the case shows nothing"


def test_awq_clips_where_it_helps() -> None:
    x, w = inputs(), weights()
    w[:, 3] *= 6  # an outlier in a channel that sees little
    limits = best_clip(w, x, W4).double()
    for row in range(OUT):
        for group in range(WIDTH // 8):
            part = slice(8 * group, 8 * group + 8)
            top = float(w[row, part].abs().max())
            errors = []
            for step in range(10):
                limit = top * (1 - step / 20)
                off = W4(w[row : row + 1, part].clamp(-limit, limit)).double() - w[row, part].double()
                errors.append(float((off @ x[:, part].double().T).square().sum()))
            taken = round((1 - float(limits[row, group]) / top) * 20)
            assert errors[taken] == pytest.approx(min(errors), rel=1e-3)
    assert (limits < w.abs().unflatten(1, (-1, 8)).amax(-1) - 1e-6).any()


def test_awq_leaves_query_and_key_unclipped() -> None:
    names = {"q_proj": 0, "k_proj": 0, "v_proj": 1}

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(WIDTH, OUT, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)

    torch.manual_seed(0)
    model = Attention().requires_grad_(False)
    calibration = Calibration(model, CalibrationSamples(SAMPLES))
    found = ptqs.create("awq").calibrate(calibration, dict(model.named_children()), W4, None)
    assert {name for name in names if "clip" in found[name]} == {"v_proj"}
    assert torch.equal(found["q_proj"]["scale"], found["v_proj"]["scale"])


def test_llm_int8_packs_a_row_of_zeros() -> None:
    w = torch.randn(3, 16, generator=torch.Generator().manual_seed(8))
    w[1] = 0
    packed = Int8Rows().packed(w)
    assert torch.equal(packed.dequantized(torch.float32), int8_rows(w))
    assert packed.nbytes < w.numel() * 2, "a row was kept as it is"


def test_llm_int8_is_its_formula() -> None:
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(7))
    x[0, 4, 5], x[1, 2, 11], x[1, 3, 11] = 9.0, -8.0, 2.0
    mixed = Mixed(6.0)
    out = mixed(x)
    for sample, channel in ((0, 5), (1, 11)):
        assert torch.equal(out[sample, :, channel], x[sample, :, channel]), "the outlier's channel stays exact"
        half = x[sample].half().double()
        counted = half.masked_fill(half.abs() >= 6, 0)
        scale = counted.abs().amax(dim=1, keepdim=True) / 127
        others = torch.arange(WIDTH) != channel
        wanted = (half / scale).round() * scale
        torch.testing.assert_close(out[sample][:, others].double(), wanted[:, others], rtol=0, atol=1e-5)
    assert mixed.exact is not None
    assert mixed.exact.expand(x.shape).sum() == 18


def test_llm_int8_outliers_in_padding_do_not_count() -> None:
    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(8))
    plain = Mixed(6.0)(x[:, 1:])
    x[0, 0] = 100.0
    valid = torch.tensor([[False, True, True, True, True]])
    padded = Mixed(6.0)(x, Tokens(torch.zeros_like(valid), valid))
    assert torch.equal(padded[:, 1:], plain)


def test_int8_rows_of_zeros_stay_zero() -> None:
    assert torch.equal(int8_rows(torch.zeros(2, 5)), torch.zeros(2, 5))
    assert math.isclose(float(int8_rows(torch.tensor([[127.0, 1.0]]))[0, 1]), 1.0)
