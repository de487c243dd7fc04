"""A real browser for tests of our HTML pages: headless Chromium, without a network."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = 360, 1280
"""Widths of a page in CSS pixels."""
BEYOND = """() => [...document.querySelectorAll("body *")].filter(element => {
  for (let above = element.parentElement; above; above = above.parentElement)
    if (/auto|scroll/.test(getComputedStyle(above).overflowX)) return false;
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.right > innerWidth + 0.5;
}).map(element => element.outerHTML.slice(0, 120))"""
"""What sticks out on the right, and no scroll container of its own holds."""


@dataclass(frozen=True)
class OpenPage:
    """A page that is open in the browser, and what it has done so far."""

    page: Any
    """Playwright's `Page`."""
    errors: list[str] = field(default_factory=list)
    """Messages of the console that are errors or warnings, and uncaught exceptions."""
    requests: list[str] = field(default_factory=list)
    """Addresses of everything that was asked for but the file itself."""

    def beyond(self) -> list[str]:
        """The beginning of each element that sticks out of the window on the right."""
        wide: list[str] = self.page.evaluate(BEYOND)
        if self.page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            wide.append("the page scrolls sideways")
        return wide

    def outline(self) -> str:
        """The accessibility tree, as YAML: a line for each role and its name."""
        text: str = self.page.locator("body").aria_snapshot()
        return text


OpenPageFunction = Callable[..., OpenPage]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The browser of this session; the tests are skipped where there is none."""
    place = next((found for name in NAMES if (found := shutil.which(name))), None)
    if place is None:
        pytest.skip(f"no browser is here (looked for {', '.join(NAMES)})")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    # Chromium refuses its sandbox to root; the pages are our own.
    words = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=place, args=words)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPageFunction]:
    """`open_page(path, width=360)`: open a file, with no network there."""
    contexts = []

    def open_(
        path: Path, *, width: int = DESK, height: int = 800, offline: bool = True, **options: Any
    ) -> OpenPage:
        """Open a file; `options` are those of playwright's `Browser.new_context`."""
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, offline=offline, **options)
        contexts.append(context)
        opened = OpenPage(context.new_page())
        address = path.resolve().as_uri()

        def hear(message: Any) -> None:
            if message.type in ("error", "warning"):
                opened.errors.append(message.text)

        def see(request: Any) -> None:
            if request.url != address:
                opened.requests.append(request.url)

        opened.page.on("console", hear)
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on("request", see)
        opened.page.goto(address, wait_until="load")
        return opened

    yield open_
    for context in contexts:
        context.close()
