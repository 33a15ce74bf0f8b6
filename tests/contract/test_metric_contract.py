"""What every metric owes: [B, N, D] -> float32 [B, N], deterministic, batch invariant, finite or refused."""

import pytest
import torch
from metrics_on_a_model import create

from qapbench import UserError, VisionTokens, metrics

each_metric = pytest.mark.parametrize("name", metrics.names())


@each_metric
def test_shape_dtype_and_determinism(name: str, tokens: VisionTokens) -> None:
    x = tokens.projected
    before = x.clone()
    scores = create(name, x.shape[-1])(x)
    assert scores.shape == (3, 49)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, create(name, x.shape[-1])(x))
    assert torch.equal(x, before), "the input was changed"
    assert scores.std() > 0


@each_metric
def test_a_batch_changes_nothing(name: str, tokens: VisionTokens) -> None:
    measure = create(name, tokens.projected.shape[-1])
    alone = torch.cat([measure(tokens.projected[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(measure(tokens.projected), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in metrics.names() if metrics.create(name).batched])
@pytest.mark.parametrize("shape", [(144, 192), (49, 40), (16, 7), (7, 640)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_keeps_the_bits(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    measure, images = metrics.create(name), torch.randn(9, *shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    alone = [measure(images[index : index + 1]) for index in range(len(images))]
    for count in range(1, len(images) + 1):
        together = measure.each([images[index : index + 1] for index in range(count)])
        assert all(map(torch.equal, together, alone[:count]))


@each_metric
def test_permuting_tokens_permutes_scores(name: str, tokens: VisionTokens) -> None:
    measure = create(name, tokens.projected.shape[-1])
    order = torch.randperm(49, generator=torch.Generator().manual_seed(1))
    permuted, scores = measure(tokens.projected[:, order]), measure(tokens.projected)[:, order]
    # A mean over the tokens is summed in another order, of which a softmax makes more where it is next to nothing.
    torch.testing.assert_close(permuted, scores, rtol=1e-5, atol=1e-8 * float(scores.abs().max()))


@each_metric
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_refused(name: str, bad: float, tokens: VisionTokens) -> None:
    x = tokens.projected.clone()
    x[1, 2, 3] = bad
    with pytest.raises(UserError, match=rf"metric '{name}': tokens: 1 of {x.numel()} values are not finite"):
        metrics.create(name)(x)


@each_metric
def test_wrong_input_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"expected tokens \[B, N, D\], got \(4, 8\)"):
        metrics.create(name)(torch.zeros(4, 8))
    with pytest.raises(UserError, match="expected a floating tensor"):
        metrics.create(name)(torch.zeros(1, 4, 8, dtype=torch.long))


@each_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype, tokens: VisionTokens) -> None:
    x = tokens.projected.to(dtype)
    scores = create(name, x.shape[-1])(x)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, create(name, x.shape[-1])(x.float()))


@each_metric
@pytest.mark.parametrize("shape", [(2, 1, 96), (1, 5, 1), (1, 3, 300)])
def test_odd_sizes(name: str, shape: tuple[int, ...]) -> None:
    """One token, one channel, a width that the group size does not divide."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    scores = create(name, x.shape[-1])(x)
    assert scores.shape == shape[:2]
    assert torch.isfinite(scores).all()


@each_metric
def test_layout_does_not_matter(name: str, tokens: VisionTokens) -> None:
    """Up to the order of summation, which may follow the strides."""
    strided = tokens.projected.mT.contiguous().mT
    assert not strided.is_contiguous()
    measure = create(name, tokens.projected.shape[-1])
    torch.testing.assert_close(measure(strided), measure(tokens.projected), rtol=1e-5, atol=1e-6)


@each_metric
def test_identical_and_zero_tokens_get_equal_scores(name: str) -> None:
    for x in (torch.zeros(2, 6, 32), torch.full((2, 6, 32), -2.5)):
        scores = create(name, x.shape[-1])(x)
        assert torch.isfinite(scores).all()
        assert (scores == scores[0, 0]).all()
