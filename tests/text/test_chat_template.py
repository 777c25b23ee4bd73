"""ChatTemplate against transformers' apply_chat_template, and where a template or its messages are bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import StartupError
from engine.request import RequestError
from engine.text import chat_template as module
from engine.text.chat_template import ChatTemplate
from tests.text import kinds, templates

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <today> & 'tomorrow' 天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "Time", "parameters": {}}},
]
USER: dict[str, Any] = {"role": "user", "content": '  What\'s the <weather> in "Köln"? 😀\n'}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    ],
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief.\n\n"}, USER],
    [USER, {"role": "assistant", "content": " Sunny. "}, {"role": "user", "content": "Thanks"}],
    [USER, CALL, {"role": "tool", "content": '{"t": 21}', "tool_call_id": "call12345", "name": "weather"}],
    [USER, {"role": "assistant", "content": "Hm", "reasoning": "\nlet me see\n", "refusal": None}],
    [{"role": "user", "content": [{"type": "text", "text": "one <b>"}, {"type": "text", "text": "two"}]}],
    [{"role": "system", "content": "x"}, {"role": "user", "content": "{{ 7*7 }} {% for %}"}],
]


def both(template: str, tmp_path: Path) -> tuple[ChatTemplate, Any]:
    from transformers import PreTrainedTokenizerFast

    directory = kinds.write("byte_level", tmp_path, {**kinds.CONFIG, "image_token": "<image>"})
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    ours = ChatTemplate.load(directory)
    assert ours is not None
    assert ours.source == template
    return ours, PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("name", templates.ALL)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    ours, theirs = both(templates.ALL[name], tmp_path)
    compared = 0
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for generation in (True, False):
                for kwargs in ({}, {"enable_thinking": False, "today": "1 Jan 2026"}):
                    found = ours.render(messages, tools=tools, add_generation_prompt=generation, kwargs=kwargs)
                    try:
                        expected = theirs.apply_chat_template(
                            messages, tools=tools, add_generation_prompt=generation, tokenize=False, **kwargs
                        )
                    except Exception:
                        expected = ""
                    if holds(expected, messages):
                        compared += 1
                        assert found == expected
                    else:
                        # What the template refuses or leaves out is given to it in another shape.
                        assert holds(found, messages)
    assert compared >= 30


def holds(prompt: str, messages: list[dict[str, Any]]) -> bool:
    """Whether a prompt holds all that was said, and no part of it as Python writes it."""
    words: list[str] = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        words += [part["text"].strip() for part in parts]
        words += ["weather"] * ("tool_calls" in message)
    told = [word in prompt or json.dumps(word)[1:-1] in prompt for word in words]
    return all(told) and "'type': 'text'" not in prompt


@pytest.mark.parametrize("name", templates.ALL)
def test_continue_final_message_equals_transformers(name: str, tmp_path: Path) -> None:
    ours, theirs = both(templates.ALL[name], tmp_path)
    for text in ("The answer is", "The answer is ", "  padded  "):
        for content in (text, [{"type": "text", "text": text}]):
            messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": content}]
            # A template that cannot read parts gets their text.
            read = messages if "assistant" in ours.shape.parts else [USER, {"role": "assistant", "content": text}]
            expected = theirs.apply_chat_template(read, continue_final_message=True, tokenize=False)
            found = ours.render(messages, continue_final_message=True, add_generation_prompt=False)
            assert found == expected
            assert messages[1]["content"] == content  # the caller's messages are left alone


def test_the_demo_template_equals_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    import engine.demo

    directory = Path(str(engine.demo.__file__)).parent
    ours, theirs = ChatTemplate.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours is not None
    assert ours.shape.parts == {"system", "user", "assistant", "tool"}
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
            assert ours.render(messages, tools=tools) == expected


def test_special_tokens_and_globals(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ image_token }}{{ pad_token }}"
    source += "|{{ strftime_now('%Y') | length }}"
    ours, theirs = both(source, tmp_path)
    assert ours.render([USER]) == "<s></s><unk><image>|4"
    assert theirs.apply_chat_template([USER], tokenize=False) == "<s></s><unk><image>|4"
    assert ours.render([USER], kwargs={"bos_token": "B"}).startswith("B</s>")
    assert ours.render([USER], kwargs={"messages": [], "tools": 1}).startswith("<s></s>")
    assert ChatTemplate({"default": "{{ x.y }}{{ x }}"}, {}).render([USER], kwargs={"x": object()}) == "<object>"


def test_which_roles_may_have_parts() -> None:
    for name in ("chatml", "llama3", "mistral"):
        assert not ChatTemplate({"default": templates.ALL[name]}, {"bos_token": "<s>", "eos_token": "</s>"}).shape.parts
    assert ChatTemplate({"default": templates.PARTS}, {}).shape.parts == {"user", "assistant"}
    assert not ChatTemplate({"default": "{{ messages[0].content }}"}, {}).shape.parts


def test_where_templates_are_found(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = kinds.write("byte_level", tmp_path)
    assert ChatTemplate.load(directory) is None

    def texts() -> list[str]:
        ours = ChatTemplate.load(directory)
        theirs = PreTrainedTokenizerFast.from_pretrained(directory)
        assert ours is not None
        found = [ours.render([USER], tools=tools) for tools in (None, TOOLS)]
        assert found == [theirs.apply_chat_template([USER], tools=tools, tokenize=False) for tools in (None, TOOLS)]
        return found

    kinds.write("byte_level", directory, {**kinds.CONFIG, "chat_template": "field"})
    assert texts() == ["field", "field"]
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    kinds.write("byte_level", directory, {**kinds.CONFIG, "chat_template": named})
    assert texts() == ["plain", "with tools"]
    (directory / "chat_template.jinja").write_text("file")
    assert texts() == ["file", "file"]
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("extra file")
    assert texts() == ["file", "extra file"]

    assert ChatTemplate.load(directory, "{{ 1 + 1 }}").render([USER]) == "2"  # type: ignore[union-attr]
    other = tmp_path / "other.jinja"
    other.write_text("other")
    assert ChatTemplate.load(directory, str(other)).render([USER]) == "other"  # type: ignore[union-attr]


def test_template_in_a_json_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": {"only": "named"}}))
    ours = ChatTemplate.load(tmp_path)
    assert ours is not None
    assert ours.render([USER], tools=TOOLS) == "named"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", ["tokenizer_config.json", "line 1"]),
        ("a\n{% endfor %}", ["tokenizer_config.json", "line 2"]),
        (7, ["tokenizer_config.json", "chat_template"]),
        ([{"name": "a"}], ["tokenizer_config.json", "chat_template"]),
        ([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}], ["default", "a, b"]),
    ],
)
def test_bad_templates_stop_the_start(template: Any, words: list[str], tmp_path: Path) -> None:
    directory = kinds.write("byte_level", tmp_path, {**kinds.CONFIG, "chat_template": template})
    with pytest.raises(StartupError) as caught:
        ChatTemplate.load(directory)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bad_overrides_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="nowhere"):
        ChatTemplate.load(tmp_path, str(tmp_path / "nowhere.jinja"))
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match="UTF-8"):
        ChatTemplate.load(tmp_path, str(tmp_path / "latin.jinja"))
    with pytest.raises(StartupError, match="--chat-template"):
        ChatTemplate.load(tmp_path, "{% for %}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.here }}", "nothing"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "too long"),
    ],
)
def test_errors_are_400_with_the_templates_words(source: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate({"default": source}, {}).render([USER])
    assert message in str(caught.value)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set rest = messages[loop.index0:] %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    ],
)
def test_rendering_time_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RENDER_SECONDS", 0.02)
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(RequestError, match="longer than"):
        template.render([USER] * 20_000)


def test_what_cannot_be_continued() -> None:
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, {})
    image: list[dict[str, Any]] = [USER, {"role": "assistant", "content": [{"type": "image"}]}]
    for messages in ([USER, CALL], image):
        with pytest.raises(RequestError, match="no text"):
            template.render(messages, continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(RequestError, match="exclude"):
        template.render([USER], continue_final_message=True)
    with pytest.raises(RequestError, match="at least one"):
        template.render([])
    first = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    with pytest.raises(RequestError, match="leaves"):
        first.render(
            [USER, {"role": "assistant", "content": "A"}], continue_final_message=True, add_generation_prompt=False
        )
