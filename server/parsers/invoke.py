"""Calls as `<invoke name="f"><parameter name="k">value</parameter></invoke>`, each family with marks of its own.

MiniMax M2; DeepSeek V3.2 and V4 (DSML), whose parameters say whether they are text; Step 3.
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


def _dsml(name: str, section: str) -> ToolFamily:
    mark = "｜DSML｜"
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


DEEPSEEK_V32 = _dsml("deepseek_v32", "function_calls")
DEEPSEEK_V4 = _dsml("deepseek_v4", "tool_calls")

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
