"""A real Chromium, driven by playwright, for the tests that look at a page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def page_at(address: str, ready: str, patience: int) -> Iterator[Any]:
    """
    A page of the browser; `elsewhere` are addresses that it asked beside the server's.

    Args:
        ready: A selector of what is there when the page can be used.
        patience: In milliseconds, for each thing that is waited for.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(patience)
        page.elsewhere = []
        page.on("request", lambda request: request.url.startswith(address) or page.elsewhere.append(request.url))
        page.goto(address)
        page.wait_for_selector(ready)
        yield page
        chromium.close()
