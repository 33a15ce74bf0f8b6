"""Every block of code in the README and in docs/ is run, or its page says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blocks import PAGES, ROOT, Reader, blocks_of, unlabelled

from qapbench.methods.kinds import KINDS
from qapbench.models.family import families

WITH_BLOCKS = [page for page in PAGES if any(True for _ in blocks_of(page))]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to run in, and registries that forget what the page registers."""
    for registry in (*KINDS.values(), families):
        registry.names()  # loads the plugins
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_the_page(page: Path, apart: Path, record_property: Callable[[str, Any], None]) -> None:
    reader = Reader(page, apart)
    for block in blocks_of(page):
        try:
            reader.follow(block)
        except BaseException as error:
            raise AssertionError(f"{page.relative_to(ROOT)}:{block.line}: {error!r}") from error
    record_property("blocks", dict(reader.counts))


def test_every_block_says_its_language() -> None:
    assert {str(page.relative_to(ROOT)): found for page in PAGES if (found := unlabelled(page))} == {}


def test_no_block_is_left_out_without_a_reason() -> None:
    left = [block for page in PAGES for block in blocks_of(page) if block.how != "run"]
    assert all(len(block.why.split()) >= 3 for block in left)
    ran = [block for page in PAGES for block in blocks_of(page) if block.how == "run" and block.kind != "text"]
    assert len(ran) > 2 * len(left)  # most blocks are run
