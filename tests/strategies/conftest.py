"""Hypothesis here: no deadline on a shared machine, the same examples every time."""

import pytest
from hypothesis import settings

settings.register_profile("qapbench", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("qapbench")


@pytest.fixture(autouse=True, scope="module")
def _fast(one_thread: None) -> None:
    """Every test of this folder runs on one thread."""
