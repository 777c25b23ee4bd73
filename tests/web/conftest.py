"""A real Chromium against a real server: `make test-web`, in a virtual environment of its own.

Nothing of ours is imported here but the server's process. Pictures of the pages are left in tests/web/pictures, for
people to look at (ONELOOP_PICTURES names another place).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
# The environment that serves; the Makefile says where it is.
PYTHON = os.environ.get("ONELOOP_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
PICTURES = Path(os.environ.get("ONELOOP_PICTURES", Path(__file__).parent / "pictures"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
START_BOUND_S = 120.0

Open = Callable[..., Page]


class Server:
    """The server's process. url: its address, which it keeps when it is started again."""

    def __init__(self, *flags: str) -> None:
        self._flags = flags
        self.process: subprocess.Popen[str] | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        command = [PYTHON, "-m", "tests.web.serve", "--port", str(self.port), *self._flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        watchdog = threading.Timer(START_BOUND_S, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line, "the server did not start"
        self.port = int(line)

    def stalls(self) -> dict[str, dict[str, float]]:
        """latest, busiest: a Stall of tests/web/serve.py each; from the last call on."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        found: dict[str, dict[str, float]] = json.loads(self.process.stdout.readline())
        return found

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    server = Server(*flags)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium); CHROMIUM names another one")
    with sync_playwright() as playwright:
        # Root in a container has no sandbox; the pages are this server's own.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page in a browser that has never seen it. Anything that goes wrong in it fails the test."""
    wrong: list[str] = []
    contexts = []

    def opened(url: str, *, width: int = 1280, height: int = 860, ready: bool = True, **options: object) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        # Answers that are errors, and servers that are gone, are part of the tests.
        page.on("console", lambda message: message.type == "error" and "Failed to load" not in message.text
                and "ERR_" not in message.text and wrong.append(message.text))  # fmt: skip
        page.goto(url)
        if ready:
            page.wait_for_selector("body[data-ready=yes]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, wrong


def picture(page: Page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def ask(page: Page, text: str, *, wait: bool = True) -> None:
    """Send a message; wait for the whole answer."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    if wait:
        done(page)


def done(page: Page) -> None:
    """Wait until no answer runs and all of it is rendered."""
    page.wait_for_selector("#send:visible")
    page.wait_for_selector(".message .rendered[aria-busy=true]", state="detached")
