"""IncrementalDetokenizer: a stream's text is the whole's text, however its ids are cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import SamplingParams
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from tests.text import kinds

FAMILY = "👨‍👩‍👧 🇩🇪 👍🏽 é 中文 ﷽"


def stream(
    tokenizer: Tokenizer, prompt: list[int], chunks: Sequence[Sequence[int]], sampling: SamplingParams
) -> tuple[list[str], str | None]:
    """The texts of every push and of finish, and the stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, sampling)
    texts = [detokenizer.push(chunk) for chunk in chunks]
    return [*texts, detokenizer.finish()], detokenizer.stop_reason


def cut(ids: list[int], places: list[int]) -> list[list[int]]:
    edges = sorted({0, len(ids), *(place % (len(ids) + 1) for place in places)})
    return [ids[start:end] for start, end in itertools.pairwise(edges)]


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    bos = tokenizer.token_to_id("<s>")
    assert bos is not None
    words = tokenizer.encode("Hello the cat", add_special_tokens=False)
    space = [id for id in (tokenizer.token_to_id("▁"),) if id is not None]
    return [[bos], [bos, *words], words, [bos, *space], [bos, *space, *space]]


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The definition, character by character: (end, stop)."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text.endswith(stop, 0, end):
                return end, stop
    return None


@pytest.mark.parametrize("kind", kinds.MAKERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_stream_equals_whole_on_random_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = kinds.load(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    prompt = data.draw(st.sampled_from(prompts(tokenizer)))
    chunks = cut(ids, data.draw(st.lists(st.integers(0, 24), max_size=24)))
    skip = data.draw(st.booleans())
    texts, stop = stream(tokenizer, prompt, chunks, SamplingParams(skip_special_tokens=skip))
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    assert whole.startswith(before)
    assert "".join(texts) == whole[len(before) :]
    assert stop is None


@pytest.mark.parametrize("kind", [*kinds.WITH_TABLE, "byte_level_regex"])
@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.sampled_from([FAMILY, "一二三四", "a\u0301\u200d😀"])))
def test_no_replacement_character_for_whole_text(kind: str, text: str) -> None:
    """A character over several tokens comes at once, and only when it is whole."""
    tokenizer = kinds.load(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts, _ = stream(tokenizer, [1], [[id] for id in ids], SamplingParams(skip_special_tokens=False))
    assert texts[-1] == ""
    if kind != "unigram":
        assert "".join(texts).removeprefix(" ") == text.removeprefix(" ")
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in texts)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_unfinished_and_invalid_bytes(kind: str) -> None:
    tokenizer = kinds.load(kind)
    by_bytes = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size - 1, -1, -1)}
    face = [by_bytes[bytes([byte])] for byte in "😀".encode()]
    letter = by_bytes[b"a"]
    plain = SamplingParams()
    # Held back until whole, or until the stream ends.
    assert stream(tokenizer, [1], [[id] for id in face], plain)[0] == ["", "", "", "😀", ""]
    assert stream(tokenizer, [1], [[id] for id in face[:3]], plain)[0] == ["", "", "", "\ufffd"]
    # Invalid: sent as soon as it is known.
    assert stream(tokenizer, [1], [[face[0]], [letter]], plain)[0] == ["", "\ufffda", ""]
    assert stream(tokenizer, [1], [[face[1]], [letter]], plain)[0] == ["\ufffd", "a", ""]
    assert stream(tokenizer, [1], [[face[0]], face], plain)[0] == ["", "\ufffd😀", ""]
    # A special token in the middle is skipped, and the character survives.
    assert stream(tokenizer, [1], [face[:2], [2], face[2:]], plain)[0] == ["", "", "😀", ""]


def test_the_leading_space_of_sentencepiece() -> None:
    tokenizer = kinds.load("byte_fallback")
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    bos = tokenizer.token_to_id("<s>")
    assert bos is not None
    word = tokenizer.encode("Hello", add_special_tokens=False)
    assert "".join(stream(tokenizer, [bos], [ids], SamplingParams())[0]) == "the cat"
    assert "".join(stream(tokenizer, [bos, *word], [ids], SamplingParams())[0]) == " the cat"
    assert "".join(stream(tokenizer, [bos], [ids], SamplingParams(skip_special_tokens=False))[0]) == " the cat"
    bare = kinds.load("byte_fallback_no_strip")
    assert "".join(stream(bare, [1], [bare.encode(" the", add_special_tokens=False)], SamplingParams())[0]) == " the"


def test_spaces_between_special_tokens() -> None:
    tokenizer = kinds.load("no_decoder")
    ids = tokenizer.encode("cat</s></s>sat", add_special_tokens=False)
    close = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(stream(tokenizer, [1], [[id] for id in ids], close)[0]) == "cat</s></s>sat"
    spaced = SamplingParams(skip_special_tokens=False)
    assert "".join(stream(tokenizer, [1], [[id] for id in ids], spaced)[0]) == " cat </s> </s> sat"


