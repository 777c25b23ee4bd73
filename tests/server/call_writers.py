"""Calls as each family of models writes them, whatever their arguments are: a writer for each by the parser's name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]
Calls = list[tuple[str, Arguments]]

NS = "]<]minimax[>["
DSML = "｜DSML｜"


def bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def dsml(section: str, mark: str = DSML) -> Callable[[Calls], str]:
    def write(calls: Calls) -> str:
        text = ""
        for name, arguments in calls:
            text += f'<{mark}invoke name="{name}">\n'
            for key, value in arguments.items():
                kind = "true" if isinstance(value, str) else "false"
                text += f'<{mark}parameter name="{key}" string="{kind}">{bare(value)}</{mark}parameter>\n'
            text += f"</{mark}invoke>\n"
        return f"<{mark}{section}>\n{text}</{mark}{section}>"

    return write


def glm(line: str) -> Callable[[Calls], str]:
    def write(calls: Calls) -> str:
        return line.join(
            f"<tool_call>{name}{line}"
            + "".join(
                f"<arg_key>{key}</arg_key>{line}<arg_value>{bare(value)}</arg_value>{line}"
                for key, value in arguments.items()
            )
            + "</tool_call>"
            for name, arguments in calls
        )

    return write


def hy_v3(calls: Calls) -> str:
    text = glm("\n")(calls)
    for name, _ in calls:
        text = text.replace(f"<tool_call>{name}\n", f"<tool_call>{name}<tool_sep>\n")
    return f"<tool_calls>\n{text}\n</tool_calls>"


def minimax_m2(calls: Calls) -> str:
    text = ""
    for name, arguments in calls:
        inner = "".join(f'<parameter name="{key}">{bare(value)}</parameter>\n' for key, value in arguments.items())
        text += f'<invoke name="{name}">\n{inner}</invoke>\n'
    return f"<minimax:tool_call>\n{text}</minimax:tool_call>"


def minicpm5(calls: Calls) -> str:
    return "\n".join(
        f'<function name="{name}">'
        + "".join(f'<param name="{key}">{bare(value)}</param>' for key, value in arguments.items())
        + "</function>"
        for name, arguments in calls
    )


def muse_glimmer(calls: Calls) -> str:
    texts = []
    for name, arguments in calls:
        inner = "".join(
            f'<atem:parameter name="{key}">{bare(value)}</atem:parameter>\n' for key, value in arguments.items()
        )
        block = f'<atem:function_calls>\n<atem:invoke name="{name}">\n{inner}</atem:invoke>\n</atem:function_calls>'
        texts.append(f"<|start|>assistant to={name}<|message|>{block}")
    return "<|eom|>".join(texts) + "<|eot|>"


def solar_open(calls: Calls) -> str:
    text = "".join(
        f"<|tool_call:begin|>abc123{index:04}<|tool_call:name|>{name}<|tool_call:args|>{dumped(given)}<|tool_call:end|>"
        for index, (name, given) in enumerate(calls)
    )
    return f"<|tool_calls|>{text}<|calls|>"


def solar_open2(calls: Calls) -> str:
    return "\n".join(
        f"<|tool_call:start|>{name}\n"
        + "".join(
            f"<|tool_arg:start|>{key}<|tool_arg:value|>{bare(value)}<|tool_arg:end|>\n"
            for key, value in arguments.items()
        )
        + "<|tool_call:end|>"
        for name, arguments in calls
    )


def nested(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "".join(f"{NS}<{key}>{nested(inner)}{NS}</{key}>" for key, inner in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{NS}<item>{nested(inner)}{NS}</item>" for inner in value)
    return bare(value)


def minimax_m3(calls: Calls) -> str:
    text = "".join(f'{NS}<invoke name="{name}">{nested(given)}{NS}</invoke>\n' for name, given in calls)
    return f"{NS}<tool_call>\n{text.replace('>{}', '>')}{NS}</tool_call>"


def seed_oss(calls: Calls) -> str:
    return "\n".join(
        f"<seed:tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>{bare(value)}</parameter>\n" for key, value in arguments.items())
        + "</function>\n</seed:tool_call>"
        for name, arguments in calls
    )


def step3(calls: Calls) -> str:
    text = ""
    for name, arguments in calls:
        inner = "".join(
            f'<steptml:parameter name="{key}">{bare(value)}</steptml:parameter>\n' for key, value in arguments.items()
        )
        text += (
            f'<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n{inner}</steptml:invoke>'
            "<｜tool_call_end｜>\n"
        )
    return f"<｜tool_calls_begin｜>\n{text}<｜tool_calls_end｜>"


def kimi_k2(calls: Calls) -> str:
    text = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{dumped(given)}<|tool_call_end|>"
        for index, (name, given) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{text}<|tool_calls_section_end|>"


def kimi_k3(calls: Calls) -> str:
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", dict: "object", list: "array"}
    text = ""
    for index, (name, arguments) in enumerate(calls, 1):
        text += f'<|open|>call tool="{name}" index="{index}"<|sep|>'
        for key, value in arguments.items():
            kind = kinds.get(type(value), "null")
            text += f'<|open|>argument key="{key}" type="{kind}"<|sep|>{bare(value)}<|close|>argument<|sep|>'
        text += "<|close|>call<|sep|>"
    return f"<|open|>tools<|sep|>{text}<|close|>tools<|sep|>"


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def gemma(begin: str, end: str, quote: str) -> Callable[[Calls], str]:
    def value_of(value: Any) -> str:
        if isinstance(value, str):
            return f"{quote}{value}{quote}"
        if isinstance(value, dict):
            return "{" + fields(value) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(value_of, value)) + "]"
        return dumped(value)

    def fields(arguments: Arguments) -> str:
        return ",".join(f"{key}:{value_of(value)}" for key, value in arguments.items())

    return lambda calls: "".join(f"{begin}call:{name}{{{fields(given)}}}{end}" for name, given in calls)


def python(begin: str, separator: str, end: str) -> Callable[[Calls], str]:
    def write(calls: Calls) -> str:
        texts = [
            f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls
        ]
        return begin + separator.join(texts) + end

    return write


def listed(begin: str, end: str, name_key: str = "name", arguments_key: str = "arguments") -> Callable[[Calls], str]:
    return lambda calls: begin + dumped([{name_key: name, arguments_key: given} for name, given in calls]) + end


def each(begin: str, end: str, arguments_key: str = "arguments") -> Callable[[Calls], str]:
    return lambda calls: "\n".join(begin + dumped({"name": name, arguments_key: given}) + end for name, given in calls)


WRITERS: dict[str, Callable[[Calls], str]] = {
    "glm45": glm("\n"),
    "glm47": glm(""),
    "hy_v3": hy_v3,
    "hy_v3_opensource": lambda calls: re.sub(r"<(/?(?:tool|arg)_\w+)>", r"<\1:opensource>", hy_v3(calls)),
    "minimax": lambda calls: f"<tool_calls>\n{each('', '')(calls)}\n</tool_calls>",
    "deepseek_v32": dsml("function_calls"),
    "deepseek_v4": dsml("tool_calls"),
    "gigachat35": dsml("tool_calls", "｜GCML｜"),
    "muse_glimmer": muse_glimmer,
    "gigachat3": lambda calls: each("function call<|role_sep|>\n", "<|message_sep|>\n")(calls),
    "dots": lambda calls: minimax_m2(calls).replace("minimax:tool_call", "dots_function_call"),
    "minicpm5": minicpm5,
    "solar_open": solar_open,
    "solar_open2": solar_open2,
    "k2_horizon": lambda calls: (
        "<ifm|tool_calls>\n"
        + re.sub(r"<(/?)((?:tool|arg)_\w+)>", r"<\1ifm|\2>", glm("\n")(calls))
        + "\n</ifm|tool_calls>"
    ),
    "minimax_m2": minimax_m2,
    "minimax_m3": minimax_m3,
    "seed_oss": seed_oss,
    "step3": step3,
    "kimi_k2": kimi_k2,
    "kimi_k3": kimi_k3,
    "gemma4": gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    "lfm2": python("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
    "olmo3": python("<function_calls>\n", "\n", "\n</function_calls>"),
    "granite": listed("<|tool_call|>", ""),
    "granite-20b-fc": each("<function_call> ", ""),
    "phi4_mini_json": listed("functools", ""),
    "hunyuan_a13b": listed("<tool_calls>", "</tool_calls>"),
    "jamba": listed("<tool_calls>", "</tool_calls>"),
    "nemotron_json": listed("<TOOLCALL>", "</TOOLCALL>"),
    "cohere_command3": listed("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters"),
    "command_r": listed("Action: ```json\n", "```", "tool_name", "parameters"),
    "internlm": each("<|action_start|><|plugin|>\n", "<|action_end|>", "parameters"),
    "longcat": each("<longcat_tool_call>\n", "\n</longcat_tool_call>"),
    "apertus": lambda calls: f"<|tools_prefix|>{dumped([{name: given} for name, given in calls])}<|tools_suffix|>",
    "xlam": listed("", ""),
}
