"""A real Chromium, without a window, for the tests of pages. `make browser` installs it where it can."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright, expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STYLE_OF_MAPS = "Applying inline style violates"
"""plotly wants to add one for its maps, and the page's policy refuses that."""

TIMEOUT_MS = 30_000


def chromium() -> str:
    """The path of the program."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    raise RuntimeError(f"no browser among {', '.join(NAMES)}: run `make browser`, or install Chromium")


@asynccontextmanager
async def start_browser() -> AsyncIterator[Browser]:
    """The program; it ends with the block."""
    expect.set_options(timeout=TIMEOUT_MS)
    async with async_playwright() as playwright:
        # As root, as in a container, Chromium has no sandbox; what it opens here is our own.
        browser = await playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        await browser.close()


@asynccontextmanager
async def open_page(
    browser: Browser,
    width: int = 1280,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
    scale: float = 1.0,
) -> AsyncIterator[tuple[Page, list[str]]]:
    """A page, and what it complained about so far: errors of scripts and of the console, files from elsewhere."""
    complaints: list[str] = []
    context = await browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
    )
    context.set_default_timeout(TIMEOUT_MS)
    page = await context.new_page()
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("console", lambda said: complaints.extend(_errors(said)))
    page.on("request", lambda asked: complaints.extend(_strangers(asked)))
    try:
        yield page, complaints
    finally:
        await context.close()


def _errors(said: ConsoleMessage) -> list[str]:
    is_error = said.type == "error" and not said.text.startswith(STYLE_OF_MAPS)
    return [f"console: {said.text}"] if is_error else []


def _strangers(asked: Request) -> list[str]:
    is_here = asked.url.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))
    return [] if is_here else [f"elsewhere: {asked.url}"]
