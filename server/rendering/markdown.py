"""Markdown -> blocks of HTML, so that an answer that grows is rendered by its tail alone.

A block that another one follows will not change any more: the page keeps it, and sends what begins with the last one.
Long code, tables, lists and paragraphs are cut into pieces that the page joins again; `State` is what the rest of one
needs to be read as such. HTML in the text stays text, links lead to the web only, and images are links. Pure; only the
rendering child imports this.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from server.rendering.brackets import brackets_plugin
from server.rendering.mathml import MAX_FORMULA, to_mathml

# Characters: a piece of something long is about this long, a block that cannot be cut is text from here on.
PIECE = 2000
MAX_BLOCK = 24_000
_LINE = re.compile(r"[^\n]*(?:\n|\Z)")
_LONE_RETURN = re.compile(r"\r(?!\n)")
_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})(.*)")
_WEB_LINK = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)
_LANGUAGE = re.compile(r"[\w+#.-]{1,32}")
# What opens a formula that may span blocks.
_OPEN_MATH = re.compile(r"\s*(?:\$\$|\\\[|\\begin\{)")
# Keeps the rest of a paragraph from being read as the start of anything else, and is not seen.
_JOINER = "\u2060"


@dataclass(frozen=True, slots=True)
class State:
    """What the text goes on with. kind: fence, table, list or paragraph, "" for none. before: put before the text."""

    kind: str = ""
    before: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """length: of its source, in UTF-16 units as JavaScript counts. joins: its container goes on in the block before."""

    html: str
    length: int
    joins: bool


def render(text: str, state: State, *, final: bool) -> tuple[list[Block], State]:
    """The blocks of a text that goes on from `state`, and the state that the source of the last of them begins with.

    final: nothing follows.
    """
    # Lines end as they do for the parser, which counts them.
    source = _LONE_RETURN.sub("\n", state.before + text)
    pieces: list[_Piece] = []
    for start, end, tokens in _top_level(source):
        if not final and _is_open_math(source[start:end], tokens) and len(source) - start < MAX_FORMULA:
            pieces.append(_Piece(start, _plain(source[start:], "p")))
            break
        pieces.extend(_pieces(source, start, end, tokens))
    skipped = len(state.before)
    blocks = []
    for index, piece in enumerate(pieces):
        # The first takes what lies before it.
        start = skipped if index == 0 else piece.start
        end = pieces[index + 1].start if index + 1 < len(pieces) else len(source)
        joins = piece.goes_on or (index == 0 and state.kind != "" and piece.kind == state.kind)
        blocks.append(Block(piece.html, _utf16(source[max(start, skipped) : end]), joins))
    if not pieces:
        return blocks, state
    last = pieces[-1]
    if len(pieces) == 1:
        return blocks, state
    return blocks, State(last.kind, last.before) if last.goes_on else State()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A block, or a part of one. goes_on: it belongs to the piece before. before: what makes its source readable."""

    start: int
    html: str
    kind: str = ""
    before: str = ""
    goes_on: bool = False


def _utf16(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)


# ---- blocks


def _top_level(source: str) -> Iterator[tuple[int, int, list[Token]]]:
    """Each block of the document: where its source starts and ends, and its tokens."""
    starts = [found.start() for found in _LINE.finditer(source)] + [len(source)]
    tokens: list[Token] = []
    for token in _MARKDOWN.parse(source, {}):
        tokens.append(token)
        if token.level == 0 and token.nesting <= 0:
            first, last = tokens[0].map or (0, 0)
            yield starts[min(first, len(starts) - 1)], starts[min(last, len(starts) - 1)], tokens
            tokens = []


def _is_open_math(source: str, tokens: list[Token]) -> bool:
    return tokens[0].type == "paragraph_open" and _OPEN_MATH.match(source) is not None


def _pieces(source: str, start: int, end: int, tokens: list[Token]) -> Iterator[_Piece]:
    kind = tokens[0].type
    if kind == "fence":
        yield from _code_pieces(source, start, end, tokens[0])
    elif kind == "table_open":
        yield from _row_pieces(source, start, end, tokens)
    elif kind in ("bullet_list_open", "ordered_list_open"):
        yield from _item_pieces(source, start, end, tokens)
    elif kind == "paragraph_open" and end - start > 2 * PIECE:
        yield from _text_pieces(source, start, end)
    elif end - start > MAX_BLOCK:
        yield _Piece(start, _plain(source[start:end], "pre"))
    else:
        name = "paragraph" if kind == "paragraph_open" else ""
        yield _Piece(start, _html(tokens), name)


