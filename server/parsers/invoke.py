"""Calls as `<invoke name="f"><parameter name="k">value</parameter></invoke>`, each family with marks of its own.

MiniMax M2; DeepSeek V3.2 and V4 (DSML) and GigaChat 3.5 (GCML), whose parameters say whether they are text; Step 3,
dots and MiniCPM 5.
"""

from __future__ import annotations

from server.parsers.base import ToolFamily
from server.parsers.tagged import Tags, family

MINIMAX_M2 = family(
    "minimax_m2",
    Tags(
        call=("<invoke name=", ">"),
        call_end="</invoke>",
        key=("<parameter name=", ">"),
        value=("", "</parameter>"),
        section=("<minimax:tool_call>", "</minimax:tool_call>"),
        quoted=True,
    ),
)


def _marked(name: str, mark: str, section: str) -> ToolFamily:
    """mark: what every tag begins with."""
    return family(
        name,
        Tags(
            call=(f"<{mark}invoke name=", ">"),
            call_end=f"</{mark}invoke>",
            key=(f"<{mark}parameter name=", ">"),
            value=("", f"</{mark}parameter>"),
            section=(f"<{mark}{section}>", f"</{mark}{section}>"),
            quoted=True,
            attribute=lambda admitted: [f' string="{"true" if admitted == {"string"} else "false"}"'],
        ),
    )


DEEPSEEK_V32 = _marked("deepseek_v32", "｜DSML｜", "function_calls")
DEEPSEEK_V4 = _marked("deepseek_v4", "｜DSML｜", "tool_calls")
GIGACHAT35 = _marked("gigachat35", "｜GCML｜", "tool_calls")

DOTS = family(
    "dots",
    Tags(
        call=("<invoke name=", ">"),
        call_end="</invoke>",
        key=("<parameter name=", ">"),
        value=("", "</parameter>"),
        section=("<dots_function_call>", "</dots_function_call>"),
        quoted=True,
    ),
)
MINICPM5 = family(
    "minicpm5",
    Tags(
        call=("<function name=", ">"),
        call_end="</function>",
        key=("<param name=", ">"),
        value=("", "</param>"),
        also=("<functionname=", "<paramname="),
        quoted=True,
        line="",
        cdata=True,
    ),
)

STEP3 = family(
    "step3",
    Tags(
        call=("<steptml:invoke name=", ">"),
        call_end="</steptml:invoke>",
        key=("<steptml:parameter name=", ">"),
        value=("", "</steptml:parameter>"),
        section=("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),
        lead=("<｜tool_call_begin｜>", "function", "<｜tool_sep｜>"),
        tail=("<｜tool_call_end｜>",),
        around=("<｜tool_call_begin｜>function<｜tool_sep｜>", "<｜tool_call_end｜>"),
        quoted=True,
    ),
)
