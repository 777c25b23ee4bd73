"""What the chat page costs a reader and the server: `make bench-web` (`python -m tests.web.figures` in .venv-web).

first paint: of `/` on this machine, in browsers that have never seen it, in turns with a page of one word from a server
that does nothing else: what the browser takes for any page. weight: bytes over the wire. long tasks: of
the page (PerformanceObserver), while an answer of 21,000 tokens streams at the rate of --step and is then scrolled
through. stall: the most that the server's loop did between two of its ticks of a millisecond while ten pages stream, by
the time of its thread; and the latest that a tick was by the clock, of which the thread waits a part for a processor:
on a machine with few cores the browser has them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from playwright.sync_api import Browser, Page, sync_playwright

from tests.web.conftest import CHROMIUM, Server, ask, done, serving

OBSERVE = (
    "window.long = []; new PerformanceObserver((list) => list.getEntries().forEach((entry) =>"
    " long.push(Math.round(entry.duration)))).observe({type: 'longtask', buffered: true})"
)


PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


class OneWord(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"<!doctype html><title>bare</title><p>bare"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def one_word() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OneWord) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def opened(browser: Browser, server: Server) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.goto(server.url)
    page.wait_for_selector("body[data-ready=yes]")
    return page


def first_paint(browser: Browser, server: Server, times: int) -> None:
    paints, bare, weight = [], [], 0
    with one_word() as other:
        for _ in range(times):
            page = opened(browser, server)
            paints.append(page.evaluate(PAINT))
            weight = page.evaluate("performance.getEntries().reduce((sum, one) => sum + (one.transferSize ?? 0), 0)")
            page.context.close()
            page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
            page.goto(other)
            page.wait_for_function(PAINT)
            bare.append(page.evaluate(PAINT))
            page.context.close()
    print(f"first paint of /       {statistics.median(paints):6.0f} ms (median of {times}; {max(paints):.0f} at most)")
    print(f"of a page of one word  {statistics.median(bare):6.0f} ms ({max(bare):.0f} at most)")
    print(f"weight of /            {weight / 1000:6.1f} kB", flush=True)


def long_tasks(browser: Browser, server: Server) -> None:
    page = opened(browser, server)
    page.evaluate(OBSERVE)
    ask(page, "long 360", wait=False)
    page.wait_for_selector("#send:visible", timeout=500_000)
    done(page)
    streaming = page.evaluate("long.splice(0)")
    for place in [at / 20 for at in range(20, -1, -1)] + [at / 20 for at in range(21)]:
        page.evaluate(f"scroller.scrollTop = scroller.scrollHeight * {place}")
        page.wait_for_timeout(60)
    scrolling = page.evaluate("long")
    print(f"a long answer          {page.locator('.stats').inner_text()}")
    for name, found in (("streams", streaming), ("is scrolled", scrolling)):
        longest = f", the longest {max(found)} ms" if found else ""
        print(f"long tasks as it {name:<12}{len(found)} over 50 ms{longest}", flush=True)
    page.context.close()


def stalls(browser: Browser, server: Server, count: int, paragraphs: int) -> None:
    pages = [opened(browser, server) for _ in range(count)]
    # The renderer has started, and the model knows what it will say: that is the test's own work.
    ask(pages[0], f"long {paragraphs}", wait=False)
    pages[0].wait_for_selector(".message .rendered figure")
    pages[0].keyboard.press("Escape")
    done(pages[0])
    pages[0].click("#new")
    server.stalls()
    for page in pages:
        ask(page, f"long {paragraphs}", wait=False)
    for page in pages:
        page.wait_for_selector("#send:visible", timeout=500_000)
    found = server.stalls()
    busiest, latest = found["busiest"], found["latest"]
    print(
        f"stall with {count} pages   {busiest['worked']:6.1f} ms of the loop's own work at a time at most, "
        f"{busiest['collected']:.1f} of them garbage"
    )
    print(
        f"late by the clock      {latest['late']:6.0f} ms at most: {latest['worked']:.1f} of own work, "
        f"{latest['queued']:.0f} in the queue for a processor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.web.figures", description=__doc__)
    parser.add_argument("--only", choices=("paint", "tasks", "stalls"), nargs="+", default=["paint", "tasks", "stalls"])
    parser.add_argument("--times", type=int, default=9, help="browsers that see the page for the first time")
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--paragraphs", type=int, default=60, help="of each of the pages' answers")
    parser.add_argument("--step", default="0.004", help="seconds of a step, that is of a token (default: %(default)s)")
    args = parser.parse_args()
    with serving("--step", args.step) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        if "paint" in args.only:
            first_paint(browser, server, args.times)
        if "tasks" in args.only:
            long_tasks(browser, server)
        if "stalls" in args.only:
            stalls(browser, server, args.pages, args.paragraphs)
        browser.close()


if __name__ == "__main__":
    main()