WORDS = ["the", "he c", "e", "aa", "aab", "ab", "\n\n", "中", "😀", "</s>", " "]
STOPS = st.lists(st.one_of(st.sampled_from(WORDS), st.text("ab", min_size=1, max_size=4)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram", "no_decoder"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_stop_strings_however_the_ids_are_cut(kind: str, data: st.DataObject) -> None:
    tokenizer = kinds.load(kind)
    text = data.draw(
        st.one_of(
            st.text("ab", max_size=30),
            st.text(max_size=10),
            st.lists(st.sampled_from(["the ", "cat", " he c", "aab", "\n\n\n", "中文", "😀"]), max_size=8).map("".join),
        )
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = data.draw(STOPS)
    include = data.draw(st.booleans())
    min_tokens = data.draw(st.sampled_from([0, 0, 0, 1, 3]))
    sampling = SamplingParams(
        stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens, skip_special_tokens=False
    )
    plain = SamplingParams(skip_special_tokens=False)
    # The stable text after min_tokens tokens is where the search begins.
    detokenizer = IncrementalDetokenizer(tokenizer, [1], plain)
    head = detokenizer.push(ids[:min_tokens])
    tail = detokenizer.push(ids[min_tokens:]) + detokenizer.finish()
    met = first_stop(tail, stops) if len(ids) > min_tokens else None
    if met is None:
        expected, reason = head + tail, None
    else:
        end, reason = met
        expected = head + tail[: end if include else end - len(reason)]
    for chunks in (cut(ids, data.draw(st.lists(st.integers(0, 30), max_size=8))), [[id] for id in ids], [ids]):
        texts, stop = stream(tokenizer, [1], chunks, sampling)
        assert ("".join(texts), stop) == (expected, reason)


def test_what_may_start_a_stop_string_is_held_back_and_no_more() -> None:
    tokenizer = kinds.load("byte_level")
    letters = [tokenizer.token_to_id(letter) for letter in "xSTOyST"]
    chunks = [[id] for id in letters if id is not None]
    texts, stop = stream(tokenizer, [1], chunks, SamplingParams(stop=("STOP", "Oz")))
    assert texts == ["x", "", "", "", "STOy", "", "", "ST"]
    assert stop is None


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_regex", "byte_fallback", "no_decoder"])
def test_special_tokens_that_are_kept(kind: str) -> None:
    """A marker is text, the other special tokens are none, however the ids are cut."""
    tokenizer = kinds.load(kind)
    marker, end = (tokenizer.token_to_id(text) for text in ("<|im_end|>", "</s>"))
    assert marker is not None and end is not None
    word = tokenizer.encode("the cat", add_special_tokens=False)
    ids = [end, marker, *word, marker, end]
    kept = SamplingParams(kept_special_ids=frozenset([marker]))
    whole = "".join(stream(tokenizer, [end], [ids], kept)[0])
    assert whole == "".join(stream(tokenizer, [end], [[id] for id in ids], kept)[0])
    assert whole.replace(" ", "") == "<|im_end|>thecat<|im_end|>"
    # Beside requests that keep none.
    assert "<|" not in "".join(stream(tokenizer, [end], [ids], SamplingParams())[0])


def test_nothing_comes_after_the_stop() -> None:
    tokenizer = kinds.load("byte_level")
    detokenizer = IncrementalDetokenizer(tokenizer, [1], SamplingParams(stop=("cat",)))
    assert detokenizer.push(tokenizer.encode("the cat sat", add_special_tokens=False)) == "the "
    assert detokenizer.stop_reason == "cat"
    assert detokenizer.push(tokenizer.encode(" on", add_special_tokens=False)) == ""
    assert detokenizer.finish() == ""


def test_the_first_complete_stop_wins_and_of_two_that_end_together_the_longer() -> None:
    tokenizer = kinds.load("byte_level")

    def run(text: str, *stops: str) -> tuple[str, str | None]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        texts, stop = stream(tokenizer, [1], [ids], SamplingParams(stop=stops))
        return "".join(texts), stop

    assert run("abcdef", "abcde", "bc") == ("a", "bc")
    assert run("abcdef", "c", "abc", "bc") == ("", "abc")
    assert run("abcabd", "abd") == ("abc", "abd")
    assert run("aaab", "aab") == ("a", "aab")


def test_a_stop_string_of_the_replacement_character_at_the_end() -> None:
    tokenizer = kinds.load("byte_fallback")
    half = tokenizer.token_to_id("<0xF0>")
    assert half is not None
    texts, stop = stream(tokenizer, [1], [[half]], SamplingParams(stop=("\ufffd",)))
    assert (texts, stop) == (["", ""], "\ufffd")
    # Too early for the search: min_tokens were not reached.
    texts, stop = stream(tokenizer, [1], [[half]], SamplingParams(stop=("\ufffd",), min_tokens=4))
    assert (texts, stop) == (["", "\ufffd"], None)
