"""The dictation itself: what is dictated is what comes back, in every cut."""

from __future__ import annotations

import pytest

from tests.server.dictate import CUTS, Cut, dictated, tokens_of
from tests.server.support import Live, tokenizer

TEXT = 'Hi <tool_call>\n{"name": "f", "arguments": {"a": "é 谢 😊"}}\n</tool_call> done'


@pytest.mark.parametrize("cut", CUTS)
async def test_a_text_is_said(server: Live, cut: Cut) -> None:
    with dictated(server, TEXT, cut=cut) as requests:
        body = await server.complete(max_tokens=400)
        events = await server.events("/v1/completions", {"prompt": "x", "max_tokens": 400})
    assert body["choices"][0]["text"] == TEXT
    assert body["choices"][0]["finish_reason"] == "stop"
    assert "".join(c["choices"][0]["text"] for c in events if c != "[DONE]" and c["choices"]) == TEXT
    assert [request.stream for request in requests] == [False, True]


async def test_texts_in_order_and_cut_by_length(server: Live) -> None:
    with dictated(server, "one", "two"):
        said = [(await server.complete(max_tokens=9))["choices"][0]["text"] for _ in range(3)]
    assert said == ["one", "two", "two"]
    with dictated(server, "0123456789", cut="characters"):
        choice = (await server.complete(max_tokens=4))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("0123", "length")


def test_cuts_say_the_same_in_different_tokens() -> None:
    whole, characters = (tokens_of("what a story", cut) for cut in CUTS)
    assert len(characters) > len(whole)
    assert tokenizer().decode(whole) == tokenizer().decode(characters) == "what a story"
