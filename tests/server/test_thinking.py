"""Reasoning budgets, what becomes of the reasoning, and its count: token by token and over the wire."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.config import StartupError
from engine.text.chat_template import ChatTemplate
from engine.text.grammar.compiler import GrammarCompiler
from engine.text.grammar.spec import GrammarSpec
from server.app import build_app
from server.parsers import harmony, marked_thoughts, registry, think
from server.parsers.base import ContentDelta, OutputParser, ReasoningDelta, ReasoningFamily
from server.protocol.thinking import ReasoningWatch, Thinking
from tests.server.support import live, served_model, tokenizer
from tests.server.test_tools import BODY, CALL, CHAT, HI, TOOLS, both_ways, say

WORDS = -(-tokenizer().vocab_size // 32)
THOUGHTS = "One and two and three and four and five and six and seven. "


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def watch(text: str, family: ReasoningFamily = think.QWEN3, *, inside: bool = False) -> ReasoningWatch:
    made = ReasoningWatch(tokenizer(), family, inside=inside)
    made.follow(encode(text))
    return made


def allowed(constraint: Thinking) -> list[int]:
    mask = np.zeros(WORDS, np.uint32)
    constraint.mask_into(mask)
    found: list[int] = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
    return found


@pytest.mark.parametrize(
    ("text", "inside", "state", "counted"),
    [
        ("", False, (False, False), 0),
        ("\n\n", False, (False, False), 0),
        ("<thi", False, (False, False), 0),
        ("Plain. <think>", False, (False, True), 0),
        ("\n<think>", False, (True, False), 0),
        ("<think>" + THOUGHTS, False, (True, False), len(encode(THOUGHTS))),
        (THOUGHTS, True, (True, False), len(encode(THOUGHTS))),
        (f"<think>{THOUGHTS}</think>Yes. <think>No.", False, (False, True), None),
    ],
)
def test_where_an_output_stands(text: str, inside: bool, state: tuple[bool, bool], counted: int | None) -> None:
    made = watch(text, inside=inside)
    assert (made.inside, made.is_over) == state
    if counted is not None:
        assert made.num_tokens == counted
    else:
        # The mark is spelled in several tokens here; all but its last one count.
        assert len(encode(THOUGHTS)) <= made.num_tokens < len(encode(THOUGHTS + "</think>"))


def test_stretches_of_harmony() -> None:
    analysis, call = "<|channel|>analysis<|message|>", "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    one = watch(f"{analysis}{THOUGHTS}", harmony.REASONING)
    assert one.inside and one.num_tokens == len(encode(THOUGHTS))
    both = watch(f"{analysis}{THOUGHTS}<|end|>{call}<|start|>assistant{analysis}", harmony.REASONING)
    assert both.inside and not both.is_over
    before = both.num_tokens
    both.follow(encode(THOUGHTS))
    assert both.num_tokens == before + len(encode(THOUGHTS))
    both.follow(encode("<|end|><|start|>assistant<|channel|>final<|message|>"))
    assert both.is_over and not both.inside
    assert watch(call, harmony.REASONING).num_tokens == 0


def test_a_budget_waits_for_a_whole_character() -> None:
    parrot, closing = encode("🦜"), encode("</think>\n\n")
    assert len(parrot) > 1
    made = Thinking(ReasoningWatch(tokenizer(), think.QWEN3, inside=True), None, budget=1, closing=closing)
    for token in parrot:
        assert made.is_free and made.forced_tokens() == () and len(allowed(made)) == 32 * WORDS
        made.accept(token)
    for place, token in enumerate(closing):
        assert not made.is_free and list(made.forced_tokens()) == closing[place:] and allowed(made) == [token]
        made.accept(token)
    assert made.is_free and not made.is_finished and made.error is None
    none = Thinking(ReasoningWatch(tokenizer(), think.QWEN3, inside=True), None, budget=0, closing=closing)
    assert list(none.forced_tokens()) == closing


K2_MARKS = ("ifm|think", "ifm|think_fast", "ifm|think_faster")


@pytest.mark.parametrize("mark", K2_MARKS)
def test_every_pair_of_marks_is_followed(mark: str) -> None:
    family = marked_thoughts.K2_HORIZON
    opened = f"Hi.<{mark}>\n"
    assert family.has_marks(opened) and family.has_marks(f"</{mark}>") and not family.has_marks("<ifm|tool_call>")
    assert family.follow(opened) == "inside" and family.follow(opened, 3) == "inside"
    assert family.opened_by(opened).closing == f"\n</{mark}>\n"
    # It copies the end from its history.
    for end in K2_MARKS:
        assert family.follow(f"{opened}Hm.</{end}>") == "over"
        made = watch(f"<{mark}>{THOUGHTS}</{end}>", family)
        assert made.is_over and not made.inside
    inside = watch(f"\n<{mark}>{THOUGHTS}", family)
    assert inside.inside and inside.mark == K2_MARKS.index(mark)
    assert inside.num_tokens == len(encode(THOUGHTS))
    # A second end is none of the answer's.
    parser = OutputParser(None, family)
    events = parser.push(f"<{mark}>Hm.</{mark}>Yes.</{mark}>") + parser.finish()
    assert events == [ReasoningDelta("Hm."), ContentDelta("Yes.")]


# ---- over the wire


@pytest.mark.parametrize("by_prompt", [True, False])
@pytest.mark.parametrize("mark", K2_MARKS)
async def test_a_budget_closes_the_mark_that_is_open(mark: str, by_prompt: bool) -> None:
    start = f"<{mark}>\n" if by_prompt else ""
    source = f"{{% for m in messages %}}{{{{ m.content }}}}\n{{% endfor %}}{start}"
    model = served_model(chat_template=ChatTemplate({"default": source}, {}))
    said = ("" if by_prompt else f"<{mark}>") + f"{2 * THOUGHTS}</{mark}>\nYes."
    async with live(model=model, reasoning_parser="k2_horizon") as server:
        full = await say(server, said, {**BODY, "max_tokens": 150})
        assert (full["reasoning"], full["content"]) == ((2 * THOUGHTS).rstrip(), "Yes.")
        body = {**BODY, "max_tokens": 150, "thinking_token_budget": 4}
        found = await say(server, said, body)
        assert len(encode(found["reasoning"])) <= 4 and found["content"]
        inline = await say(server, said, {**body, "separate_reasoning": False})
        assert f"\n</{mark}>\n" in inline["content"]


@pytest.mark.parametrize("name", ["thinking_token_budget", "max_thinking_tokens"])
async def test_a_budget_ends_the_reasoning(name: str) -> None:
    async with live(reasoning_parser="qwen3") as server:
        text = f"<think>{3 * THOUGHTS}</think>Yes."
        full = await say(server, text, BODY)
        assert full["reasoning"] == (3 * THOUGHTS).rstrip() and full["content"] == "Yes."
        for budget in (0, 1, 7):
            found = await say(server, text, {**BODY, name: budget})
            # The device says its text by place, so it goes on where the forced mark has left it.
            thought = tokenizer().decode(encode(text)[: len(encode("<think>")) + budget]).removeprefix("<think>")
            assert found["reasoning"] == thought.strip() and found["content"]
            _, whole = await server.post(CHAT, {**BODY, name: budget})
            usage = whole["usage"]
            assert (
                budget <= usage["completion_tokens_details"]["reasoning_tokens"] <= budget + len(encode("\n</think>"))
            )
        assert await say(server, text, {**BODY, name: -1}) == full
        assert await say(server, text, {**BODY, name: 1000}) == full
        assert (await say(server, "Plain.", {**BODY, name: 1}))["content"] == "Plain."
        # Token by token where every one of them is reported; and an error where the mark may not be written.
        assert await say(server, text, {**BODY, name: 7, "logprobs": True}) == found
        made = Thinking(
            ReasoningWatch(tokenizer(), think.QWEN3, inside=True), None, budget=0, closing=encode("</think>")
        )
        made.accept(encode("no")[0])
        assert made.error is not None
        found = await say(server, f"<think>Now.</think>{CALL}", {**BODY, name: 1000, "tools": TOOLS})
        assert found["finish_reason"] == "tool_calls"
        await server.all_free()


async def test_a_budget_of_harmony_goes_on_to_the_final_message() -> None:
    analysis, final = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    async with live(reasoning_parser="harmony") as server:
        text = f"{analysis}{3 * THOUGHTS}{final}Yes."
        full = await say(server, text, {**BODY, "max_tokens": 250})
        assert (full["reasoning"], full["content"]) == ((3 * THOUGHTS).rstrip(), "Yes.")
        found = await say(server, text, {**BODY, "max_tokens": 250, "thinking_token_budget": 5})
        assert len(encode(found["reasoning"])) <= 5 and found["content"]
        # A grammar rules the final message alone.
        choice = {"structured_outputs": {"choice": ["tea", "coffee"]}, "thinking_token_budget": 5}
        found = await say(server, text, {**BODY, "max_tokens": 250, **choice})
        assert len(encode(found["reasoning"])) <= 5 and found["content"] in ("tea", "coffee")


async def test_a_grammar_follows_the_budget() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    model = served_model(chat_template=ChatTemplate({"default": source}, {}))
    async with live(model=model) as server:
        for seed in range(4):
            body = {**BODY, "temperature": 1, "seed": seed, "structured_outputs": {"choice": ["tea", "coffee"]}}
            found = await both_ways(server, {**body, "thinking_token_budget": 9})
            assert found["content"] in ("tea", "coffee") and found["finish_reason"] == "stop", found
            _, none = await server.post(CHAT, {**body, "thinking_token_budget": 0})
            assert none["choices"][0]["message"]["content"] in ("tea", "coffee")
            assert "reasoning" not in none["choices"][0]["message"]


async def test_a_token_that_is_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.REASONING_PARSERS, "special", think.family("special", "<|im_start|>", "<|endoftext|>"))
    # The demo's own template begins every turn with that mark.
    source = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    model = served_model(chat_template=ChatTemplate({"default": source}, {}))
    async with live(model=model, reasoning_parser="special") as server:
        body = {**BODY, "temperature": 1, "structured_outputs": {"choice": ["tea", "coffee"]}, "max_thinking_tokens": 3}
        counts = []
        for turn in range(24):
            prompt = [{"role": "user", "content": f"hi {turn}"}]
            status, answer = await server.post(CHAT, {**body, "messages": prompt, "seed": turn})
            assert status == 200 and answer["choices"][0]["message"]["content"] in ("tea", "coffee"), answer
            counts.append(answer["usage"]["completion_tokens_details"]["reasoning_tokens"])
        assert 0 in counts and max(counts) > 3


async def test_a_default_budget_and_who_has_none() -> None:
    async with live(reasoning_parser="qwen3", reasoning_budget=2) as server:
        text = f"<think>{THOUGHTS}</think>Yes."
        assert len(encode((await say(server, text, BODY))["reasoning"])) <= 2
        assert (await say(server, text, {**BODY, "thinking_token_budget": -1}))["content"] == "Yes."
        # Other families have it too, and /v1/messages a word for more.
        _, found = await server.post("/v1/responses", {"input": HI, "temperature": 0, "max_output_tokens": 100})
        assert found["usage"]["output_tokens_details"]["reasoning_tokens"] <= 2 + len(encode("\n</think>"))
        for thinking, most in (({"type": "adaptive"}, 2), ({"type": "enabled", "budget_tokens": 9}, 9)):
            _, found = await server.post("/v1/messages", {"messages": HI, "max_tokens": 100, "thinking": thinking})
            thought = found["content"][0]
            assert thought["type"] == "thinking" and most - 2 <= len(encode(thought["thinking"])) <= most
        for fields in ({"thinking_token_budget": 2, "max_thinking_tokens": 3}, {"max_thinking_tokens": True}):
            status, body = await server.post(CHAT, {**BODY, **fields})
            assert status == 400 and body["error"]["param"] == "max_thinking_tokens"
        options = dataclasses.replace(server.state.options, reasoning_parser="none")
        with pytest.raises(StartupError, match="--reasoning-budget needs a model that reasons"):
            build_app(server.engine, server.state.model, options)
    async with live() as server:
        status, body = await server.post(CHAT, {**BODY, "max_thinking_tokens": 3})
        assert status == 400 and "needs a model that reasons" in body["error"]["message"]
        status, body = await server.post("/v1/completions", {"prompt": "x", "max_thinking_tokens": 3})
        assert status == 400 and body["error"]["param"] == "max_thinking_tokens"
        _, body = await server.post(CHAT, BODY)
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_what_becomes_of_the_reasoning() -> None:
    text = f"<think>\n{THOUGHTS}\n</think>\n\nYes, \nit is."
    async with live(reasoning_parser="qwen3") as server:
        apart = await say(server, text, BODY)
        assert await say(server, text, {**BODY, "separate_reasoning": True, "stream_reasoning": True}) == apart
        hidden = await say(server, text, {**BODY, "include_reasoning": False})
        assert hidden == {**apart, "reasoning": ""}
        inline = await say(server, text, {**BODY, "separate_reasoning": False})
        assert inline == {**apart, "reasoning": "", "content": text}
        held = {**BODY, "stream_reasoning": False}
        assert await say(server, text, held) == apart
        events = await server.events(CHAT, held)
        pieces = [event["choices"][0]["delta"].get("reasoning") for event in events[1:-1]]
        assert [piece for piece in pieces if piece] == [apart["reasoning"]]
        assert len([event for event in events[1:-1] if event["choices"][0]["delta"].get("content")]) > 1
        usage = {"stream_options": {"include_usage": True}}
        last = (await server.events(CHAT, {**BODY, "include_reasoning": False, **usage}))[-2]
        assert last["usage"]["completion_tokens_details"]["reasoning_tokens"] >= len(encode(THOUGHTS))
    async with live(reasoning_parser="harmony") as server:
        status, body = await server.post(CHAT, {"messages": HI, "separate_reasoning": False})
        assert status == 400 and body["error"]["param"] == "separate_reasoning"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_held_reasoning_comes_at_its_end_however_the_text_is_cut(size: int) -> None:
    text = f"<think>{THOUGHTS}</think>Yes."
    for whole in (text, text[:30]):
        parser = OutputParser(None, think.QWEN3, style="held")
        events = [event for at in range(0, len(whole), size) for event in parser.push(whole[at : at + size])]
        events += parser.finish()
        assert [event.text for event in events if isinstance(event, ReasoningDelta)] == [whole[7:][: len(THOUGHTS) - 1]]
        assert isinstance(events[0], ReasoningDelta)
        assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == whole[len(text) - 4 :]


@pytest.mark.parametrize(
    "pattern, text, fine",
    [
        ("yes|no", "yes", True),
        ("yes|no", "\nyes", True),
        ("yes|no", "\n\nno", True),
        ("yes|no", "\n\n\n\n\n\nno", False),
        ("yes|no", " no", False),
        ("\\n?yes", "\nyes", True),
        ("\\n{3}yes", "\n\n\nyes", True),
    ],
)
def test_newlines_may_stand_between_reasoning_and_a_grammar(pattern: str, text: str, fine: bool) -> None:
    """As models write them; those that the grammar asks for itself are the answer's own."""
    compiler = GrammarCompiler(tokenizer(), [next(iter(tokenizer().special_ids))], tokenizer().vocab_size)
    grammar = compiler.compile(GrammarSpec("regex", pattern)).state()
    newlines = frozenset(encode("\n"))
    made = Thinking(ReasoningWatch(tokenizer(), think.QWEN3, inside=True), grammar, blanks=newlines)
    mask = np.zeros(compiler.mask_words, np.uint32)
    for token_id in encode("Hm.</think>"):
        made.accept(token_id)
    assert not made.is_free and not made.forced_tokens()
    for token_id in encode(text):
        made.mask_into(mask)
        if not mask[token_id >> 5] & (1 << (token_id & 31)):
            assert not fine
            return
        made.accept(token_id)
        assert made.error is None
    assert fine and made.is_finished
