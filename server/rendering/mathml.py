"""LaTeX -> MathML Core, by math-core; what comes out is written anew from a table of what MathML may be.

So nothing that a model puts into a formula can become markup of the page, whatever the library lets through. Styles
become classes: the page's policy allows no inline ones. Only the rendering child imports this.
"""

from __future__ import annotations

import html
import re
from xml.etree import ElementTree

from math_core import LatexError, LatexToMathML

# Characters; the library's depth has no limit of its own.
MAX_FORMULA = 4000
_CONVERTER = LatexToMathML(
    macros={"mbox": r"\text{#1}", "hbox": r"\text{#1}", "mathstrut": "", "nonumber": "", "notag": ""},
    ignore_unknown_commands=True,
    fancy_error=False,
    max_expansions=200,
)
_ELEMENTS = frozenset(
    (
        "math", "mi", "mn", "mo", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mstyle", "merror", "mpadded",
        "mphantom", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts", "mprescripts",
        "mtable", "mtr", "mtd", "ms", "none", "b", "i", "em", "strong", "code",
    )
)  # fmt: skip

_ATTRIBUTES = frozenset(
    (
        "display", "displaystyle", "scriptlevel", "mathvariant", "stretchy", "lspace", "rspace", "form", "fence",
        "separator", "minsize", "maxsize", "symmetric", "largeop", "movablelimits", "accent", "accentunder",
        "linethickness", "width", "height", "depth", "voffset", "columnspan", "rowspan",
    )
)  # fmt: skip

_VALUE = re.compile(r"[+-]?[\w.%-]{1,20}")
_COLOUR = re.compile(r"#[0-9A-Fa-f]{3,8}")
# A declaration of the library's styles -> the class that says the same in chat.css.
_CLASSES = {
    "text-align:left": "left",
    "text-align:right": "right",
    "padding-left:0": "flush-left",
    "padding-right:0": "flush-right",
    "border-left": "rule-left",
    "border-right": "rule-right",
    "border-top": "rule-top",
    "border-bottom": "rule-bottom",
}
# Numbers would begin with (1) in every formula.
_NUMBERED = re.compile(r"\\(begin|end)\{(align|equation|gather|multline|alignat|flalign)\}")
_OTHER_NAMES = {r"{split}": r"{aligned}", r"{eqnarray}": r"{align*}", r"{eqnarray*}": r"{align*}"}
_TAG = re.compile(r"\\tag\*?\{([^{}]*)\}")
_ENTITY = re.compile(r"&(?!amp;|lt;|gt;|quot;|apos;|#)(\w+);")


def to_mathml(latex: str, *, display: bool) -> str:
    """A <math> element, or the source as text where it is no formula that can be read."""
    source = latex.strip()
    if source and len(source) <= MAX_FORMULA:
        prepared = _TAG.sub(r"\\qquad\\text{(\1)}", _NUMBERED.sub(r"\\\1{\2*}", source))
        for name, other in _OTHER_NAMES.items():
            prepared = prepared.replace(name, other)
        try:
            made = _CONVERTER.convert_with_local_state(prepared, displaystyle=display)
            tree = ElementTree.fromstring(_ENTITY.sub(lambda found: html.unescape(found[0]), made))
        except (LatexError, ElementTree.ParseError):
            pass
        else:
            return _write(tree)
    kind = "math-source block" if display else "math-source"
    return f'<code class="{kind}">{html.escape(latex)}</code>'


def _write(node: ElementTree.Element) -> str:
    inner = html.escape(node.text or "")
    for child in node:
        inner += _write(child) + html.escape(child.tail or "")
    if node.tag == "menclose":
        # MathML Core has none: a box, or a line through it, is drawn by the sheet.
        kind = "boxed" if node.get("notation") == "box" else "struck"
        return f'<mrow class="{kind}">{inner}</mrow>'
    if node.tag not in _ELEMENTS:
        return inner
    attributes = "".join(f' {name}="{value}"' for name, value in _attributes(node))
    return f"<{node.tag}{attributes}>{inner}</{node.tag}>"


def _attributes(node: ElementTree.Element) -> list[tuple[str, str]]:
    kept = [(name, value) for name, value in node.items() if name in _ATTRIBUTES and _VALUE.fullmatch(value)]
    classes = ["unknown"] if node.tag == "merror" else []
    for declaration in node.get("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "color" and _COLOUR.fullmatch(value):
            kept.append(("mathcolor", value))
        elif (known := _CLASSES.get(f"{name}:{value}") or _CLASSES.get(name)) is not None:
            classes.append(known)
    return [*kept, ("class", " ".join(classes))] if classes else kept
