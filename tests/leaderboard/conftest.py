"""Pages opened in a real Chromium, watched for errors and for anything that they ask the network for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """A page that shows one file."""

    page: Any
    url: str

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


class Screens:
    """One page per kind of screen, opened once: a page of its own for every test costs as much as the test."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.pages: dict[tuple[Any, ...], Any] = {}

    def page(self, width: int, height: int, scheme: str, touch: bool) -> Any:
        """A page that remembers nothing of what it showed before."""
        screen = (width, height, scheme, touch)
        if screen not in self.pages:
            size = {"width": width, "height": height}
            context = self.browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch, is_mobile=touch)
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            self.pages[screen] = context.new_page()
        return self.pages[screen]


@pytest.fixture(scope="module")
def screens(browser: Any) -> Screens:
    return Screens(browser)


@pytest.fixture
def show(screens: Screens) -> Iterator[Callable[..., Watched]]:
    """Open a page of this file; at the end of the test it must have had no error and made no request."""
    troubles: list[str] = []
    listeners: dict[Any, list[tuple[Any, str, Callable[..., Any]]]] = {}

    def leave(page: Any) -> None:
        """Stop watching what a page shows, and forget what it stored."""
        page.evaluate("() => localStorage.clear()")
        for source, event, does in listeners.pop(page):
            source.remove_listener(event, does)
        for popup in page.context.pages[1:]:
            popup.close()

    def opened(path: Path, width: int = 1280, height: int = 900, scheme: str = "light", touch: bool = False) -> Watched:
        page, url = screens.page(width, height, scheme, touch), path.resolve().as_uri()
        if page in listeners:
            leave(page)
        note = troubles.append
        listeners[page] = [
            (page, "console", lambda message: note(f"console {message.type}: {message.text}")),
            (page, "pageerror", lambda error: note(f"error: {error}")),
            (page, "dialog", lambda dialog: (note(f"dialog: {dialog.message}"), dialog.dismiss())),
            (page.context, "page", lambda popup: note(f"popup: {popup.url[:200]}")),
            (page.context, "request", lambda made: here(made.url, url) or note(f"request: {made.url[:200]}")),
        ]
        for source, event, does in listeners[page]:
            source.on(event, does)
        page.goto(url)
        watched = Watched(page, url)
        watched.settled()
        return watched

    yield opened
    for page in list(listeners):
        leave(page)
    assert troubles == []