def _code_pieces(source: str, start: int, end: int, token: Token) -> Iterator[_Piece]:
    opened = _FENCE.match(source, start)
    language = token.info.strip().split()[0] if token.info.strip() else ""
    if opened is None:
        yield _Piece(start, _code(token.content, language))
        return
    # What the rest of this code is read behind.
    before = f"{opened[2]}{language}\n"
    body = source.find("\n", start) + 1 or end
    lines = _lines(token.content)
    first, at = True, start
    source_lines = _lines(source[body:end])
    for count in _cuts(lines):
        content = "".join(lines[:count])
        del lines[:count]
        size = sum(map(len, source_lines[:count]))
        del source_lines[:count]
        here = body + size if lines else end
        yield _Piece(at, _code(content, language), "fence", before, not first)
        first, at, body = False, here, here
    if first:
        yield _Piece(start, _code("", language), "fence", before)


def _cuts(lines: list[str]) -> Iterator[int]:
    """How many lines are in each piece: cut where a line is blank, if there is one in the second half of it."""
    rest = list(lines)
    while rest:
        size, count, blank = 0, 0, 0
        for line in rest:
            size, count = size + len(line), count + 1
            if size >= PIECE and not line.strip():
                blank = count
            if blank or size >= 2 * PIECE:
                break
        yield count
        del rest[:count]


def _row_pieces(source: str, start: int, end: int, tokens: list[Token]) -> Iterator[_Piece]:
    rows = [token.map[0] for token in tokens if token.type == "tr_open" and token.map is not None]
    starts = [found.start() for found in _LINE.finditer(source)]
    head = source[start : starts[rows[1]]] if len(rows) > 1 else ""
    lead, body = _table_parts(tokens)
    at, first, size, kept = start, True, 0, []
    for index, row in enumerate(body):
        size += len(row)
        kept.append(row)
        last = index + 1 == len(body)
        if not last and (size < 2 * PIECE or len(head) > PIECE):
            continue
        following = end if last else starts[rows[index + 2]]
        yield _Piece(at, _table(lead, kept), "table", head, not first)
        at, first, size, kept = following, False, 0, []
    if first:
        yield _Piece(start, _table(lead, []), "table", head)


def _table_parts(tokens: list[Token]) -> tuple[str, list[str]]:
    """The HTML of the head, and that of each row of the body."""
    inside = next((index for index, token in enumerate(tokens) if token.type == "tbody_open"), len(tokens) - 1)
    head = _html(tokens[1:inside])
    rows, row = [], []
    for token in tokens[inside + 1 :]:
        if token.type in ("tbody_close", "table_close"):
            break
        row.append(token)
        if token.type == "tr_close":
            rows.append(_html(row))
            row = []
    return head, rows


def _table(head: str, rows: Sequence[str]) -> str:
    # Wide ones scroll by themselves, and by the keyboard.
    body = f"<tbody data-join>{''.join(rows)}</tbody>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>{head}{body}</table></div>'


def _item_pieces(source: str, start: int, end: int, tokens: list[Token]) -> Iterator[_Piece]:
    items: list[list[Token]] = []
    for token in tokens[1:-1]:
        if token.type == "list_item_open" and token.level == 1:
            items.append([])
        items[-1].append(token)
    lines = [found.start() for found in _LINE.finditer(source)] + [len(source)]
    starts = [lines[item[0].map[0]] if item[0].map else start for item in items] + [end]
    at, first, kept = start, True, []
    for index, item in enumerate(items):
        kept += item
        following = starts[index + 1]
        if following - at < PIECE and index + 1 < len(items):
            continue
        opening = tokens[0].copy()
        opening.attrs = dict(tokens[0].attrs)
        opening.attrSet("data-join", "")
        if len(source[at:following]) > MAX_BLOCK:
            # It joins nothing.
            yield _Piece(at, _plain(source[at:following], "pre"))
            first = True
        else:
            yield _Piece(at, _html([opening, *kept, tokens[-1]]), tokens[0].tag, "", not first)
            first = False
        at, kept = following, []


def _text_pieces(source: str, start: int, end: int) -> Iterator[_Piece]:
    at, first = start, True
    while at < end:
        # The last space of a piece, or wherever it ends in a text without any.
        cut = end if end - at <= 2 * PIECE else source.rfind(" ", at + PIECE, at + 2 * PIECE) + 1 or at + 2 * PIECE
        text = ("" if first else _JOINER) + source[at:cut].strip("\n")
        yield _Piece(at, f"<p data-join>{_MARKDOWN.renderInline(text)} </p>", "paragraph", _JOINER, not first)
        at, first = cut, False


