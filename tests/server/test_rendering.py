"""Markdown to blocks: what hostile text becomes, and that a growing text ends as the whole one."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser

import pytest

from server.rendering import renderer
from server.rendering.markdown import Block, State, render
from server.rendering.mathml import MAX_FORMULA, to_mathml
from server.rendering.renderer import BusyError, Renderer, RenderError
from tests.server.support import Live, live
from tests.server.test_errors import check_shape

TAGS = frozenset(
    (
        "p", "br", "strong", "em", "s", "code", "pre", "figure", "figcaption", "button", "span", "div", "table",
        "thead", "tbody", "tr", "th", "td", "ol", "ul", "li", "blockquote", "hr", "a", "h3", "h4", "h5", "h6", "math",
        "mi", "mn", "mo", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mstyle", "merror", "mpadded", "msub",
        "msup", "msubsup", "munder", "mover", "munderover", "mtable", "mtr", "mtd", "b", "i",
    )
)  # fmt: skip
LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)


class Checker(HTMLParser):
    """What a browser would make of it: known elements, known attributes, links to the web."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("style", "src", "srcdoc", "id", "name", "srcset"), name
            if name == "href":
                assert tag == "a" and value is not None and LINK.match(value), value
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    handle_decl = unknown_decl = handle_pi = handle_comment


