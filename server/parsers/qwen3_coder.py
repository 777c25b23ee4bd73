"""Tool calls of Qwen3-Coder and later Qwen: `<function=name><parameter=key>value</parameter></function>` in a tag.

Values are bare text on lines of their own; what they are in JSON is looked up in the tool's declaration.
"""

from __future__ import annotations

from server.parsers.tagged import Tags, family

TAGS = Tags(
    call=("<function=", ">"),
    call_end="</function>",
    key=("<parameter=", ">"),
    value=("", "</parameter>"),
    also=("<function name=", "<parameter name="),
    loose=("<function =", "<parameter ="),
    lead=("<tool_call>",),
    tail=("</tool_call>",),
    around=("<tool_call>\n", "\n</tool_call>"),
    bare=True,
    framed=True,
)
FAMILY = family("qwen3_coder", TAGS)
