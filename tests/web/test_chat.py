"""The chat page by a person's hands: every flow, at desktop and phone width, with pictures to look at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Request, expect

from tests.web.conftest import Open, Server, ask, done, picture, serving

RICH = r"""## A short tour

The **quadratic formula** gives the roots of $ax^2 + bx + c = 0$:

$$
x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}
$$

| Method | Cost |
|:-------|-----:|
| Newton | \(O(k)\) |

```python
def half(x):
    return x / 2
```

1. One
2. Two, see [the proof](https://example.org/proof)

\[
\begin{aligned} a &= b \\ c &= d \end{aligned}
\]"""
HOSTILE = r"""<img src=x onerror="window.hurt=1"><script>window.hurt=1</script> [a](javascript:window.hurt=1)

<iframe src="javascript:window.hurt=1"></iframe> ![x](http://127.0.0.1:9/track.png) <style>*{display:none}</style>

$\text{<img src=x onerror=window.hurt=1>}$ $\href{javascript:window.hurt=1}{x}$ $\frac{1$

```html"onload="window.hurt=1
</code></pre><script>window.hurt=1</script>
```"""
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
SIZES = {"desktop": WIDE, "phone": PHONE}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    with serving("--key", "secret-key", "--reasoning") as found:
        yield found


def answers(page: Page) -> list[str]:
    return [one.inner_text().strip() for one in page.locator(".message.assistant .rendered").all()]


def accessible(page: Page) -> None:
    """No violation of WCAG 2.1 AA."""
    # The library puts its script into the page, which the page's policy is there to forbid.
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_rich_answer(server: Server, open_page: Open, size: str, scheme: str) -> None:
    page = open_page(server.url, **SIZES[size], color_scheme=scheme, bypass_csp=True)
    picture(page, f"empty-{size}-{scheme}")
    accessible(page)
    ask(page, RICH)
    answer = page.locator(".message.assistant")
    expect(answer.locator("h4")).to_have_text("A short tour")
    expect(answer.locator("math")).to_have_count(4)
    expect(answer.locator("td")).to_have_count(2)
    expect(answer.locator("figure.code .k").first).to_have_text("def")
    assert answer.locator("a").get_attribute("href") == "https://example.org/proof"
    assert re.search(r"\d+ tokens · first after .* · .* tokens/s · prompt \d+", answer.locator(".stats").inner_text())
    answer.locator(".copy-code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "def half(x):\n    return x / 2\n"
    # Nothing is wider than the page.
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
    picture(page, f"rich-{size}-{scheme}")
    page.click("#toggle-settings")
    page.locator("#settings summary", has_text="Tools").click()
    picture(page, f"settings-{size}-{scheme}")
    accessible(page)
    page.click("#close-settings")
    if size == "phone":
        page.click("#toggle-history")
    picture(page, f"history-{size}-{scheme}")
    accessible(page)


def test_an_empty_chat_offers_what_to_ask(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    page.get_by_role("button", name="What is 17 + 25?").click()
    done(page)
    assert answers(page) == ["What is 17 + 25?"]
    assert not page.is_visible("#ideas")
    page.click("#new")
    assert page.is_visible("#ideas")
    # A draft is the user's.
    page.fill("#input", "half a question")
    page.get_by_role("button", name="What is 17 + 25?", exact=True).click()
    assert page.input_value("#input") == "half a question" and page.is_visible("#ideas")


def test_hostile_answers_stay_text(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    wanted: list[str] = []
    page.on("request", lambda request: wanted.append(request.url))
    ask(page, HOSTILE)
    text = answers(page)[0]
    for seen in (
        '<img src=x onerror="window.hurt=1">',
        "<script>window.hurt=1</script>",
        "<iframe",
        "<style>",
        "</pre>",
    ):
        assert seen in text, text
    answer = page.locator(".message.assistant .rendered")
    assert answer.locator("script, img, iframe, style, [onload], [onerror], [href^=javascript]").count() == 0
    assert page.evaluate("window.hurt") is None
    assert all(url.startswith((server.url, "blob:", "data:")) for url in wanted), wanted
    # The user's own words, and names of chats, too.
    assert page.locator(".message.user script, .message.user img, #chats script, #chats img").count() == 0


def test_branches_history_and_files(server: Server, open_page: Open, tmp_path: Path) -> None:
    page = open_page(server.url, accept_downloads=True)
    ask(page, "first words")
    assert answers(page) == ["first words"]
    page.get_by_role("button", name="Answer again").click()
    done(page)
    expect(page.locator(".message.assistant .versions")).to_contain_text("2/2")
    page.get_by_role("button", name="The version before").click()
    expect(page.locator(".message.assistant .versions")).to_contain_text("1/2")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_label("Your message").fill("other words")
    page.locator(".editing .primary").click()
    done(page)
    assert answers(page) == ["other words"]
    expect(page.locator(".message.user .versions")).to_contain_text("2/2")
    page.locator(".message.user").get_by_role("button", name="The version before").click()
    assert answers(page) == ["first words"]
    page.locator(".message.assistant").get_by_role("button", name="Copy the text").click()
    assert page.evaluate("navigator.clipboard.readText()") == "first words"

    page.click("#new")
    expect(page.locator("#attach")).to_have_attribute("aria-label", "Attach a text file")
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"in the file"})
    expect(page.locator("#files")).to_contain_text("notes.txt")
    ask(page, "about it")
    assert "in the file" in answers(page)[0] and "notes.txt" in answers(page)[0]
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"\x89PNG"})
    expect(page.locator("#toast")).to_contain_text("This model reads text only")
    page.set_input_files("#file", {"name": "x.bin", "mimeType": "", "buffer": b"\x00\xff\xfe"})
    expect(page.locator("#toast")).to_contain_text("x.bin is no text file")

    # All of it is there when the page is opened again.
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    expect(page.locator("#chats li")).to_have_count(2)
    page.fill("#search", "first words")
    expect(page.locator("#chats li")).to_have_count(1)
    page.locator("#chats .open").click()
    expect(page.locator(".message.assistant .rendered")).to_have_text("first words")
    page.get_by_role("button", name=re.compile("^Rename")).first.click()
    page.locator("#ask input[type=text]").fill("<b>Named</b>")
    page.locator("#ask .primary").click()
    page.fill("#search", "")
    expect(page.locator("#title")).to_have_text("<b>Named</b>")

    with page.expect_download() as download:
        page.click("#export")
    kept = tmp_path / "chats.json"
    download.value.save_as(kept)
    assert len(json.loads(kept.read_text())["chats"]) == 2
    for _ in range(2):
        page.locator("#chats li").first.get_by_role("button", name=re.compile("^Delete")).click()
        page.locator("#ask .danger").click()
        page.wait_for_timeout(100)
    expect(page.locator("#none")).to_have_text("No chats yet.")
    page.set_input_files("#import-file", kept)
    expect(page.locator("#chats li")).to_have_count(2)
    for bad in ("no json", "{}", '{"format": "oneloop.chats.1", "chats": [{"nodes": {"a": {"id": "a"}}}]}'):
        (tmp_path / "bad.json").write_text(bad)
        page.set_input_files("#import-file", tmp_path / "bad.json")
        expect(page.locator("#toast")).to_contain_text(re.compile("not JSON|no chats|cannot be read"))
    expect(page.locator("#chats li")).to_have_count(2)


def test_tools_schema_prompt_and_tokens(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    page.click("#toggle-settings")
    page.fill("#set-system", "Be brief.")
    page.locator("#settings summary", has_text="Tools").click()
    page.fill("#set-tools", "{")
    expect(page.locator("#set-tools-problem")).to_contain_text("not JSON")
    page.fill("#set-tools", json.dumps([{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]))
    expect(page.locator("#set-tools-problem")).to_be_hidden()
    page.locator("#settings summary", has_text="This page").click()
    page.check("#set-logprobs")
    page.fill("#set-temperature", "9")
    assert page.locator("#set-temperature").get_attribute("aria-invalid") == "true"
    ask(page, "call")
    expect(page.locator(".error")).to_contain_text("Temperature")
    page.fill("#set-temperature", "0.5")
    page.click("#close-settings")
    page.get_by_role("button", name="Try again").click()
    done(page)
    expect(page.locator(".call figcaption").last).to_contain_text("get_weather")
    assert json.loads(page.locator(".call pre").last.inner_text()) == {"city": "Paris"}
    picture(page, "call")
    page.get_by_label("Result of get_weather").last.fill("sunny")
    page.get_by_role("button", name="Send the result").last.click()
    done(page)
    assert answers(page)[-1] == "It is sunny."
    page.get_by_role("button", name="Tokens").last.click()
    page.locator(".token").nth(1).hover()
    expect(page.locator(".token-detail")).to_contain_text("%")
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token-detail code").first).to_be_visible()
    picture(page, "tokens")
    page.get_by_role("button", name="The exact prompt").last.click()
    expect(page.locator("#show pre")).to_contain_text("Be brief.")
    expect(page.locator("#show pre")).to_contain_text("sunny")
    picture(page, "prompt")
    page.keyboard.press("Escape")
    expect(page.locator("#show")).to_be_hidden()


def test_a_schema_is_sent_and_cached_tokens_are_told(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    bodies: list[dict[str, object]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/chat/completions"):
            bodies.append(request.post_data_json)

    page.on("request", note)
    page.click("#toggle-settings")
    page.locator("#settings summary", has_text="Tools").click()
    page.fill("#set-schema", "[]")
    expect(page.locator("#set-schema-problem")).to_contain_text("is an object")
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    page.fill("#set-schema", json.dumps(schema))
    expect(page.locator("#set-schema-problem")).to_be_hidden()
    page.fill("#set-temperature", "0.5")
    page.click("#close-settings")
    words = '{"city": "Oslo"} ' + "and so on " * 20
    ask(page, words)
    assert bodies[-1]["response_format"]["json_schema"]["schema"] == schema and bodies[-1]["temperature"] == 0.5
    expect(page.locator(".stats")).not_to_contain_text("cached")
    ask(page, "More")
    expect(page.locator(".stats").last).to_contain_text(re.compile(r"prompt \d+, \d+ cached"))
    picture(page, "cached")
    # Back to what the server does by itself.
    page.click("#toggle-settings")
    page.get_by_role("button", name="Back to defaults").click()
    page.fill("#set-schema", "")
    page.click("#close-settings")
    ask(page, "Again")
    assert "response_format" not in bodies[-1] and "temperature" not in bodies[-1]


def test_a_long_chat_is_read_again_in_slices(server: Server, open_page: Open) -> None:
    """All of it at once, from what the browser kept: it has to be whole and in order."""
    page = open_page(server.url)
    ask(page, "long 120", wait=False)
    page.wait_for_selector("#send:visible", timeout=120_000)
    done(page)
    written = page.locator(".message.assistant .rendered").inner_html()
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    page.locator("#chats .open").click()
    expect(page.locator(".message.assistant .rendered")).to_contain_text("END")
    done(page)
    again = page.locator(".message.assistant .rendered").inner_html()
    text = re.sub(r"<[^>]*>|\s", "", again)
    assert text == re.sub(r"<[^>]*>|\s", "", written)
    assert re.findall(r"Paragraph(\d+)of", text) == [str(n) for n in range(1, 121) if n % 5 != 4]


def test_a_key_and_reasoning(keyed: Server, open_page: Open) -> None:
    page = open_page(keyed.url, ready=False)
    page.locator("#ask input[type=password]").fill("wrong")
    picture(page, "key")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#ask")).to_contain_text("does not take this API key")
    page.locator("#ask input[type=password]").fill("secret-key")
    page.get_by_role("button", name="Use this key").click()
    page.wait_for_selector("body[data-ready=yes]")
    ask(page, "<think>\nLet me **think**.</think>\n\nThe answer.")
    expect(page.locator(".message.assistant .body > .rendered")).to_have_text("The answer.")
    thoughts = page.locator(".reasoning")
    assert thoughts.get_attribute("open") is None
    thoughts.locator("summary").click()
    expect(thoughts.locator("strong")).to_have_text("think")
    picture(page, "reasoning")
    # The key is in this tab only, and goes with it.
    assert page.evaluate("localStorage.getItem('oneloop.key')") is None


def test_stop_and_a_server_that_goes_away(open_page: Open) -> None:
    with serving("--step", "0.03") as server:
        page = open_page(server.url)
        ask(page, "long 40", wait=False)
        expect(page.locator(".message.assistant .rendered")).to_contain_text("Paragraph")
        page.keyboard.press("Escape")
        done(page)
        expect(page.locator(".note")).to_contain_text("You stopped it.")
        page.click("#new")
        ask(page, "long 12", wait=False)
        expect(page.locator(".message.assistant .rendered")).to_contain_text("Paragraph 1 ")
        server.kill()
        expect(page.locator(".error")).to_contain_text("went away")
        assert "Paragraph 1" in answers(page)[0]
        picture(page, "gone")
        server.start()
        page.get_by_role("button", name="Go on from here").click()
        done(page)
        text = answers(page)[0]
        assert text.endswith("END") and text.count("Paragraph 1 ") == 1 and "Paragraph 12 " in text


def test_a_long_answer_has_no_long_tasks(server: Server, open_page: Open) -> None:
    """Told, not asserted: a busy machine has long tasks of its own. But it has to end, and be whole."""
    page = open_page(server.url)
    page.evaluate(
        "window.long = []; new PerformanceObserver((list) => list.getEntries().forEach((entry) =>"
        " long.push(Math.round(entry.duration)))).observe({type: 'longtask'})"
    )
    ask(page, "long 360", wait=False)
    page.wait_for_selector("#send:visible", timeout=400_000)
    expect(page.locator(".message.assistant .rendered")).to_contain_text("END", timeout=60_000)
    for place in (0, 0.3, 0.6, 1):
        page.evaluate(f"scroller.scrollTop = scroller.scrollHeight * {place}")
        page.wait_for_timeout(200)
    assert page.locator(".message.assistant figure.code").count() == 72
    print(page.locator(".stats").inner_text(), "long tasks (ms):", page.evaluate("long"))


def test_first_paint_and_weight(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    sizes = page.evaluate(
        "performance.getEntries().filter((one) => one.transferSize).map((one) => [one.name, one.transferSize])"
    )
    weight = sum(size for _, size in sizes)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"first paint {paint:.0f} ms, {weight} bytes over the wire, {len(sizes)} requests")
    assert weight < 150_000
