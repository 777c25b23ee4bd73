"""Texts of megabytes: the ids of the whole, found a piece at a time; and ids that are kept as an array."""

from __future__ import annotations

import asyncio
import random
import threading
from array import array
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.flags import DEMO_MODEL
from engine.text import long_texts
from engine.text.long_texts import copied, cut_text, packed
from engine.text.tokenizer import Tokenizer

_TEXT = (
    "Once upon a time there was a fox. It's 17 + 25 = 42\n\n  indented code: {x: [1,2]}; 谢谢 你好。 naïve café 😊 "
    "don't <|im_end|> \t tabs e\u0301e <|im_start|>user"
)
WORDS = [*_TEXT.split(" "), "", "  ", "\n", "\n\n "]


def words_of(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def trained(pre: Any, *, normalizer: Any = None, ends: bool = False) -> Tokenizer:
    """A tokenizer of that kind, trained on such words; ends: with a token before and one behind a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([words_of(random.Random(0), 4000)], trainer)
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return Tokenizer(backend)


def byte_level(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


KINDS = {
    "demo": lambda: Tokenizer.load(DEMO_MODEL),
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), ends=True),
    "words with what is before them": lambda: trained(
        byte_level(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        normalizer=normalizers.NFC(),
    ),
    "a space before each text": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "something before each text": lambda: trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Prepend("x")
    ),
    "words of two": lambda: trained(byte_level(r"\w+\W\w+|\W+|\w+")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, rng = KINDS[kind](), random.Random(3)
    for size in (200, 900):
        monkeypatch.setattr(long_texts, "PIECE", size)
        monkeypatch.setattr("engine.text.tokenizer.PIECE", size)
        for _ in range(12):
            text = words_of(rng, rng.randrange(300, 2000))
            for special in (False, True):
                whole = tokenizer._encode_whole(text, add_special_tokens=special)
                assert tokenizer.encode(text, add_special_tokens=special) == whole


def test_runs_longer_than_what_is_tried_are_not_cut_behind() -> None:
    """Pairs are joined from a run's beginning: how it ends depends on its length."""
    merges = [("_", "_"), ("__", "__"), ("_", "Ċ")]
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = tokenizers.Tokenizer(models.BPE({word: number for number, word in enumerate(letters)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(backend)
    text = ("_" * 601 + "\n") * 400
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer._encode_whole(text, add_special_tokens=False)


def test_special_tokens_stand_around_a_text_that_begins_with_nothing() -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "fox"])}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    found = Tokenizer(backend).encode(" " * 2000 + "fox " * 40_000)
    assert found[:2] == [1, 3] and found[-2:] == [3, 2] and len(found) == 40_002


@pytest.mark.parametrize("kind", ["demo", "gpt2", "words with what is before them"])
def test_no_text_that_is_tokenised_is_long(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, sizes = KINDS[kind](), []
    real = tokenizer._encode_whole

    def watched(text: str, *, add_special_tokens: bool) -> list[int]:
        sizes.append(len(text))
        return real(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "_encode_whole", watched)
    text = "Once upon a time there was a fox, and a hen. " * 12_000
    for special in (False, True):
        tokenizer.encode(text, add_special_tokens=special)
    assert max(sizes) <= 2 * long_texts.PIECE
    # Beside the pieces little is read twice.
    assert sum(sizes) <= 2 * 1.1 * len(text)


def test_a_text_without_words_stays_whole() -> None:
    text = "a" * (5 * long_texts.PIECE)
    assert list(cut_text(text, lambda part: [len(part)])) == [text]


def test_where_every_cut_changes_ids_few_are_tried() -> None:
    tried: list[str] = []

    def counts(text: str) -> list[int]:
        tried.append(text)
        return [len(tried)]

    text = "a word " * long_texts.PIECE
    assert list(cut_text(text, counts)) == [text]
    assert len(tried) < 30


def test_many_ids_become_an_array_and_few_stay() -> None:
    few, many = [5, 6], [index % 70_000 for index in range(3 * long_texts.MIN_PACKED + 5)]
    assert packed(few) is few
    assert copied(many).tolist() == many
    expected = list(many)
    found = packed(many)
    assert isinstance(found, array)
    assert found.itemsize == 4
    assert found.tolist() == expected
    # The objects went where they were made, and not wherever the list is let go.
    assert many == []


def test_a_long_prompt_is_packed_by_a_thread_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(DEMO_MODEL)
    threads: list[str] = []

    def watched(ids: list[int]) -> Any:
        threads.append(threading.current_thread().name)
        return packed(ids)

    monkeypatch.setattr("engine.text.tokenizer.packed", watched)
    text = "Once upon a time there was a fox. " * 4000
    found = asyncio.run(tokenizer.prompt_ids(text))
    tokenizer.close()
    assert isinstance(found, array)
    assert found.tolist() == tokenizer.encode(text)
    assert [name.rpartition("_")[0] for name in threads] == ["tokenizer"]
