import pytest


@pytest.fixture(autouse=True, scope="module")
def _fast(one_thread: None) -> None:
    """Every test of this folder runs on one thread."""
