"""What templates are asked, and that every conversation is given to them so that nothing of it is lost or refused."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest

from engine.request import RequestError
from engine.text import template_probe
from engine.text.chat_template import ChatTemplate
from engine.text.template_shape import INVALID_JSON, TemplateShape
from tests.text import family_templates as families
from tests.text import templates

TEMPLATES = families.ALL | {f"other_{name}": text for name, text in templates.ALL.items()}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
Message = dict[str, Any]


def made(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, SPECIALS)


TEMPLATE = {name: made(text) for name, text in TEMPLATES.items()}


def declared(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


PROPERTIES = {"city": {"type": "string", "description": "Where"}}
TOOL = declared("weather", description="Weather", parameters={"type": "object", "properties": PROPERTIES})


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str | None) -> Message:
    return {"role": "user", "content": text}


def says(text: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any, id: str | None = "call_0123456789abcdef") -> Message:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str | None, id: str | None = "call_0123456789abcdef") -> Message:
    return {"role": "tool", "tool_call_id": id, "content": text}


ARGUMENTS = '{"city":"Köln"}'
LOOP = [user("Weather?"), says(None, tool_calls=[call("weather", ARGUMENTS)]), result("21 degrees")]


# ---- the answers


def test_a_template_that_takes_all_has_the_default_shape() -> None:
    asked = made(
        "{% for m in messages %}{{ m.role }}{{ m.content if m.content is string }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}{{ tools | tojson }}"
    )
    for shape in (asked.shape, asked.tool_shape):
        assert dataclasses.replace(shape, call_content="empty") == TemplateShape()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek_r1", {"arguments": "text", "call_content": "null", "text_with_calls": "split"}),
        ("deepseek_r1", {"systems_in_row": False, "reasoning_open": "<think>\n"}),
        ("deepseek_v31", {"arguments": "text", "systems_in_row": True, "reasoning_open": "<think>"}),
        ("qwen3", {"arguments": "object", "system_in_middle": True, "reasoning_open": "<think>\n"}),
        ("qwen35", {"systems_in_row": False, "system_in_middle": False, "no_user": False, "loose_arguments": False}),
        ("qwen35", {"parts": frozenset({"user", "assistant", "system", "tool"}), "reasoning_open": "<think>\n"}),
        ("gemma2", {"system": False, "users_in_row": False, "assistant_first": False, "calls": "text"}),
        ("gemma3", {"system": True, "system_in_middle": False, "parts": frozenset({"user", "assistant"})}),
        ("mistral_v3", {"call_ids": "nine", "empty_content": "space", "user_after_tool": False}),
        (
            "mistral_v11",
            {"users_in_row": True, "call_ids": "any", "reasoning_parts": True, "reasoning_open": "[THINK]"},
        ),
        ("llama31", {"parallel_calls": False, "text_with_calls": "split"}),
        ("glm", {"arguments": "object", "loose_arguments": False, "reasoning_open": "\n<think>"}),
        ("gpt_oss", {"reasoning_with_calls": "joined", "lone_results": False, "developer": True}),
        ("gpt_oss", {"reasoning_open": "<|channel|>analysis<|message|>"}),
        ("phi4_mini", {"calls": "text", "reasoning_open": ""}),
        ("function_gemma", {"developer": True, "call_content": "absent"}),
        ("kimi", {"call_ids": "named"}),
        ("parts_alone", {"needs_parts": frozenset({"user", "assistant"}), "omits_tools": True, "flat_calls": True}),
    ],
)
def test_answers(name: str, expected: dict[str, Any]) -> None:
    assert {field: getattr(TEMPLATE[name].shape, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "tools", "fields"),
    [
        ("qwen3", "nested", "given"),
        ("gpt_oss", "nested", "filled"),
        ("function_gemma", "nested", "filled"),
        ("phi4_mini", "system", "given"),
        ("parts_alone", "flat", "filled"),
        ("gemma2", "lost", "given"),
        ("deepseek_r1", "words", "given"),
    ],
)
def test_answers_about_tools(name: str, tools: str, fields: str) -> None:
    shape = TEMPLATE[name].tool_shape
    assert (shape.tools, shape.tool_fields) == (tools, fields)


# Of one property, with what gpt-oss's template cannot concatenate, or has no word for.
PROPERTY_SCHEMAS: list[Any] = [
    {},
    True,
    {"type": "string"},
    {"type": "string", "description": None},
    {"type": ["string", "null"]},
    {"type": None},
    {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    {"oneOf": [{"type": "integer"}, {"type": "string", "description": "A word"}], "default": 3},
    {"enum": [1, 2], "default": 1},
    {"enum": ["a", None], "default": None},
    {"type": "string", "enum": ["a", "b"], "default": "a"},
    {"enum": [True, False], "default": False},
    {"const": "x"},
    {"$ref": "#/$defs/x"},
    {"type": "array"},
    {"type": "array", "items": {}},
    {"type": "array", "items": True},
    {"type": "array", "items": {"type": "object", "properties": {"b": {"enum": [1], "default": 1}}}},
    {"type": "object", "properties": {"b": {"type": "object"}}, "required": None},
    {"type": "object", "additionalProperties": {"type": "string"}},
]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_declarations_without_what_a_template_writes(name: str) -> None:
    """No description, no parameters, no type: what a client leaves out is no error, whatever the template writes."""
    functions: list[dict[str, Any]] = [
        {},
        {"description": None},
        {"parameters": None},
        {"parameters": {}},
        {"parameters": {"type": "object"}},
        {"parameters": {"type": "object", "properties": {}}},
        *({"parameters": {"type": "object", "properties": {"a": schema}}} for schema in PROPERTY_SCHEMAS),
    ]
    template = TEMPLATE[name]
    for function in functions:
        prompt = template.render([user("hi")], tools=[declared("weather", **function)])
        assert "weather" in prompt or template.tool_shape.tools == "lost", function


def test_the_template_for_tools_is_asked_itself() -> None:
    asked = ChatTemplate({"default": families.GEMMA2, "tool_use": families.QWEN3}, SPECIALS)
    assert (asked.shape.calls, asked.tool_shape.calls) == ("text", "structured")
    assert "<tool_call>" in asked.render(LOOP, tools=[TOOL])


@pytest.mark.parametrize(
    "source",
    [
        "fixed",
        "{{ raise_exception('no') }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for i in range(3000000) %}{% endfor %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_answers_nothing_keeps_the_default_in_a_bounded_time(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    # A clock that goes on by a millisecond with every look at it.
    clock = SimpleNamespace(monotonic=lambda: next(looks) / 1000)
    for module in ("template_probe", "chat_template"):
        monkeypatch.setattr(f"engine.text.{module}.time", clock)
    asked = made(source)
    assert next(looks) < 1000 * (template_probe.MAX_PROBE_SECONDS + template_probe.PROBE_RENDER_SECONDS) + 10
    assert asked.shape.calls == "structured" and asked.shape.users_in_row


def test_the_number_of_probes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_probe, "MAX_PROBES", 5)
    assert made(families.MISTRAL_V3).shape.call_ids == "any"


# ---- cases


def test_a_call_stands_where_the_template_asks_whether_content_is_none() -> None:
    for content in (None, ""):
        chat = [LOOP[0], says(content, tool_calls=LOOP[1]["tool_calls"]), LOOP[2]]
        text = TEMPLATE["deepseek_r1"].render(chat)
        assert text == (
            '<s><|User|>Weather?<|Assistant|><|calls|><|call|>function<|sep|>weather\n```json\n{"city":"Köln"}\n```<|end|>'
            "<|calls end|></s><|out|>21 degrees<|out end|>"
        )


def test_text_beside_calls_is_a_turn_of_its_own_where_it_would_be_lost() -> None:
    chat = [LOOP[0], says("Let me look.", tool_calls=LOOP[1]["tool_calls"]), LOOP[2]]
    assert "<|Assistant|>Let me look.</s><|Assistant|><|calls|>" in TEMPLATE["deepseek_r1"].render(chat)
    found = TEMPLATE["llama31"].render(chat)
    assert re.search(r"Let me look\.<\|eot_id\|>.*assistant.*\"name\": \"weather\"", found, re.DOTALL)


@pytest.mark.parametrize("arguments", [ARGUMENTS, '{"city": "Köln", "n": 12345678901234567890123, "f": 1.0}', "{}"])
def test_arguments_that_are_concatenated_are_the_text_that_the_client_sent(arguments: str) -> None:
    chat = [LOOP[0], says(None, tool_calls=[call("weather", arguments)]), LOOP[2]]
    assert f"<|call|>weather<|sep|>{arguments}<|end|>" in TEMPLATE["deepseek_v31"].render(chat)


def test_arguments_that_are_an_object_become_the_text_that_templates_concatenate() -> None:
    chat = [LOOP[0], says(None, tool_calls=[call("weather", {"city": "Köln"})]), LOOP[2]]
    assert '<|sep|>{"city": "Köln"}<|end|>' in TEMPLATE["deepseek_v31"].render(chat)
    for nothing in (None, "", " "):
        chat[1] = says(None, tool_calls=[call("weather", nothing)])
        assert "<|sep|>{}<|end|>" in TEMPLATE["deepseek_v31"].render(chat)


@pytest.mark.parametrize(
    "arguments",
    ['{"city": "Kö', "[1, 2]", "17", '"x"', "null", "[" * 3000, '{"a":' * 90 + "1" + "}" * 90, '{"a": "\\ud83d"}'],
)
def test_arguments_that_are_no_object_stay_readable(arguments: str) -> None:
    chat = [LOOP[0], says(None, tool_calls=[call("weather", arguments)]), LOOP[2]]
    for name, template in TEMPLATE.items():
        text = template.render(chat)
        assert arguments in text or json.dumps(arguments, ensure_ascii=False)[1:-1] in text, name
        text.encode()
    assert f"<parameter={INVALID_JSON}>\n{arguments}\n" in TEMPLATE["qwen35"].render(chat)


def test_ids_of_nine_are_the_same_in_call_result_and_later_turns() -> None:
    render = TEMPLATE["mistral_v3"].render
    first = re.findall(r'id": "(\w+)"', render(LOOP))
    assert len(first) == 2 and len(set(first)) == 1 and len(first[0]) == 9
    later = re.findall(r'id": "(\w+)"', render([*LOOP, says("Warm."), user("And now?"), *LOOP[1:]]))
    assert later == first * 2
    own = [LOOP[0], says(None, tool_calls=[call("weather", ARGUMENTS, "abcDEF123")]), result("x", "abcDEF123")]
    assert re.findall(r'id": "(\w+)"', render(own)) == ["abcDEF123"] * 2


def test_ids_that_are_missing_are_made_up_and_results_find_their_calls() -> None:
    calls = [call("f", "{}", None), call("g", "{}", None)]
    results = [{"role": "tool", "name": "g", "content": "of g"}, {"role": "tool", "content": "of f"}]
    text = TEMPLATE["function_gemma"].render([user("x"), says(None, tool_calls=calls), *results])
    assert "<response>g{value:<escape>of g<escape>}" in text and "<response>f{value:<escape>of f<escape>}" in text
    text = TEMPLATE["kimi"].render([user("x"), says(None, tool_calls=calls), *results])
    assert "functions.f:0" in text and "Return of functions.g:1\nof g" in text


# Shows results that stand right behind their calls alone, concatenates descriptions, writes None for what may be left
# out, names a role that it does not show, and reads parts but for turns with calls.
ODD = """{%- for t in tools | default([], true) | map(attribute='function') %}
{{- t.name + '(' }}{% for name, schema in t.parameters.properties | items %}
{{- name + '=None ' + schema.description }}{% endfor %}{{ ')' }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{{ '[calls]' ~ m.content }}
{%- for c in m.tool_calls %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}
{%- set ns = namespace(open=true) %}
{%- for r in messages[loop.index:] %}{% if r.role != 'tool' %}{% set ns.open = false %}
{%- elif ns.open %}{{ '[result]' + r.content }}{% endif %}{% endfor %}
{%- elif m.role in ('system', 'user', 'assistant') %}{{ '[' + m.role + ']' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
{%- elif m.role == 'developer' %}{% endif %}
{%- endfor %}"""


def test_a_template_of_many_whims() -> None:
    odd = made(ODD)
    calls = [call("f", '{"a": 1}', "one"), call("g", '{"b": 2}', "two")]
    parts = [{"type": "text", "text": word} for word in ("Let me", "look.")]
    chat = [
        {"role": "developer", "content": "Be brief."},
        user("x"),
        {**says(None, tool_calls=calls), "content": parts},
        system("Note."),
        result("of one", "one"),
        user("wait"),
        result("of two", "two"),
        user("y"),
    ]
    assert odd.render(chat, tools=[declared("f", parameters={"type": "object", "properties": {"a": {}}})]) == (
        'f(a=None )[system]Be brief.[user]x[calls]Let me\nlook.f{"a": 1}g{"b": 2}[result]of one[result]of two'
        "[system]Note.[user]wait[user]y"
    )
    # What no result follows stays where it is.
    assert odd.render([*chat[:4], user("z")]).endswith('g{"b": 2}[system]Note.[user]z')


def test_a_prefill_where_reasoning_is_cut_from_answers_and_an_empty_one_is_written() -> None:
    gemma = made(
        "{% for m in messages %}<|turn>{{ m.role }}\n"
        "{{ (m.content or '').split('<channel|>')[-1].split('<|channel>')[0] }}"
        "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
        "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
    )
    head = "<|turn>user\nx<turn|>\n<|turn>model\n"
    for begun in ("<|channel>thought\nSo", "<|channel>thought\nSo.\n<channel|>Ye"):
        for thinks in (False, True):
            options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
            options["kwargs"] = {"enable_thinking": thinks}
            assert gemma.render([user("x"), says(begun)], **options) == head + begun
    assert gemma.render([user("x"), says("Ye")], add_generation_prompt=False, continue_final_message=True).endswith(
        "\nYe"
    )


def test_what_filters_make_of_a_list_is_json() -> None:
    source = "{{ tools | map(attribute='function') | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert made(source).render([user("x")], tools=[declared("f")]) == '[{"name": "f"}]x'


def test_tools_are_words_where_a_template_writes_calls_and_no_declarations() -> None:
    for chat in (LOOP, [system("S"), *LOOP]):
        text = TEMPLATE["deepseek_r1"].render(chat, tools=[TOOL])
        assert text.count('"description": "Weather"') == 1 and text.index("# Tools") < text.index("Weather?")
        assert ("S\n\n# Tools" in text) == (len(chat) > 3)
        assert "# Tools" not in TEMPLATE["deepseek_r1"].render(chat)


def test_parallel_calls_become_turns_of_one_call_with_its_result() -> None:
    calls = [call("f", {"a": "1"}, "one"), call("g", {"a": "2"}, "two")]
    chat = [user("x"), says(None, tool_calls=calls), result("of two", "two"), result("of one", "one"), user("y")]
    for name in ("llama31", "gpt_oss"):
        text = TEMPLATE[name].render(chat)
        places = [text.index(word) for word in ("f", "of one", "of two")]
        assert places == sorted(places) and re.search(r"of one.*\bg\b.*of two", text, re.DOTALL), name


def test_reasoning_text_and_calls_where_two_of_them_are_all_that_fits() -> None:
    chat = [LOOP[0], says("Look.", reasoning_content="Hm.", tool_calls=LOOP[1]["tool_calls"]), LOOP[2]]
    assert "analysis<|message|>Hm.\n\nLook.<|end|>" in TEMPLATE["gpt_oss"].render(chat)
    chat[1] = says(None, reasoning_content="Hm.", tool_calls=LOOP[1]["tool_calls"])
    assert "analysis<|message|>Hm.<|end|>" in TEMPLATE["gpt_oss"].render(chat)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("more", [{}, {"reasoning_content": "Hm."}, {"tool_calls": []}, {"refusal": None}], ids=str)
def test_an_answer_without_content_is_an_empty_turn(name: str, more: Message) -> None:
    for turn in ({"role": "assistant", **more}, says(None, **more), says("", **more), says([], **more)):  # type: ignore[arg-type]
        text = TEMPLATE[name].render([user("one"), turn, user("two")])
        assert "None" not in text and text.index("one") < text.index("two")
        assert text == TEMPLATE[name].render([user("one"), says("", **more), user("two")])


@pytest.mark.parametrize("name", TEMPLATES)
def test_null_contents_of_users_and_tools_are_empty(name: str) -> None:
    chat = [user(None), *LOOP[1:2], result(None), says("ok"), user(None)]
    text = TEMPLATE[name].render(chat)
    assert "None" not in text and "ok" in text
    assert text == TEMPLATE[name].render([user(""), *LOOP[1:2], result(""), says("ok"), user("")])


def test_systems_are_joined_and_folded_only_where_they_must_be() -> None:
    chat = [system("S1"), system("S2"), user("U1"), says("A1"), system("S3"), user("U2"), system("S4")]
    strict = TEMPLATE["qwen35"].render(chat)
    assert strict == (
        "<|im_start|>system\nS1\n\nS2<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nS3\n\nU2\n\nS4<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert TEMPLATE["chatml"].render(chat).count("<|im_start|>system") == 4
    assert TEMPLATE["gemma2"].render(chat).startswith("<s><start_of_turn>user\nS1\n\nS2\n\nU1<end_of_turn>")
    # What was said stays the beginning of what is said next.
    for name in ("qwen35", "gemma2", "gemma3", "mistral_v11"):
        before = TEMPLATE[name].render(chat[:4], add_generation_prompt=False)
        assert TEMPLATE[name].render(chat, add_generation_prompt=False).startswith(before), name


def test_a_system_message_is_put_first_where_one_must_be() -> None:
    template = made(
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}"
    )
    assert template.shape.needs_system and template.render([user("a")]) == "[system][user]a"
    assert template.render([system("x"), user("a")]) == "[system]x[user]a"
    loop = template.render(LOOP)
    assert loop.startswith("[system][user]Weather?[assistant]weather{") and loop.endswith("21 degrees")


def test_developer_is_a_system_where_the_template_does_not_know_it() -> None:
    chat = [{"role": "developer", "content": "Be brief."}, user("Hi")]
    assert TEMPLATE["qwen3"].render(chat).startswith("<|im_start|>system\nBe brief.")
    assert "developer" not in TEMPLATE["chatml"].render(chat)
    assert "<start_of_turn>developer\nBe brief." in TEMPLATE["function_gemma"].render(chat)
    late = [user("Hi"), {"role": "developer", "content": "Be brief."}]
    assert "<start_of_turn>user\nHi\n\nBe brief." in TEMPLATE["gemma3"].render(late)


def test_a_user_behind_results_is_part_of_them_where_turns_alternate() -> None:
    text = TEMPLATE["mistral_v3"].render([*LOOP, user("In Fahrenheit."), says("70"), user("Thanks")])
    assert '{"content": 21 degrees\n\nIn Fahrenheit., "call_id"' in text


def test_reasoning_is_a_part_of_the_content_where_that_is_read() -> None:
    chat = [LOOP[0], says("Look.", reasoning="Hm.", tool_calls=LOOP[1]["tool_calls"]), LOOP[2]]
    text = TEMPLATE["mistral_v11"].render(chat)
    assert '[THINK]Hm.[/THINK]Look.[TOOL_CALLS]weather[ARGS]{"city": "Köln"}' in text
    chat[1] = says(None, reasoning="Hm.", tool_calls=LOOP[1]["tool_calls"])
    assert "[THINK]Hm.[/THINK][TOOL_CALLS]" in TEMPLATE["mistral_v11"].render(chat)
    assert go_on("mistral_v11", says(None, reasoning="Let me")).endswith("[/INST][THINK]Let me")
    assert go_on("mistral_v11", says("So", reasoning="Hm.")).endswith("[/INST][THINK]Hm.[/THINK]So")


def test_an_empty_reasoning_where_answers_must_have_one() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% if m.reasoning_content is not defined %}{{ raise_exception('no thinking field') }}"
        "{% elif m.reasoning_content is not string %}{{ raise_exception('thinking must be text') }}{% endif %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or () %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    )
    template = made(source)
    assert template.shape.needs_reasoning and template.tool_shape.needs_reasoning
    # All else that is asked about answers stays known.
    lenient = made(source.replace("{{ raise_exception('no thinking field') }}", "")).shape
    assert not lenient.needs_reasoning and template.shape == dataclasses.replace(lenient, needs_reasoning=True)
    text = template.render([user("Hi"), says("Yes."), user("So?"), says("No.", reasoning="Hm."), user("Well?")])
    assert text.startswith("[user]Hi[assistant]<think></think>Yes.[user]So?[assistant]<think>Hm.</think>No.[user]Well?")
    assert "[assistant]<think></think>Yes." in template.render([user("Hi"), says("Yes.", reasoning_content=None)])
    text = template.render(LOOP, tools=[TOOL])
    assert '[assistant]<think></think>weather{"city": "Köln"}[tool]' in text
    assert not any(other.shape.needs_reasoning or other.tool_shape.needs_reasoning for other in TEMPLATE.values())


def test_calls_that_were_never_answered() -> None:
    for name, template in TEMPLATE.items():
        text = template.render([*LOOP[:2], user("Never mind."), says("Good."), user("Next")])
        assert text.index("Never mind.") < text.index("Good.") < text.index("Next"), name


def test_contents_of_other_kinds_are_the_templates() -> None:
    source = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    chat: list[Message] = [user("x"), *LOOP[1:2], {**LOOP[2], "content": {"degrees": 21}}, user("y")]
    assert '{"degrees": 21}' in made(source).render(chat)
    assert '{"degrees": 21}' in TEMPLATE["gemma2"].render(chat)
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    assert '{"type": "image"}' in made(source).render(image)


def test_tools_that_say_little() -> None:
    bare = [declared("now"), declared("find", description=None, parameters={"type": "object", "properties": {"q": {}}})]
    for name, template in TEMPLATE.items():
        text = template.render([user("x")], tools=bare)
        if template.tool_shape.tools != "lost":
            assert "now" in text and "find" in text and "None" not in text, name
    optional = {"type": "object", "properties": {"q": {"anyOf": [{"type": "null"}, {"type": "integer"}]}}}
    assert "q:INTEGER," in TEMPLATE["function_gemma"].render([user("x")], tools=[declared("f", parameters=optional)])
    assert "q?: number," in TEMPLATE["gpt_oss"].render([user("x")], tools=[declared("f", parameters=optional)])
    assert '<|system|><|tool|>[{"name": "weather"' in TEMPLATE["phi4_mini"].render([user("x")], tools=[TOOL])


# ---- going on with the last message


def go_on(name: str, last: Message, **kwargs: Any) -> str:
    return TEMPLATE[name].render(
        [user("One"), last], continue_final_message=True, add_generation_prompt=False, kwargs=kwargs
    )


@pytest.mark.parametrize(
    ("name", "last", "end"),
    [
        ("qwen3", says("<think>\nLet me see, so"), "<|im_start|>assistant\n<think>\nLet me see, so"),
        ("qwen3", says("<think>\nHm.\n</think>\n\nThe"), "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nThe"),
        ("qwen3", says("<think>Hm.</think>The "), "<|im_start|>assistant\n<think>Hm.</think>The "),
        ("qwen3", says(None, reasoning_content="Let me "), "<|im_start|>assistant\n<think>\nLet me "),
        ("qwen3", says("", reasoning="Let me "), "<|im_start|>assistant\n<think>\nLet me "),
        ("qwen35", says("<think>\nLet me see, so"), "<|im_start|>assistant\n<think>\nLet me see, so"),
        ("qwen35", says(None, reasoning_content="Let me"), "<|im_start|>assistant\n<think>\nLet me"),
        ("deepseek_r1", says("<think>\nLet me see, so"), "<|User|>One<|Assistant|><think>\nLet me see, so"),
        ("deepseek_r1", says("<think>\nHm.\n</think>\n\nThe"), "<|Assistant|><think>\nHm.\n</think>\n\nThe"),
        ("deepseek_r1", says(None, reasoning_content="Hm"), "<|Assistant|><think>\nHm"),
        ("deepseek_r1", says("The answer"), "<|Assistant|>The answer"),
        ("deepseek_v31", says("<think>Let me"), "<|User|>One<|Assistant|><think>Let me"),
        ("deepseek_v31", says(None, reasoning_content="Let me"), "<|User|>One<|Assistant|><think>Let me"),
        ("glm", says(None, reasoning_content="Let me"), "<|assistant|>\n<think>Let me"),
        ("gpt_oss", says(None, thinking="Let me"), "<|start|>assistant<|channel|>analysis<|message|>Let me"),
    ],
)
def test_going_on_inside_of_the_reasoning(name: str, last: Message, end: str) -> None:
    assert go_on(name, last).endswith(end)
    assert go_on(name, last, enable_thinking=False, thinking=False).endswith(end)
    assert go_on(name, last, enable_thinking=True, thinking=True).endswith(end)


def test_going_on_without_reasoning_is_what_the_template_writes() -> None:
    assert go_on("qwen3", says("The answer is ")).endswith("<think>\n\n</think>\n\nThe answer is ")
    assert go_on("gemma2", says("The answer is")).endswith("<start_of_turn>model\nThe answer is")
    chat = [user("One"), says("Two"), says("Three")]
    text = TEMPLATE["gemma2"].render(chat, continue_final_message=True, add_generation_prompt=False)
    assert text.endswith("<start_of_turn>model\nTwo\n\nThree")


# ---- every conversation


def conversation(rng: random.Random) -> tuple[list[Message], list[str]]:
    """A conversation of any roles, and its words in their order: texts, names and arguments of calls, results."""
    words: list[str] = []

    def word() -> str:
        words.append(f"w{len(words)}x{rng.randrange(10**6)}y")
        return words[-1]

    def content(often: float = 0.85) -> Any:
        if rng.random() > often:
            return rng.choice([None, "", []])
        if rng.random() < 0.2:
            return [{"type": "text", "text": word()} for _ in range(rng.randint(1, 3))]
        return word()

    chat: list[Message] = [system(word()) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    for _ in range(rng.randint(1, 8)):
        kind = rng.choice(["user", "user", "assistant", "calls", "calls", "system"])
        if kind == "system":
            chat.append({"role": rng.choice(["system", "developer"]), "content": word()})
        elif kind == "user":
            chat.append({"role": "user", "content": content()})
        elif kind == "assistant":
            chat.append(says(content(), **rng.choice([{}, {"reasoning_content": "thought"}])))
        else:
            calls = []
            for number in range(rng.choice([1, 1, 2])):
                id = rng.choice([f"call_{len(words)}_{number}", f"{len(words):09d}", f"c{len(words)}"])
                arguments = {word(): word()} if rng.random() < 0.5 else {}
                name = word()
                calls.append(call(name, rng.choice([arguments, json.dumps(arguments)]), id))
            chat.append(says(rng.choice([None, ""]), tool_calls=calls))
            chat += [{"role": "tool", "tool_call_id": one["id"], "content": word()} for one in calls]
    return chat, words


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_of_a_conversation_stands_in_the_prompt_once_and_in_order(name: str) -> None:
    """But for a system that a template itself puts first, and parallel calls, whose results move behind them."""
    rng = random.Random(name)
    template = TEMPLATE[name]
    shape = template.shape
    ordered = shape.parallel_calls and not shape.system_by_last_user and name != "deepseek_v31"
    for _ in range(150):
        chat, words = conversation(rng)
        before = copy.deepcopy(chat)
        for tools in (None, [TOOL]):
            text = template.render(chat, tools=tools)
            assert chat == before
            assert "None" not in text
            for word in words:
                if template.shape.text_with_calls == "dropped" and word in beside_calls(chat):
                    continue
                # Some templates write a tool's name beside its result as well, or a text twice.
                most = 2 if name in ("function_gemma", "gpt_oss", "kimi", "other_parts") else 1
                assert 1 <= text.count(word) <= most, (word, chat, text)
            if ordered:
                places = [places_of(message, words, text) for message in chat]
                firsts = [min(found) for found in places if found]
                assert firsts == sorted(firsts), (chat, text)


def places_of(message: Message, words: list[str], text: str) -> list[int]:
    """Where a message stands in the prompt; a call's name and arguments come in any order."""
    told = repr(message)
    return [text.index(word) for word in words if word in told and word in text]


def beside_calls(chat: list[Message]) -> str:
    """The texts of turns of the assistant that are one with calls."""
    told = ""
    for _, turn in itertools.groupby(chat, lambda message: message["role"] == "assistant"):
        run = list(turn)
        if any(message.get("tool_calls") for message in run):
            told += repr([message["content"] for message in run])
    return told


def test_no_message_is_more_than_a_refusal() -> None:
    """Whatever stands in a message, the answer is a prompt or a RequestError."""
    rng = random.Random(7)
    scalars: list[Any] = [None, "", "x", "a b", 5, True, [], {}, ["x"], [None], {"text": "x"}, "\ud800", "{{ 7*7 }}"]

    def anything(depth: int = 2) -> Any:
        if not depth or rng.random() < 0.6:
            return rng.choice(scalars)
        if rng.random() < 0.5:
            return [anything(depth - 1) for _ in range(rng.randint(0, 3))]
        keys = ("type", "text", "function", "name", "arguments", "id", "thinking")
        return {rng.choice(keys): anything(depth - 1) for _ in range(rng.randint(0, 4))}

    fields = ("content", "tool_calls", "tool_call_id", "name", "reasoning_content", "refusal")
    roles = ("system", "developer", "user", "assistant", "tool", "query", None)
    num_prompts = 0
    for _ in range(150):
        chat = [
            {"role": rng.choice(roles)} | {name: anything() for name in fields if rng.random() < 0.5}
            for _ in range(rng.randint(1, 5))
        ]
        tools = rng.choice([None, [], [anything()], [declared("f", description=anything(), parameters=anything())]])
        for template in TEMPLATE.values():
            for continued in (False, True):
                with contextlib.suppress(RequestError):
                    text = template.render(
                        chat, tools=tools, continue_final_message=continued, add_generation_prompt=not continued
                    )
                    num_prompts += isinstance(text, str)
    assert num_prompts > 1000
