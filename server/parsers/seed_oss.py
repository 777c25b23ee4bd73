"""Calls of Seed-OSS: as Qwen3-Coder's, in a tag of their own, and values stand right between their tags."""

from __future__ import annotations

from server.parsers.tagged import Tags, family

FAMILY = family(
    "seed_oss",
    Tags(
        call=("<function=", ">"),
        call_end="</function>",
        key=("<parameter=", ">"),
        value=("", "</parameter>"),
        lead=("<seed:tool_call>",),
        tail=("</seed:tool_call>",),
        around=("<seed:tool_call>\n", "\n</seed:tool_call>"),
    ),
)
