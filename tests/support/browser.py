"""A headless Chromium for tests of pages; skipped where there is none.

Playwright drives the browser of the system (`apt-get install chromium`), not one of its own.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Seen:
    """A page, with what it said to the console and asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __call__(self, script: str, value: object = None) -> Any:
        """Evaluate a script in the page."""
        return self.page.evaluate(script, value)

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector))


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start the system's Chromium, or skip the test and say why."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Any, file: Path, *, width: int = 1400, **context: Any) -> Iterator[Seen]:
    """Open a file in a context of its own."""
    made = browser.new_context(viewport={"width": width, "height": 900}, **context)
    seen = Seen(made.new_page())
    seen.page.on("console", lambda said: seen.errors.append(said.text))
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    try:
        seen.page.goto(file.as_uri())
        yield seen
    finally:
        made.close()


def axe() -> str:
    """Return the script of axe-core, which looks for what shuts people out."""
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    return (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
