"""/live in a browser: what a page shows of a server at work, the key that it asks for, a click on a sequence."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.web.conftest import Open, Server, picture, serving

Json = dict[str, Any]
# tests/web/serve.py writes so many paragraphs: longer than a test looks.
BODY = {"messages": [{"role": "user", "content": "long 900"}], "stream": True}


def body_of(said: str, system: str = "Be brief.", most: int = 1200) -> Json:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
    return {"messages": messages, "max_tokens": most, "stream": True}


def chat(url: str, body: Json) -> None:
    """One answer, to its end."""
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}v1/chat/completions", json.dumps(body).encode(), headers)
    ) as answer:
        answer.read()


@contextmanager
def busy(url: str, key: str | None = None, count: int = 3, body: Json = BODY) -> Iterator[None]:
    """Streams that run meanwhile."""
    headers = {"Content-Type": "application/json"} | ({"X-Api-Key": key} if key else {})
    stop = threading.Event()

    def read() -> None:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}v1/chat/completions", data, headers)) as answer:
            while not stop.is_set() and answer.readline():
                pass

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("desk", 1280, "light"), ("dark", 1280, "dark"), ("phone", 390, "light")]
)
def test_it_shows_the_engine_at_work(server: Server, open_page: Open, name: str, width: int, scheme: str) -> None:
    with busy(server.url):
        page = open_page(f"{server.url}live", width=width, color_scheme=scheme, bypass_csp=True)
        page.wait_for_selector("#sequences tbody tr:nth-child(3)")
        page.wait_for_selector("#stage-words:has-text('schedule')")
        assert page.inner_text("#state") == "serving"
        # No sideways scrolling, and something on every canvas.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for canvas in ("timeline", "rows", "pages", "tree"):
            colours = page.evaluate(
                """id => { const c = document.getElementById(id);
                const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
                return new Set(new Uint32Array(d.buffer)).size; }""",
                canvas,
            )
            assert colours >= 2, canvas
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
        assert found.violations_count == 0, found.generate_report()
        picture(page, f"live-{name}")


def test_a_click_says_why_a_prefix_missed(server: Server, open_page: Open) -> None:
    with busy(server.url):
        page = open_page(f"{server.url}live")
        page.click("#sequences button.id >> nth=0")
        page.wait_for_selector("#detail h3")
        assert "prompt tokens were cached" in page.inner_text("#detail")
        # Somebody came to look when it was there already.
        assert "queued, " in page.inner_text("#detail table") and "tokens written" in page.inner_text("#detail table")
        # A page holds more than this prompt.
        assert "Too short to be cached" in page.inner_text("#detail")
        assert "writes for" in str(page.locator("#detail .spans").get_attribute("aria-label"))
        picture(page, "live-detail")
        page.keyboard.press("Escape")
        assert not page.is_visible("#detail")
        page.focus("#tree")
        page.keyboard.press("ArrowRight")
        assert "came by" in page.inner_text("#node-words")


def test_a_sequence_that_was_retracted_says_so(open_page: Open) -> None:
    """Two that grow together do not fit: 120 pages of 16 tokens."""
    body = body_of("long 900", most=1400)
    with serving("--pages", "120", "--step", "0.01") as server, busy(server.url, count=2, body=body):
        page = open_page(f"{server.url}live")
        page.wait_for_selector("#sequences td:has-text('retracted')")
        picture(page, "live-retracted")
        page.click("#sequences tr:has-text('retracted') button.id")
        page.wait_for_selector("#detail td:text-is('retracted')")
        assert "waits again for" in str(page.locator("#detail .spans").get_attribute("aria-label"))
        picture(page, "live-retracted-detail")


def test_a_prefix_that_was_evicted_says_when_and_another_where_it_differs(open_page: Open) -> None:
    words = "You know every river, hill and town of this country by its old name. " * 24
    with serving("--pages", "120", "--step", "0.005", "--live-text") as server:
        chat(server.url, body_of("first", words))
        # Nearly all pages: those of the first go.
        chat(server.url, body_of("long 60", "Other words, and many of them.", 1850))
        page = open_page(f"{server.url}live")
        with busy(server.url, count=1, body=body_of("long 20", words)):
            page.click("#sequences button.id >> nth=0")
            page.wait_for_selector("#detail h3")
            shown = page.inner_text("#detail")
            assert "Evicted" in shown and "seconds ago" in shown, shown
            picture(page, "live-evicted")
            page.keyboard.press("Escape")
        page.wait_for_selector("#sequences tbody:not(:has(tr))", state="attached")
        with busy(server.url, count=1, body=body_of("long 20", words.replace("river", "brook", 1))):
            page.click("#sequences button.id >> nth=0")
            page.wait_for_selector("#detail mark")
            shown = page.inner_text("#detail")
            assert "Differs" in shown and "brook" in shown and "river" in shown, shown
            picture(page, "live-differs")


def test_a_key_is_asked_for_and_a_wrong_one_told(open_page: Open) -> None:
    with serving("--key", "secret") as server:
        page = open_page(f"{server.url}live")
        page.wait_for_selector("#key")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-error:has-text('does not take')")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#state:text-is('serving')")
        assert not page.is_visible("#key-form")
        page.reload()
        page.wait_for_selector("#state:text-is('serving')")
        server.kill()
        page.wait_for_selector("#problem:visible")
        assert page.inner_text("#state") == "no connection"
        server.start()
        page.wait_for_selector("#state:text-is('serving')")
        assert not page.is_visible("#problem")
