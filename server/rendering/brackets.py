r"""\( ... \) and \[ ... \] as formulas, for markdown-it: what most models write.

The texmath plugin knows the first inside of a paragraph and the second only as a block of its own, and drops what
stands behind it on the line. Here both may stand anywhere, and tokens have dollarmath's names.
"""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

_CLOSING = {"\\(": "\\)", "\\[": "\\]"}


def brackets_plugin(markdown: MarkdownIt) -> None:
    markdown.inline.ruler.before("escape", "math_brackets", _inline)
    markdown.block.ruler.before("fence", "math_brackets", _block, {"alt": ["paragraph", "blockquote", "list"]})


def _inline(state: StateInline, silent: bool) -> bool:
    opening = state.src[state.pos : state.pos + 2]
    if (closing := _CLOSING.get(opening)) is None:
        return False
    end = state.src.find(closing, state.pos + 2, state.posMax)
    if end < 0:
        return False
    if not silent:
        token = state.push("math_inline" if opening == "\\(" else "math_inline_double", "math", 0)
        token.content = state.src[state.pos + 2 : end]
        token.markup = opening
    state.pos = end + 2
    return True


def _block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    r"""Lines from one that begins with \[ to one that ends with \], blank ones between them too."""
    start = state.bMarks[start_line] + state.tShift[start_line]
    if state.sCount[start_line] - state.blkIndent >= 4 or not state.src.startswith("\\[", start):
        return False
    end = state.src.find("\\]", start + 2, state.eMarks[end_line - 1])
    if end < 0:
        return False
    last = start_line
    while state.eMarks[last] < end:
        last += 1
        if state.sCount[last] < state.blkIndent and state.bMarks[last] < state.eMarks[last]:
            return False
    if state.src[end + 2 : state.eMarks[last]].strip():
        # Text follows: a formula inside of a paragraph.
        return False
    if not silent:
        token = state.push("math_block", "math", 0)
        token.content = state.src[start + 2 : end]
        token.map = [start_line, last + 1]
        token.markup = "\\["
    state.line = last + 1
    return True
