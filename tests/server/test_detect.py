"""Which parsers a template asks for: short templates that write calls as the models' own do, and back again."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from engine.text.chat_template import ChatTemplate
from server.parsers.detect import detect
from server.parsers.registry import REASONING_PARSERS, TOOL_PARSERS, choose_parsers
from tests.server.dictate import dictated
from tests.server.support import live, served_model
from tests.server.test_parsers import outcome, parser, run
from tests.text import templates

VALUE = "{{ v if v is string else v | tojson }}"
ARGUMENTS = "{{ f.arguments | tojson }}"
NS = "]<]minimax[>["
DSML = "｜DSML｜"


def each(before: str, parameter: str, after: str) -> str:
    """A call in tags."""
    return before + "{% for k, v in f.arguments.items() %}" + parameter + "{% endfor %}" + after


def listed(begin: str, end: str, name: str = "name", arguments: str = "arguments") -> tuple[str, str, str]:
    one = f'{{"{name}": "{{{{ f.name }}}}", "{arguments}": {ARGUMENTS}}}{{{{ ", " if not loop.last }}}}'
    return f"{begin}[", one, f"]{end}"


def alone(begin: str, end: str, arguments: str = "arguments") -> tuple[str, str, str]:
    return "", f'{begin}{{"name": "{{{{ f.name }}}}", "{arguments}": {ARGUMENTS}}}{end}', ""


PYTHON = (
    "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}="
    "{{ \"'\" ~ v ~ \"'\" if v is string else v | tojson }}{{ ', ' if not loop.last }}{% endfor %})"
)
GEMMA = (
    "call:{{ f.name }}{% raw %}{{% endraw %}{% for k, v in f.arguments.items() %}{{ k }}:"
    "{{ QUOTE ~ v ~ QUOTE if v is string else v | tojson }}{{ ',' if not loop.last }}{% endfor %}{% raw %}}{% endraw %}"
)


def dsml(section: str, mark: str = DSML) -> tuple[str, str, str]:
    call = each(
        f'<{mark}invoke name="{{{{ f.name }}}}">\n',
        f'<{mark}parameter name="{{{{ k }}}}" string="{{{{ "true" if v is string else "false" }}}}">{VALUE}'
        f"</{mark}parameter>\n",
        f"</{mark}invoke>\n",
    )
    return f"<{mark}{section}>\n", call, f"</{mark}{section}>"


# What stands before the calls of a message, each call, and behind them.
WRITTEN: dict[str, tuple[str, str, str]] = {
    "hermes": alone("\n<tool_call>\n", "\n</tool_call>"),
    "qwen3_coder": (
        "",
        each(
            "\n<tool_call>\n<function={{ f.name }}>\n",
            f"<parameter={{{{ k }}}}>\n{VALUE}\n</parameter>\n",
            "</function>\n</tool_call>",
        ),
        "",
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n" + ARGUMENTS + "\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>" + ARGUMENTS + "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_v32": dsml("function_calls"),
    "deepseek_v4": dsml("tool_calls"),
    "gigachat35": dsml("tool_calls", "｜GCML｜"),
    "gigachat3": alone("function call<|role_sep|>\n", "<|message_sep|>\n\n"),
    "dots": (
        "<dots_function_call>\n",
        each('<invoke name="{{ f.name }}">\n', f'<parameter name="{{{{ k }}}}">{VALUE}</parameter>\n', "</invoke>\n"),
        "</dots_function_call>",
    ),
    "minicpm5": (
        "",
        each('<function name="{{ f.name }}">', f'<param name="{{{{ k }}}}">{VALUE}</param>', "</function>"),
        "",
    ),
    "muse_glimmer": (
        "",
        each(
            "{{ '<|start|>assistant' if not loop.first }} to={{ f.name }}<|message|><atem:function_calls>\n"
            '<atem:invoke name="{{ f.name }}">\n',
            f'<atem:parameter name="{{{{ k }}}}">{VALUE}</atem:parameter>\n',
            "</atem:invoke>\n</atem:function_calls><|eot|>",
        ),
        "",
    ),
    "solar_open": (
        "<|tool_calls|>",
        "<|tool_call:begin|>{{ c.id }}<|tool_call:name|>{{ f.name }}<|tool_call:args|>"
        + ARGUMENTS
        + "<|tool_call:end|>",
        "<|calls|>",
    ),
    "solar_open2": (
        "",
        each(
            "<|tool_call:start|>{{ f.name }}\n",
            f"<|tool_arg:start|>{{{{ k }}}}<|tool_arg:value|>{VALUE}<|tool_arg:end|>\n",
            "<|tool_call:end|>",
        ),
        "",
    ),
    "k2_horizon": (
        "<ifm|tool_calls>\n",
        each(
            "<ifm|tool_call>{{ f.name }}\n",
            f"<ifm|arg_key>{{{{ k }}}}</ifm|arg_key>\n<ifm|arg_value>{VALUE}</ifm|arg_value>\n",
            "</ifm|tool_call>\n",
        ),
        "</ifm|tool_calls>",
    ),
    "step3": (
        "<｜tool_calls_begin｜>\n",
        each(
            '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{{ f.name }}">\n',
            f'<steptml:parameter name="{{{{ k }}}}">{VALUE}</steptml:parameter>\n',
            "</steptml:invoke><｜tool_call_end｜>\n",
        ),
        "<｜tool_calls_end｜>",
    ),
    "kimi_k3": (
        "{{ '<|open|>' }}tools<|sep|>",
        each(
            '<|open|>call tool="{{ f.name }}" index="{{ loop.index }}"<|sep|>',
            '<|open|>argument key="{{ k }}" type="{{ "string" if v is string else "number" }}"<|sep|>'
            f"{VALUE}<|close|>argument<|sep|>",
            "<|close|>call<|sep|>",
        ),
        "<|close|>tools<|sep|>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.{{ f.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
        + ARGUMENTS
        + "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    "minimax_m2": (
        "{{ '<minimax:tool_call>' }}\n",
        each('<invoke name="{{ f.name }}">\n', f'<parameter name="{{{{ k }}}}">{VALUE}</parameter>\n', "</invoke>\n"),
        "</minimax:tool_call>",
    ),
    "minimax_m3": (
        f"{NS}<tool_call>\n",
        each(
            f'{NS}<invoke name="{{{{ f.name }}}}">', f"{NS}<{{{{ k }}}}>{VALUE}{NS}</{{{{ k }}}}>", f"{NS}</invoke>\n"
        ),
        f"{NS}</tool_call>",
    ),
    "seed_oss": (
        "",
        each(
            "\n<seed:tool_call>\n<function={{ f.name }}>\n",
            f"<parameter={{{{ k }}}}>{VALUE}</parameter>\n",
            "</function>\n</seed:tool_call>",
        ),
        "",
    ),
    "gemma4": ("", f"<|tool_call>{GEMMA}<tool_call|>".replace("QUOTE", "'<|\"|>'"), ""),
    "functiongemma": (
        "",
        f"<start_function_call>{GEMMA}<end_function_call>".replace("QUOTE", "'<escape>'"),
        "",
    ),
    "mistral_v11": ("", "[TOOL_CALLS]{{ f.name }}[ARGS]" + ARGUMENTS, ""),
    "mistral": listed("[TOOL_CALLS]", ""),
    "command_r": listed("\nAction:\n```json\n", "\n```", "tool_name", "parameters"),
    "cohere_command3": listed("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters"),
    "apertus": (
        "<|tools_prefix|>[",
        '{"{{ f.name }}": ' + ARGUMENTS + "}{{ ', ' if not loop.last }}",
        "]<|tools_suffix|>",
    ),
    "nemotron_json": listed("<TOOLCALL>", "</TOOLCALL>"),
    "internlm": alone("<|action_start|><|plugin|>\n", "<|action_end|>", "parameters"),
    "lfm2": ("<|tool_call_start|>[", PYTHON + "{{ ', ' if not loop.last }}", "]<|tool_call_end|>"),
    "granite": listed("{# <|start_of_role|> #}<|tool_call|>", ""),
    "granite-20b-fc": alone("{# <|function_call_library|> #}<function_call> ", ""),
    "phi4_mini_json": listed("functools", ""),
    "longcat": alone("<longcat_tool_call>\n", "\n</longcat_tool_call>"),
    "olmo3": ("<function_calls>\n", PYTHON + "\n", "</function_calls>"),
    "hy_v3": (
        "<tool_calls>\n",
        each(
            "<tool_call>{{ f.name }}<tool_sep>\n",
            f"<arg_key>{{{{ k }}}}</arg_key>\n<arg_value>{VALUE}</arg_value>\n",
            "</tool_call>\n",
        ),
        "</tool_calls>",
    ),
    "glm47": (
        "",
        each(
            "<tool_call>{{ f.name }}", f"<arg_key>{{{{ k }}}}</arg_key><arg_value>{VALUE}</arg_value>", "</tool_call>"
        ),
        "",
    ),
    "glm45": (
        "",
        each(
            "\n<tool_call>{{ f.name }}\n",
            f"<arg_key>{{{{ k }}}}</arg_key>\n<arg_value>{VALUE}</arg_value>\n",
            "</tool_call>",
        ),
        "",
    ),
    "hunyuan_a13b": listed("<tool_calls>", "</tool_calls>"),
    "minimax": ("<tool_calls>\n", alone("", "\n")[1], "</tool_calls>"),
    "hy_v3_opensource": (
        "<tool_calls:opensource>\n",
        each(
            "<tool_call:opensource>{{ f.name }}<tool_sep:opensource>\n",
            f"<arg_key:opensource>{{{{ k }}}}</arg_key:opensource>\n"
            f"<arg_value:opensource>{VALUE}</arg_value:opensource>\n",
            "</tool_call:opensource>\n",
        ),
        "</tool_calls:opensource>",
    ),
}
# Found by other means, or not by a template at all: they write what others do.
NOT_FROM_MARKS = {"harmony", "llama3_json", "pythonic", "jamba", "xlam"}


def template_of(before: str, call: str, after: str) -> str:
    return (
        "{% for m in messages %}<|im_{{ m.role }}|>{{ m.content if m.content is string }}"
        "{% if m.tool_calls %}"
        + before
        + "{% for c in m.tool_calls %}{% set f = c.function %}"
        + call
        + "{% endfor %}"
        + after
        + "{% endif %}<|im_end|>{% endfor %}"
    )


def render_by(template: ChatTemplate) -> Any:
    return lambda chat, tools: template.render(chat, tools=tools, add_generation_prompt=False)


def test_every_family_has_a_template() -> None:
    assert set(WRITTEN) | NOT_FROM_MARKS == set(TOOL_PARSERS)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_template_is_known_by_what_it_writes(name: str) -> None:
    source = template_of(*WRITTEN[name])
    template = ChatTemplate({"default": source}, {})
    assert detect(source, render_by(template))[0] == name
    # Its source alone will do as well.
    assert detect(source)[0] == name


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_template_writes_is_read_back(name: str) -> None:
    given = [("get_weather", {"city": "São Paulo", "days": 3}), ("now", {"zone": "UTC"})]
    calls = [
        {"id": f"call0000{index}", "type": "function", "function": {"name": called, "arguments": arguments}}
        for index, (called, arguments) in enumerate(given)
    ]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    text = ChatTemplate({"default": template_of(*WRITTEN[name])}, {}).render(messages, add_generation_prompt=False)
    written = text.partition("<|im_assistant|>")[2].removesuffix("<|im_end|>")
    content, _, found = outcome(run(parser(name), [written]))
    assert content.strip() == ""
    assert [(called, json.loads(arguments)) for called, arguments in found] == given


# Templates that other families' marks stand in, and what they are.
MIXED: dict[str, tuple[str, str | None]] = {
    # The instructions speak of a tag that no call is written in.
    "apriel": ('within <tool_call></tool_call> tags: <tool_calls>[{"name": 1}]</tool_calls>', "hunyuan_a13b"),
    "minimax m3": (f"{NS}<tool_call>\n{NS}<invoke name=", "minimax_m3"),
    "minicpm 5": ('<tool_call> "name" <function name="f"><param name="p">', "minicpm5"),
    "k2 horizon": ('<ifm|tool_call>name\n<ifm|arg_key>k</ifm|arg_key> "name"', "k2_horizon"),
    "invoke alone": ('<tool_call> "name" <invoke name="f"><parameter name="p">', None),
    "longcat of keys": ("<longcat_tool_call>name\n<longcat_arg_key>", None),
    "kimi k2, first": ("<|im_system|>tool_declare<|im_middle|>", "kimi_k2"),
    "lfm2.5": ("keep_past_thinking {{ 'List of tools: [' }}</think>", "lfm2"),
    "lfm2, first": ("<|tool_list_start|>{{ tools }}<|tool_list_end|>", "lfm2"),
    "escaped": ('{{ "<tool_call>\\n{\\"name\\": " }}', "hermes"),
    "nothing": ("{{ messages }}", None),
    "functools in words": ("import functools", None),
}


@pytest.mark.parametrize("name", MIXED)
def test_marks_of_others(name: str) -> None:
    source, expected = MIXED[name]
    assert detect(source)[0] == expected


def test_what_is_written_counts_for_more_than_what_is_said() -> None:
    """The source names tags that the template cuts out of old answers; a call is written in another way."""
    source = "{# <tool_call> <arg_key> </arg_key><arg_value> #}" + template_of(*WRITTEN["hermes"])
    template = ChatTemplate({"default": source}, {})
    assert detect(source)[0] == "glm47"
    assert detect(source, render_by(template))[0] == "hermes"
    # The same where a past answer must have a reasoning.
    raises = "{% if m.role == 'assistant' and m.reasoning is not defined %}{{ raise_exception('missing') }}{% endif %}"
    source = source.replace("{% for m in messages %}", "{% for m in messages %}" + raises, 1)
    assert raises in source
    assert detect(source, render_by(ChatTemplate({"default": source}, {})))[0] == "hermes"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no tools here') }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ messages[9].content.nothing }}",
    ],
)
def test_templates_that_write_no_calls(source: str) -> None:
    template = ChatTemplate({"default": source}, {})
    assert detect(source, render_by(template)) == (None, None)


@pytest.mark.parametrize("name", ["glm47", "minimax_m2", "gemma4", "olmo3"])
async def test_a_server_reads_calls_by_its_template(name: str) -> None:
    source = template_of(*WRITTEN[name])
    template = ChatTemplate({"default": source}, {})
    call = {"id": "call00000", "type": "function", "function": {"name": "get_time", "arguments": {"zone": "UTC"}}}
    said = template.render([{"role": "assistant", "content": "", "tool_calls": [call]}], add_generation_prompt=False)
    said = said.partition("<|im_assistant|>")[2].removesuffix("<|im_end|>")
    tool = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
    async with live(model=served_model(chat_template=template)) as server:
        with dictated(server, said):
            body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "max_tokens": 300}
            status, answer = await server.post("/v1/chat/completions", body)
    assert status == 200, answer
    message = answer["choices"][0]["message"]
    found = [call["function"] for call in message["tool_calls"]]
    assert [(one["name"], json.loads(one["arguments"])) for one in found] == [("get_time", {"zone": "UTC"})]
    assert not (message["content"] or "").strip()


def test_calls_that_a_template_writes_in_place_of_content() -> None:
    before, call, after = WRITTEN["deepseek_v31"]
    source = template_of("{% if m.content is not string %}" + before, call, after + "{% endif %}")
    written = source.replace("<｜tool▁calls▁begin｜>", "{{ '<｜tool▁calls' ~ '▁begin｜>' }}")
    template = ChatTemplate({"default": written}, {})
    assert detect(written) == (None, None)
    assert detect(written, render_by(template))[0] == "deepseek_v31"


def test_the_demo_template() -> None:
    template = ChatTemplate({"default": templates.CHATML}, {})
    assert detect(template.source, render_by(template)) == ("hermes", "qwen3")


REASONING: dict[str, tuple[str, str | None]] = {
    "gemma 4": ("<|channel>thought\n<channel|> enable_thinking", "gemma4"),
    "seed": ("'<seed:think>' thinking_budget", "seed_oss"),
    "minimax m2": ("<think> </think> minimax <response>", "deepseek_r1"),
    "minimax m3": ("<mm:think>", "minimax_m3"),
    "kimi k3": ("'<|open|>' + tag '<|sep|>' open_tag('think')", "kimi_k3"),
    "muse": ("'<|start|>assistant to=self<|message|>' <atem:invoke", "muse_glimmer"),
    "solar open": ("'<|begin|>assistant<|think|>'", "solar_open"),
    "solar open 2": ("<|think:start|>", "solar_open2"),
    "k2 horizon": ("<ifm|think>", "k2_horizon"),
    "command": ("<|START_THINKING|>", "cohere_command3"),
    "apertus": ("<|inner_prefix|>", "apertus"),
    "granite 3.2": ("<|start_of_role|> Here is my thought process: ...", "granite"),
    "granite 3.3": ("<|start_of_role|> <think> <response>", "granite_think"),
    "ernie": ("<|begin_of_sentence|> </think> <response>", "ernie45"),
    "hunyuan": ("<|extra_0|> <think> <answer>", "hunyuan_a13b"),
    "glm": ("<think></think> enable_thinking", "qwen3"),
    "magistral": ("[THINK] [/THINK]", "mistral"),
    "hy 3": ("{% set e = ':opensource' %}{{ '<think{}>'.format(e) }}{{ '</think{}>'.format(e) }}", "hy_v3_opensource"),
    "none": ("{{ messages }}", None),
}


@pytest.mark.parametrize("name", REASONING)
def test_reasoning(name: str) -> None:
    source, expected = REASONING[name]
    assert detect(source)[1] == expected
    assert expected is None or expected in REASONING_PARSERS


def test_a_format_that_is_not_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    source = "{% for c in m.tool_calls %}@@{{ c.function.name }}@@{% endfor %}"
    with caplog.at_level(logging.WARNING):
        assert choose_parsers("auto", "auto", source) == (None, None)
    assert "--tool-call-parser" in caplog.text
    caplog.clear()
    assert choose_parsers("none", "auto", source) == (None, None)
    assert choose_parsers("auto", "auto", "{{ messages }}") == (None, None)
    assert choose_parsers("glm45", "kimi_k2", source)[0] is TOOL_PARSERS["glm45"]
    assert not caplog.records
