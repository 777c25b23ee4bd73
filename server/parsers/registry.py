"""Names of the parsers, and which ones a chat template asks for. A new family is its file and a line here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from engine.config import StartupError
from server.parsers import deepseek, harmony, hermes, llama3_json, mistral, pythonic, qwen3_coder, think
from server.parsers.base import ReasoningFamily, ToolFamily

Family = TypeVar("Family", ToolFamily, ReasoningFamily)

TOOL_PARSERS: dict[str, ToolFamily] = {
    family.name: family
    for family in (
        hermes.FAMILY,
        qwen3_coder.FAMILY,
        llama3_json.FAMILY,
        pythonic.FAMILY,
        mistral.FAMILY,
        mistral.NAMED_FAMILY,
        deepseek.V3,
        deepseek.V31,
        harmony.FAMILY,
    )
}
REASONING_PARSERS: dict[str, ReasoningFamily] = {
    family.name: family for family in (think.QWEN3, think.DEEPSEEK_R1, think.MISTRAL, harmony.REASONING)
}
# Names that other servers' users know.
TOOL_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "openai": "harmony",
    "gpt-oss": "harmony",
}
REASONING_ALIASES = {
    "qwen3-thinking": "qwen3",
    "deepseek-r1": "deepseek_r1",
    "deepseek-v3": "deepseek_r1",
    "deepseek_v3": "deepseek_r1",
    "openai": "harmony",
    "openai_gptoss": "harmony",
    "gpt-oss": "harmony",
}


def choose_parsers(tools: str, reasoning: str, template: str) -> tuple[ToolFamily | None, ReasoningFamily | None]:
    """The parsers that options name: "none", "auto" for what the template shows, or a name of ours or another server's.

    Raises StartupError for an unknown name.
    """
    found = detect(template)
    return (
        _choose("--tool-call-parser", tools, found[0], TOOL_PARSERS, TOOL_ALIASES),
        _choose("--reasoning-parser", reasoning, found[1], REASONING_PARSERS, REASONING_ALIASES),
    )


def _choose(
    flag: str, name: str, detected: str | None, families: Mapping[str, Family], aliases: Mapping[str, str]
) -> Family | None:
    if name == "none":
        return None
    if name == "auto":
        return None if detected is None else families[detected]
    family = families.get(aliases.get(name, name))
    if family is None:
        raise StartupError(f"{flag} '{name}' is not known: auto, none, {', '.join(sorted({*families, *aliases}))}")
    return family


def detect(chat_template_source: str) -> tuple[str | None, str | None]:
    """Tool and reasoning parser of a model, by what its chat template writes; None where it writes nothing known."""
    return _detect_tools(chat_template_source), _detect_reasoning(chat_template_source)


def _detect_tools(source: str) -> str | None:
    if "<|channel|>" in source and "<|start|>" in source:
        return "harmony"
    if "<｜tool▁calls▁begin｜>" in source:
        return "deepseek_v3" if "```json" in source else "deepseek_v31"
    if "[TOOL_CALLS]" in source:
        return "mistral_v11" if "[ARGS]" in source else "mistral"
    if "<tool_call>" in source:
        if "<function=" in source and "<parameter=" in source:
            return "qwen3_coder"
        # Others (GLM) have the tag but no JSON in it.
        return None if "<arg_key>" in source else "hermes"
    if "<|start_header_id|>" in source or "<|header_start|>" in source:
        if re.search(r"func_name\d?\(\s*params_name", source) or "<|python_start|>" in source:
            return "pythonic"
        if '"parameters"' in source and '"name"' in source:
            return "llama3_json"
    return None


def _detect_reasoning(source: str) -> str | None:
    if "<|channel|>" in source and "<|start|>" in source:
        return "harmony"
    if "[THINK]" in source:
        return "mistral"
    if "<think>" in source or "</think>" in source:
        return "qwen3" if "enable_thinking" in source else "deepseek_r1"
    return None
