"""Calls as `<invoke name="f"><parameter name="k">value</parameter></invoke>`, each family with marks of its own.

MiniMax M2; DeepSeek V3.2 and V4 (DSML) and GigaChat 3.5 (GCML), whose parameters say whether they are text; Step 3,
dots and MiniCPM 5.
"""

from __future__ import annotations

from typing import Any

from engine.text.schema_types import Types
from server.parsers.base import ToolFamily
from server.parsers.tagged import Tags, family


def _invoke(name: str, section: str, mark: str = "", **options: Any) -> ToolFamily:
    """mark: what every tag begins with. options: more of the tags."""
    return family(
        name,
        Tags(
            call=(f"<{mark}invoke name=", ">"),
            call_end=f"</{mark}invoke>",
            key=(f"<{mark}parameter name=", ">"),
            value=("", f"</{mark}parameter>"),
            section=(f"<{mark}{section}>", f"</{mark}{section}>"),
            quoted=True,
            **options,
        ),
    )


def _is_text(admitted: Types) -> list[str]:
    return [f' string="{"true" if admitted == {"string"} else "false"}"']


MINIMAX_M2 = _invoke("minimax_m2", "minimax:tool_call")
DOTS = _invoke("dots", "dots_function_call")
DEEPSEEK_V32 = _invoke("deepseek_v32", "function_calls", "｜DSML｜", attribute=_is_text)
DEEPSEEK_V4 = _invoke("deepseek_v4", "tool_calls", "｜DSML｜", attribute=_is_text)
GIGACHAT35 = _invoke("gigachat35", "tool_calls", "｜GCML｜", attribute=_is_text)
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
