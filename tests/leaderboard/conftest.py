"""Pages opened in a real Chromium, each watched for errors and for anything that it asks the network for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Watched:
    """A page, and what went wrong on it."""

    page: Any
    url: str
    troubles: list[str] = field(default_factory=list)

    def settled(self) -> None:
        """Wait until every figure shows what was chosen last."""
        self.page.wait_for_selector(":root:not([data-drawing])", state="attached", timeout=60_000)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)


def here(url: str, page: str) -> bool:
    """Whether a request stays on this machine: the page, the CSV and JSON beside it, or what the page made itself."""
    beside = {page, *(f"{page.removesuffix('.html')}.{kind}" for kind in ("csv", "json"))}
    return url.partition("#")[0] in beside or url.startswith(("data:", "blob:"))


def absent(what: str) -> None:
    """Without a browser the page is not tested: that is fine on a laptop and a failure in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is needed for the page's tests in CI")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = "/usr/bin/chromium" if Path("/usr/bin/chromium").exists() else None
    found = found or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        absent("chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Watched]]:
    """Open a page of this file; at the end of the test it must have had no error and made no request."""
    pages: list[Watched] = []

    def opened(path: Path, width: int = 1280, height: int = 900, scheme: str = "light", touch: bool = False) -> Watched:
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch, is_mobile=touch)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        watched = Watched(context.new_page(), path.resolve().as_uri())
        pages.append(watched)
        note = watched.troubles.append
        watched.page.on("console", lambda message: note(f"console {message.type}: {message.text}"))
        watched.page.on("pageerror", lambda error: note(f"error: {error}"))
        watched.page.on("dialog", lambda dialog: (note(f"dialog: {dialog.message}"), dialog.dismiss()))
        context.on("page", lambda popup: popup == watched.page or note(f"popup: {popup.url[:200]}"))
        context.on("request", lambda request: here(request.url, watched.url) or note(f"request: {request.url[:200]}"))
        watched.page.goto(watched.url)
        watched.settled()
        return watched

    yield opened
    for watched in pages:
        watched.page.context.close()
    assert [trouble for watched in pages for trouble in watched.troubles] == []
