"""The scores that a sensitivity has to beat: they know what they say they know, and nothing else."""

import pytest
import torch

from qapbench import VisionTokens, metrics
from qapbench.spec.spec_file import load_spec


@pytest.fixture(autouse=True)
def _registered() -> None:
    """Loading the spec registers its plugin."""
    assert len(load_spec("controls")) == 7


def test_a_constant_is_one(tokens: VisionTokens) -> None:
    assert torch.equal(metrics.create("constant")(tokens.projected), torch.ones(3, 49))


def test_noise_is_uniform_and_of_the_token_alone(tokens: VisionTokens) -> None:
    x = torch.randn(4, 1000, 64, generator=torch.Generator().manual_seed(3))
    scores = metrics.create("noise", seed=1)(x)
    assert scores.min() >= 0
    assert scores.max() < 1
    assert scores.mean() == pytest.approx(0.5, abs=0.02)
    assert scores.var() == pytest.approx(1 / 12, abs=0.005)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(4))
    assert torch.equal(metrics.create("noise", seed=1)(x[2:3, order]), scores[2:3, order])
    other = metrics.create("noise", seed=2)(x)
    assert abs(float(torch.corrcoef(torch.stack([scores.flatten(), other.flatten()]))[0, 1])) < 0.05


def test_the_least_variance_is_the_opposite(tokens: VisionTokens) -> None:
    x = tokens.projected
    assert torch.equal(metrics.create("least_variance")(x), -metrics.create("variance")(x))
