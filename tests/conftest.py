"""Shared fixtures: keep this file small."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from qapbench import VisionTokens


def make_tokens(batch: int = 3, grid: tuple[int, int] = (7, 7), seed: int = 0) -> VisionTokens:
    """Random visual tokens with every field present; images of one batch differ in everything."""
    draw = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=draw)

    known = VisionTokens(
        projected=normal(count, 96) * (1 + 3 * torch.rand(batch, count, 1, generator=draw)),
        patches=normal(count, 40),
        cls_attention=normal(count).softmax(dim=-1),
        keys=normal(count, 32),
        heads=4,
        cls_token=normal(40),
        image_embeds=normal(count, 24),
        text_embeds=normal(2, 24),
        prompt_embeds=normal(5, 96),
        last_cls_attention=normal(count).softmax(dim=-1),
        last_keys=normal(count, 32),
        attention_received=normal(count).softmax(dim=-1),
        middle_attention_received=normal(count).softmax(dim=-1),
        query_attention=normal(count).softmax(dim=-1),
        text_attention=normal(count, 5).softmax(dim=1),
        embedded=normal(2 * count, 96),
        grid=grid,
        image_ids=tuple(f"image-{seed}-{index}" for index in range(batch)),
    )
    return dataclasses.replace(  # newer fields are drawn last, so that the older ones keep their values
        known,
        rotated_keys=normal(count, 16),
        text_keys=normal(5, 16),
        final_states=normal(count, 96),
        text_states=normal(5, 96),
        context_attention=normal(count).softmax(dim=-1),
        shallow_cls_attention=normal(count).softmax(dim=-1),
        downsampled=normal(96, *grid),
    )


@pytest.fixture
def tokens() -> VisionTokens:
    """B=3, N=49 (7 x 7), D=96."""
    return make_tokens()


@pytest.fixture(scope="session")
def tokens_of() -> Callable[..., VisionTokens]:
    """`make_tokens`, for tests that choose the batch, the grid or the seed."""
    return make_tokens


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors on a shared machine: waiting for a second thread costs ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many blocks of the documentation were run, if its tests were."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        counts.update(dict(report.user_properties).get("blocks", {}))
    if counts:
        said = ", ".join(f"{number} {how}" for how, number in sorted(counts.items()))
        terminalreporter.write_line(f"blocks of code in README and docs: {said}")
