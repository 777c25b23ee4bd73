"""Calls and marks inside of a reasoning: drafts stay its text to the letter, wrap marks and all."""

from __future__ import annotations

import pytest

from server.parsers.registry import REASONING_PARSERS, TOOL_PARSERS
from tests.server.call_writers import WRITERS
from tests.server.test_parsers import outcome, parser, run

TOOLS = {"now": {"type": "object", "properties": {}}}
# Families whose calls and reasoning both have marks around what is shown.
WRAPPED = {
    "solar_open": "<|end|>",
    "cohere_command3": "<|END_THINKING|>",
    "gigachat3": "</think>",
    "kimi_k3": "<|close|>think<|sep|>",
}


def test_every_wrapping_family_is_tried() -> None:
    assert {name for name, family in TOOL_PARSERS.items() if family.wrap} == WRAPPED.keys()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-character"])
@pytest.mark.parametrize("has_call", [False, True])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrap_marks_inside_of_a_reasoning(name: str, closed: bool, has_call: bool, whole: bool) -> None:
    marks = [mark for mark in TOOL_PARSERS[name].wrap if mark != WRAPPED[name]]
    assert marks
    thought = f"The turn is {marks[0]}, then {marks[-1]}, and so on."
    call = WRITERS[name]([("now", {})]) if has_call else ""
    if has_call and closed:
        # A draft: its own marks are text as well.
        thought, call = f"{thought} {call} or not.", ""
    text = thought + call + (f"{WRAPPED[name]}Yes." if closed else "")
    reasoning = name if name in REASONING_PARSERS else "qwen3"
    made = parser(name, reasoning, start_inside=True, tools=TOOLS)
    content, read, calls = outcome(run(made, [text] if whole else list(text)))
    assert read == thought
    assert content == ("Yes." if closed else "")
    assert calls == ([("now", "{}")] if call else [])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-character"])
@pytest.mark.parametrize(
    ("name", "text", "cut", "shown"),
    [
        ("solar_open", "Yes.<|end|><|begin|>assi", True, "Yes."),
        ("solar_open", "Yes.<|end|><|begin|>assi", False, "Yes.<|begin|>assi"),
        ("solar_open", "Yes <", True, "Yes <"),
        ("kimi_k3", "Yes.<|close|>respo", True, "Yes."),
        ("gigachat3", "Hi.<|message_sep|>\n\nassistant<|role_sep|>\nMore", False, "Hi.\n\nMore"),
        ("gigachat3", "Hi.<|message_sep|>\n\nassistant<|role_", True, "Hi."),
        ("gigachat3", "I am an assistant", True, "I am an assistant"),
    ],
)
def test_marks_around_what_is_shown(name: str, text: str, cut: bool, shown: str, whole: bool) -> None:
    made = parser(name, tools=TOOLS)
    events = [event for piece in ([text] if whole else list(text)) for event in made.push(piece)]
    events += made.finish(cut=cut)
    assert outcome(events)[0].strip() == shown


NOW = WRITERS["solar_open"]([("now", {})])
BEGIN = "<|begin|>assistant"


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-character"])
@pytest.mark.parametrize("has_tools", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "thought"),
    [
        (f"<|think|>A<|end|>{BEGIN}<|think|>B<|end|>{BEGIN}<|content|>Yes.", "Yes.", "AB"),
        ("<|think|>A<|end|><|think|>B<|end|>Yes.", "Yes.", "AB"),
        (f"<|content|>Well.<|end|>{BEGIN}<|think|>B<|end|>{BEGIN}<|content|>Yes.", "Well.Yes.", "B"),
        ("<|think|>A<|content|>Yes.", "Yes.", "A"),
        (f"<|think|>Hm. {BEGIN}<|content|>Yes.", "Yes.", "Hm."),
        ("\n<|think|><|think|>A<|end|>Yes.", "Yes.", "A"),
        ("<|think|>It is <|begin|>assistant, then <|content|>, and so on.", "", None),
        ("<|think|>A<|end|>It writes `<|think|>` first.", "It writes `<|think|>` first.", "A"),
        ("It writes <|think|> first <", "It writes <|think|> first <", ""),
        ("One <<|think|>A<|end|>Yes.", "One <Yes.", "A"),
    ],
)
def test_parts_of_a_turn(text: str, content: str, thought: str | None, has_tools: bool, whole: bool) -> None:
    made = parser("solar_open" if has_tools else None, "solar_open", tools=TOOLS)
    found = outcome(run(made, [text] if whole else list(text)))
    wanted = text.removeprefix("<|think|>") if thought is None else thought
    assert found == (content, wanted, [])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-character"])
def test_calls_between_parts_of_a_turn(whole: bool) -> None:
    again = NOW.replace("abc", "def")
    # The second call at the end of an answer, and of a thought that never closes.
    for end, content in ((f"B<|end|>{BEGIN}<|content|>Yes.<|end|>{BEGIN}{again}", "Yes."), (f"B{again}", "")):
        text = f"A<|end|>{BEGIN}{NOW}{BEGIN}<|think|>{end}"
        made = parser("solar_open", "solar_open", start_inside=True, tools=TOOLS)
        found = outcome(run(made, [text] if whole else list(text)))
        assert found == (content, "AB", [("now", "{}"), ("now", "{}")]), text
        assert made.num_calls == 2
