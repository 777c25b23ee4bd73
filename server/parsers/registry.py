"""Names of the parsers, ours and those that other servers' users know. A new family is its file and a line here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

from engine.config import StartupError
from server.parsers import (
    deepseek,
    gemma4,
    glm,
    harmony,
    hermes,
    invoke,
    kimi_k2,
    kimi_k3,
    llama3_json,
    marked_json,
    marked_python,
    marked_thoughts,
    minimax_m3,
    mistral,
    muse_glimmer,
    pythonic,
    qwen3_coder,
    seed_oss,
    solar_open,
    think,
)
from server.parsers.base import ReasoningFamily, ToolFamily
from server.parsers.detect import Render, detect

logger = logging.getLogger("oneloop.parsers")

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
        invoke.DEEPSEEK_V32,
        invoke.DEEPSEEK_V4,
        invoke.MINIMAX_M2,
        invoke.STEP3,
        invoke.GIGACHAT35,
        invoke.DOTS,
        invoke.MINICPM5,
        minimax_m3.FAMILY,
        glm.GLM45,
        glm.GLM47,
        glm.HY_V3,
        glm.HY_V3_OPEN,
        glm.K2_HORIZON,
        glm.SOLAR_OPEN2,
        solar_open.FAMILY,
        seed_oss.FAMILY,
        kimi_k2.FAMILY,
        kimi_k3.FAMILY,
        gemma4.GEMMA4,
        gemma4.FUNCTIONGEMMA,
        marked_python.LFM2,
        marked_python.OLMO3,
        *marked_json.FAMILIES,
        muse_glimmer.FAMILY,
        harmony.FAMILY,
    )
}
REASONING_PARSERS: dict[str, ReasoningFamily] = {
    family.name: family
    for family in (
        think.QWEN3,
        think.DEEPSEEK_R1,
        think.MISTRAL,
        think.HY_V3_OPEN,
        *marked_thoughts.FAMILIES,
        solar_open.REASONING,
        kimi_k3.REASONING,
        muse_glimmer.REASONING,
        harmony.REASONING,
    )
}
TOOL_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "granite4": "hermes",
    "ernie45": "hermes",
    "qwen3_xml": "qwen3_coder",
    "mimo": "qwen3_coder",
    "step3p5": "qwen3_coder",
    "nemotron_v3": "qwen3_coder",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "deepseekv32": "deepseek_v32",
    "deepseekv4": "deepseek_v4",
    "glm": "glm45",
    "ling3": "glm45",
    "muse": "muse_glimmer",
    "trinity": "hermes",
    "poolside_v1": "glm47",
    "minimax-m2": "minimax_m2",
    "minimax-m3": "minimax_m3",
    "hunyuan": "hunyuan_a13b",
    "nemotron_v2": "nemotron_json",
    "cohere_command4": "cohere_command3",
    "apertus2509": "apertus",
    "interns1": "internlm",
    "intern-s1": "internlm",
    "openai": "harmony",
    "gpt-oss": "harmony",
}
REASONING_ALIASES = {
    "qwen3-thinking": "qwen3",
    "deepseek-r1": "deepseek_r1",
    "deepseek-v3": "deepseek_r1",
    "gpt-oss": "harmony",
    "openai": "harmony",
    "openai_gptoss": "harmony",
    "minimax-m3": "minimax_m3",
    "minimax-append-think": "minimax_m2_append_think",
    "hunyuan": "hunyuan_a13b",
    "cohere_command4": "cohere_command3",
    "muse": "muse_glimmer",
    "seed-oss": "seed_oss",
    **dict.fromkeys(
        (
            "deepseek_v3",
            "deepseek_v4",
            "deepseek-v4",
            "gigachat35",
            "glm45",
            "glm47",
            "holo2",
            "hy_v3",
            "interns1",
            "kimi_k2",
            "lfm2",
            "mimo",
            "minimax",
            "minimax_m2",
            "nemotron_3",
            "nemotron_v2",
            "nemotron_v3",
            "olmo3",
            "poolside_v1",
            "step3",
            "step3p5",
        ),
        "deepseek_r1",
    ),
}


def choose_parsers(
    tools: str, reasoning: str, template: str, render: Render | None = None
) -> tuple[ToolFamily | None, ReasoningFamily | None]:
    """The parsers that options name: "none", "auto" for what the template shows, or a name of ours or another server's.

    template: its source; render: the template itself. Raises StartupError for an unknown name.
    """
    found = detect(template, render)
    if tools == "auto" and found[0] is None and "tool_calls" in template:
        logger.warning(
            "the chat template writes tool calls in no way that is known: they stay in the content "
            "(--tool-call-parser names a parser)"
        )
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