def _lines(text: str) -> list[str]:
    return [found[0] for found in _LINE.finditer(text) if found[0]]


def _plain(text: str, tag: str) -> str:
    return f'<{tag} class="plain">{html.escape(text)}</{tag}>'


# ---- HTML


def _html(tokens: list[Token]) -> str:
    return str(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


@functools.lru_cache(maxsize=128)
def _lexer(language: str) -> Any:
    """None for a language that has none."""
    if not _LANGUAGE.fullmatch(language):
        return None
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


_FORMATTER = HtmlFormatter(nowrap=True)


def _code(content: str, language: str) -> str:
    """A figure with the language and a place for the page's copy button; the lines are in spans by kind of token."""
    lexer = _lexer(language.lower())
    inner = html.escape(content) if lexer is None else highlight(content, lexer, _FORMATTER)
    name = html.escape(language[:32]) or "text"
    return (
        f'<figure class="code"><figcaption><span>{name}</span>'
        f'<button type="button" class="copy-code">Copy</button></figcaption>'
        f'<pre tabindex="0"><code data-join>{inner}</code></pre></figure>'
    )


class _Renderer(RendererHTML):
    """Headings begin at the third level: the page has two of its own."""

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        token = tokens[idx]
        return _code(token.content, token.info.strip().split()[0] if token.info.strip() else "")

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _code(tokens[idx].content, "")

    def heading_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<h{_level(tokens[idx])}>"

    def heading_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"</h{_level(tokens[idx])}>\n"

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        target = str(tokens[idx].attrGet("href") or "")
        if not _WEB_LINK.match(target):
            return f'<span class="no-link" title="{html.escape(target)}">'
        return f'<a href="{html.escape(target)}" target="_blank" rel="noopener noreferrer nofollow">'

    def link_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        opened = 0
        for token in reversed(tokens[:idx]):
            if token.type == "link_open" and opened == 0:
                return "</a>" if _WEB_LINK.match(str(token.attrGet("href") or "")) else "</span>"
            opened += token.type == "link_close"
            opened -= token.type == "link_open"
        return "</span>"

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """Never loaded: where an image comes from is told to whoever has written its address."""
        token = tokens[idx]
        target = str(token.attrGet("src") or "")
        name = html.escape(token.content or "image")
        if not _WEB_LINK.match(target):
            return f'<span class="no-link" title="{html.escape(target)}">[{name}]</span>'
        return f'<a href="{html.escape(target)}" target="_blank" rel="noopener noreferrer nofollow">[{name}]</a>'

    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<th{_alignment(tokens[idx])}>"

    def td_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<td{_alignment(tokens[idx])}>"

    def paragraph_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        if tokens[idx].hidden:
            return self.renderToken(tokens, idx, options, env)
        return "<p data-join>" if tokens[idx].level == 0 else "<p>"

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</table></div>"


def _level(token: Token) -> int:
    return min(6, int(token.tag[1]) + 2)


def _alignment(token: Token) -> str:
    """A class in the place of the library's style, which the page's policy does not let through."""
    side = str(token.attrGet("style") or "").rpartition(":")[2]
    return f' class="{side}"' if side in ("left", "center", "right") else ""


def _inline_formula(renderer: RendererHTML, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
    return to_mathml(tokens[idx].content, display=False)


def _display_formula(renderer: RendererHTML, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
    # Not a <div>, which ends a paragraph; and not the whole block's own element, which scrolls nowhere.
    return f'<span class="formula" tabindex="0">{to_mathml(tokens[idx].content, display=True)}</span>'


def _make() -> MarkdownIt:
    markdown = MarkdownIt("js-default", {"html": False, "breaks": True, "maxNesting": 20}, renderer_cls=_Renderer)
    # "$5 and $6" is money.
    markdown.use(dollarmath_plugin, allow_space=False, allow_digits=False, allow_labels=False, double_inline=True)
    markdown.use(amsmath_plugin)
    markdown.use(brackets_plugin)
    markdown.add_render_rule("math_inline", _inline_formula)
    for name in ("math_inline_double", "math_block", "amsmath"):
        markdown.add_render_rule(name, _display_formula)
    return markdown


_MARKDOWN = _make()