def check(text: str) -> Checker:
    blocks, _ = render(text, State(), final=True)
    assert sum(block.length for block in blocks) in (len(text.encode("utf-16-le")) // 2, 0), text[:80]
    checker = Checker()
    checker.feed("".join(block.html for block in blocks))
    checker.close()
    return checker


# A text, and what of it has to be there to read.
HOSTILE = [
    ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    ("a <img src=x onerror=alert(1)> b", "<img src=x onerror=alert(1)>"),
    ("<!-- x --> <?php ?> <!DOCTYPE x> <![CDATA[x]]>", "<!-- x -->"),
    ("[a](javascript:alert(1)) [b](JaVaScRiPt:x) [c](&#106;avascript:x) [d](java\tscript:x)", "a"),
    ("[x](data:text/html;base64,AAAA) [y](vbscript:x) [z](file:///etc/passwd) ![i](data:image/png;base64,AAAA)", "x"),
    ("<javascript:alert(1)> <data:text/html,x>", "javascript:alert(1)"),
    ("[x](/sleep) [y](//evil.example) [z](#a) ![i](/v1/models)", "x"),
    ('[x](https://a.example/"onmouseover="alert(1) "t\\"onx=1")', "x"),
    ("![x](https://a.example/?secret)", "[x]"),
    ("[x]\n\n[x]: javascript:alert(1)", "[x]"),
    ("```<script>\n</code></pre><script>alert(1)</script>\n```", "</code></pre><script>alert(1)</script>"),
    ('```python"onload="x\nx = "</span><script>"\n```', "</span><script>"),
    ("| <b>a</b> | b |\n|---|---|\n| </td><script>x</script> | `</table>` |", "</td><script>x</script>"),
    ("# <svg onload=alert(1)>", "<svg onload=alert(1)>"),
    ("- <iframe src=x>\n- </li></ul><script>", "</li></ul><script>"),
    (r"$\text{<img src=x onerror=alert(1)>}$ $<script>$", "<img src=x onerror=alert(1)>"),
    (r"$$\href{javascript:alert(1)}{x} \style{color:red}{y} \class{a}{z} \url{javascript:x}$$", "x"),
    (r'$\color{red"onload="x}y$ $\htmlId{a}{b}$ $\includegraphics{x}$', "y"),
    (r"\[ \begin{aligned} </math><script>alert(1)</script> \end{aligned} \]", "alert"),
    (r"$\frac{1$ and $\begin{foo}x\end{bar}$ and \(\left( x\)", r"\frac{1"),
    ("$" * 500 + "x" + "$" * 500, "x"),
    ("\0\ufffe\u202e\x1b[31m", "[31m"),
    ("\r\n\r a\rb\r\n\rc \U0001f600", "a"),
    ("&lt;script&gt; &#x3c;b&#x3e; &amp;", "<script>"),
]


@pytest.mark.parametrize(("text", "seen"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text: str, seen: str) -> None:
    assert seen in check(text).text.replace("\xa0", " ")


HUGE = {
    "words": "word " * 6_000,
    "quotes": "> said\n" * 4_000,
    "lists": "- item\n" * 4_000,
    "stars": "*a* " * 7_000,
    "links": "[a](b) " * 4_000,
    "formulas": "$x_{i}$ " * 3_500,
    "a long formula": "$$" + "x + " * 7_000 + "y$$",
    "a table": "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 3_000,
    "code": "```python\n" + "x = [1, 2]\n" * 2_500,
    "nothing": "\n" * 30_000,
}


async def test_huge_texts_end_in_time_and_leave_the_next_alone(server: Live) -> None:
    for name, text in HUGE.items():
        status, body = await server.post("/web/api/render", {"text": text})
        assert status in (200, 400), name
        if status == 400:
            assert body["error"]["param"] == "text", name
        status, body = await server.post("/web/api/render", {"text": "**x**"})
        assert (status, body["blocks"][0]["html"].strip()) == (200, "<p data-join><strong>x</strong></p>"), name


SAMPLES = [
    "# Title\n\nHello **world**, `code` and\nmore.\n\n- a\n- b\n  - c\n\n1. x\n2. y\n\n> q\n> r\n\n---\n\n\U0001f600 *",
    "text\n\n$$\n\\frac{a}{b}\n\nc\n$$\n\nand \\[ x \\] or\n\n\\[\na\n\nb\n\\]\n\n\\begin{align}\na\n\\end{align}\n\nx",
    "| a | b |\n|:--|--:|\n" + "".join(f"| {n} | cell {n} with words |\n" for n in range(200)) + "\nafter",
    "```python\n" + "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(200)) + "```\n\nafter",
    "~~~~\n" + "plain\n" * 900 + "~~~~\nx\n```\nopen",
    "".join(f"{n}. item {n} with *words* and `more`\n" for n in range(1, 200)) + "\nafter\n\n- a\n- b",
    "words and " * 1500 + "\n\nafter",
    "a\r\n\r\n```\r\nx\r\ny\r\n```\r\n\r\nb\rc",
]  # fmt: skip


def grown(text: str, step: int) -> list[Block]:
    """As the page does it: the tail from the last block on, again and again."""
    kept: list[Block] = []
    last: list[Block] = []
    units, at, state = text.encode("utf-16-le"), 0, State()
    for end in [*range(step, len(text), step), len(text)]:
        tail = units[2 * at :].decode("utf-16-le")[: end - len(units[: 2 * at].decode("utf-16-le"))]
        blocks, state = render(tail, state, final=end == len(text))
        assert sum(block.length for block in blocks) == len(tail.encode("utf-16-le")) // 2 or not tail.strip()
        kept += blocks[:-1]
        at += sum(block.length for block in blocks[:-1])
        last = blocks[-1:]
    return kept + last


def joined(blocks: list[Block]) -> str:
    """As the page shows it: what joins goes on without a seam, wherever it was cut."""
    html = "".join(
        re.sub(r"(?s)^.*?<(\w+)[^>]*data-join[^>]*>", r"<joint \1>", block.html) if block.joins else block.html
        for block in blocks
    )
    return re.sub(r"\s+|(</ol>|</p>|</code></pre></figure>|</tbody></table></div>)\s*<joint \w+>|\u2060", "", html)


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_a_growing_text_ends_as_the_whole_one(sample: str) -> None:
    whole, _ = render(sample, State(), final=True)
    short = len(sample) < 1000
    for step in (1, 7) if short else (211,):
        made = grown(sample, step)
        assert joined(made) == joined(whole)
        assert not short or [block.joins for block in made] == [block.joins for block in whole]
    # What is not kept yet stays short, however long the text is.
    assert short or max(block.length for block in whole) < 8_000


def test_what_people_write_is_read() -> None:
    seen = check(
        "| a |\n|--:|\n| 1 |\n\n```python\nx = 1\n```\n\n1. x\n\n**b** ~~s~~ $x^2$ \\(y\\) $5 and $6 <https://a.example>"
    )
    assert {"table", "td", "figure", "ol", "strong", "s", "math", "msup", "a"} <= seen.tags
    assert "$5 and $6" in seen.text and seen.links == ["https://a.example"]
    # What models write most, and what the library does not know by that name.
    for latex in (
        r"\begin{align}a&=b\tag{1}\\c&=d\end{align}", r"\begin{cases}1&x>0\\0&\text{else}\end{cases}", r"\boxed{42}",
        r"\begin{split}a&=b\end{split}", r"\operatorname{softmax}(x)", r"\mbox{x}", r"\sum_{i=1}^n", r"\dfrac12",
        r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\lim_{x\to 0}", r"\mathbb{R}^n", r"\xrightarrow{f}", r"\color{red}x",
    ):  # fmt: skip
        made = to_mathml(latex, display=True)
        assert made.startswith('<math display="block">') and "merror" not in made, latex
    assert to_mathml("x" * (MAX_FORMULA + 1), display=False).startswith("<code")


async def test_what_hangs_or_crashes_is_ended_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    good = b'{"text":"x","state":{"kind":"","before":""},"final":true}'
    made = Renderer()
    try:
        assert b"<p data-join>x</p>" in await made.render(good)
        child = made._child
        assert child is not None
        child.kill()
        assert child.wait() != 0
        assert b"<p data-join>x</p>" in await made.render(good)
        monkeypatch.setattr(renderer, "TIMEOUT_S", 0.0)
        with pytest.raises(RenderError):
            await made.render(good)
        monkeypatch.undo()
        assert b"<p data-join>x</p>" in await made.render(good)
        with pytest.raises(RenderError):
            await made.render(b"no JSON")
        monkeypatch.setattr(renderer, "MAX_WAITING", 2)
        answers = await asyncio.gather(*(made.render(good) for _ in range(5)), return_exceptions=True)
        assert [isinstance(answer, BusyError) for answer in answers] == [False, False, True, True, True]
    finally:
        made.close()
    assert made._child is None or made._child.poll() is not None


BAD = [
    ("text", {}), ("text", {"text": None}), ("text", {"text": 5}), ("text", {"text": ["x"]}),
    ("text", {"text": "x" * 32_001}), ("kind", {"text": "x", "kind": "script"}), ("kind", {"text": "x", "kind": 1}),
    ("before", {"text": "x", "before": 5}), ("before", {"text": "x", "before": "x" * 20_001}),
    ("final", {"text": "x", "final": "yes"}),
]  # fmt: skip


async def test_bad_fields_of_render(server: Live) -> None:
    for param, body in BAD:
        error = check_shape(*await server.post("/web/api/render", body))
        assert error["param"] == param, body
    status, body = await server.post("/web/api/render", {"text": ""})
    assert status == 200 and body["blocks"] == []


async def test_config_tells_what_the_api_takes() -> None:
    async with live(api_keys=("secret",)) as server:
        for path in ("/web/api/config", "/web/api/render"):
            async with server.http.get(server.url + path) as response:
                check_shape(response.status, await response.json(), expected=401)
        async with server.http.get(
            server.url + "/web/api/config", headers={"Authorization": "Bearer secret"}
        ) as response:
            config = await response.json()
    assert config["models"] == ["demo", "org/demo"] and config["max_model_len"] == 512 and config["chats"]
    controls = {control["name"]: control["schema"] for control in config["controls"]}
    assert controls["temperature"]["maximum"] == 2 and controls["top_p"]["exclusiveMinimum"] == 0
    assert controls["ignore_eos"] == {"type": "boolean"} and "reasoning_effort" not in controls
