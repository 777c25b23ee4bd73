"""Calls as `<tool_call>name`, then keys and values in tags of their own.

GLM-4.5 and later, Laguna, Hunyuan 3, K2 Horizon and Solar Open 2. GLM-4.5 and 4.6 break the line behind every tag; 4.7
and later write none. One grammar reads both.
"""

from __future__ import annotations

from server.parsers.tagged import Tags, family

_KEY, _VALUE = ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")

GLM45 = family("glm45", Tags(("<tool_call>", ""), "</tool_call>", _KEY, _VALUE))
GLM47 = family("glm47", Tags(("<tool_call>", ""), "</tool_call>", _KEY, _VALUE, line="", between=""))
# A section around the calls, and a mark behind the name.
HY_V3 = family(
    "hy_v3",
    Tags(("<tool_call>", "<tool_sep>"), "</tool_call>", _KEY, _VALUE, section=("<tool_calls>", "</tool_calls>")),
)
# As the published checkpoints spell them.
_S = ":opensource"
HY_V3_OPEN = family(
    "hy_v3_opensource",
    Tags(
        (f"<tool_call{_S}>", f"<tool_sep{_S}>"),
        f"</tool_call{_S}>",
        (f"<arg_key{_S}>", f"</arg_key{_S}>"),
        (f"<arg_value{_S}>", f"</arg_value{_S}>"),
        section=(f"<tool_calls{_S}>", f"</tool_calls{_S}>"),
    ),
)
K2_HORIZON = family(
    "k2_horizon",
    Tags(
        ("<ifm|tool_call>", ""),
        "</ifm|tool_call>",
        ("<ifm|arg_key>", "</ifm|arg_key>"),
        ("<ifm|arg_value>", "</ifm|arg_value>"),
        section=("<ifm|tool_calls>", "</ifm|tool_calls>"),
        typed=("<ifm|arg_type>", "</ifm|arg_type>"),
    ),
)
SOLAR_OPEN2 = family(
    "solar_open2",
    Tags(
        ("<|tool_call:start|>", "\n"),
        "<|tool_call:end|>",
        ("<|tool_arg:start|>", "<|tool_arg:value|>"),
        ("", "<|tool_arg:end|>"),
    ),
)
