"""Tokenizers from the metadata of a GGUF file, against the library's and against SentencePiece's rule."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from engine.config import StartupError
from engine.text import gguf
from engine.text.gguf import load_chat_template, load_tokenizer
from tests.text import kinds

TEXTS = [
    *dict.fromkeys(kinds.CORPUS),
    "",
    " ",
    "  two  spaces  ",
    "a\n\n\nb\t c\r\n",
    "<s>begins</s> and <|im_end|>ends",
    "don't DON'T 12345 1.5e-7 x² ½",
    "नमस्ते مرحبا 안녕하세요 ünïcödé ÅÅ",
]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


class Metadata:
    """As a file would give it."""

    path = Path("a.gguf")

    def __init__(self, **values: Any) -> None:
        self.values = {f"tokenizer.{name.replace('__', '.')}": value for name, value in values.items()}

    def fail(self, name: str, problem: str) -> NoReturn:
        raise StartupError(f"{self.path}: {name} {problem}")

    def get(self, name: str) -> Any:
        value = self.values.get(name)
        return value.tolist() if isinstance(value, np.ndarray) else value

    text = words = get

    def array(self, name: str) -> Any:
        value = self.values.get(name)
        return None if value is None else np.array(value)


def metadata_of(backend: tokenizers.Tokenizer, kind: str, **values: Any) -> Metadata:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    types = [
        (CONTROL if added[token].special else USER) if token in added else BYTE if token.startswith("<0x") else NORMAL
        for token in tokens
    ]
    named = {
        f"ggml__{name}_token_id": vocabulary[token]
        for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unknown", "<unk>"))
    }
    return Metadata(ggml__model=kind, ggml__tokens=tokens, ggml__token_type=np.array(types), **named, **values)


def test_byte_level() -> None:
    oracle = kinds.oracle("byte_level")
    merges = [" ".join(pair) for pair in json.loads(oracle.to_str())["model"]["merges"]]
    given = metadata_of(oracle, "gpt2", ggml__pre="gpt-2", ggml__merges=merges)
    tokenizer = load_tokenizer(given)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids, skip_special_tokens=False)
    assert tokenizer.rule is not None and tokenizer.eos_token_ids == (2,) and tokenizer.bos_token_id == 1
    assert tokenizer.special_ids == kinds.load("byte_level").special_ids
    given.values |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    framed = load_tokenizer(given)
    assert framed.encode("The cat") == [1, *tokenizer.encode("The cat"), 2]
    assert framed.encode("The cat", add_special_tokens=False) == tokenizer.encode("The cat")


def by_scores(text: str, scores: dict[str, float], space: bool) -> list[str]:
    """SentencePiece's BPE as its paper has it: the best union of two neighbours, the leftmost of equals, until none."""
    parts = list((("\u2581" if space and text else "") + text).replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[left + right], at) for at, (left, right) in enumerate(itertools.pairwise(parts))
                 if left + right in scores]  # fmt: skip
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()]
    return found


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece(space: bool) -> None:
    oracle = kinds.oracle("byte_fallback")
    merges = json.loads(oracle.to_str())["model"]["merges"]
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    given = metadata_of(oracle, "llama", ggml__add_space_prefix=space, ggml__add_bos_token=False)
    tokens = given.values["tokenizer.ggml.tokens"]
    scores = [-float(ranks.get(token, 1000 + index)) for index, token in enumerate(tokens)]
    given.values["tokenizer.ggml.scores"] = np.array(scores, dtype=np.float32)
    tokenizer = load_tokenizer(given)
    types = given.values["tokenizer.ggml.token_type"]
    plain = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    for text in TEXTS:
        if "<" in text:
            continue
        ids = tokenizer.encode(text)
        assert [tokens[token_id] for token_id in ids] == by_scores(text, plain, space)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<s>x")[0] == 1
    # Begins with BOS where nothing is said.
    del given.values["tokenizer.ggml.add_bos_token"]
    assert load_tokenizer(given).encode("x")[0] == 1


def test_unigram() -> None:
    oracle = kinds.oracle("unigram")
    model = json.loads(oracle.to_str())["model"]
    given = metadata_of(oracle, "t5", ggml__scores=np.array([score for _, score in model["vocab"]]))
    tokenizer = load_tokenizer(given)
    for text in TEXTS:
        # Their normalizer is a table of the file's, and this one has none.
        if text.isascii() and "<" not in text:
            assert tokenizer.encode(text) == oracle.encode(text).ids


def test_word_piece() -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2581the", "\u2581cat", "s", "\u2581run", "ning", "\u2581!"]
    types = np.array([CONTROL] * 4 + [NORMAL] * 6)
    tokenizer = load_tokenizer(
        Metadata(ggml__model="bert", ggml__tokens=pieces, ggml__token_type=types, ggml__unknown_token_id=1,
                 ggml__cls_token_id=2, ggml__seperator_token_id=3, ggml__bos_token_id=2)
    )  # fmt: skip
    assert tokenizer.encode("The CATS running!") == [2, 4, 5, 6, 7, 8, 9, 3]
    assert tokenizer.encode("dog") == [2, 1, 3]


SPLIT = "I'll be 12345 years,\n\n  naïve_Café's  x=1;"


def pieces_of(pre: str, text: str) -> list[str]:
    splits = [pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in gguf._SPLITS[pre]]
    return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", gguf._SPLITS)
def test_patterns_keep_all(pre: str) -> None:
    for text in TEXTS:
        assert "".join(pieces_of(pre, text)) == text


# Pieces of SPLIT, with a bar between them.
EXPECTED = {
    "gpt-2": "I|'ll| be| 12345| years|,|\n\n | naïve|_|Café|'s| | x|=|1|;",
    "smollm": "I|'ll| be| |1|2|3|4|5| years|,|\n\n | naïve|_|Café|'s| | x|=|1|;",
    "llama-bpe": "I|'ll| be| |123|45| years|,\n\n| | naïve|_Café|'s| | x|=|1|;",
    "qwen2": "I|'ll| be| |1|2|3|4|5| years|,\n\n| | naïve|_Café|'s| | x|=|1|;",
    "gpt-4o": "I'll| be| |123|45| years|,\n\n| | naïve|_Café's| | x|=|1|;",
    "tekken": "I|'ll| be| |1|2|3|4|5| years|,\n\n| | naïve|_Café|'s| | x|=|1|;",
    "deepseek-v3": "I|'ll| be| |123|45| years|,\n\n| | naïve|_Caf|é|'s| | x|=|1|;",
}


@pytest.mark.parametrize("pre", EXPECTED)
def test_patterns(pre: str) -> None:
    assert "|".join(pieces_of(pre, SPLIT)) == EXPECTED[pre]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"ggml__model": None}, "tokenizer.ggml.model is missing"),
    "model": ({"ggml__model": "rwkv"}, "'rwkv' is not supported"),
    "pre": ({"ggml__pre": "made-up"}, "'made-up' is not supported"),
    "no pre": ({"ggml__pre": None}, "tokenizer.ggml.pre is missing or default"),
    "no tokens": ({"ggml__tokens": []}, "the file has no vocabulary"),
    "types": ({"ggml__token_type": [1, 1]}, "has 2 entries for 4 tokens"),
    "merge": ({"ggml__merges": ["ab"]}, "must hold two tokens"),
    "merge of nothing": ({"ggml__merges": ["a x"]}, "'x' is no token"),
    "no merges": ({"ggml__merges": None}, "merges is missing"),
    "id": ({"ggml__eos_token_id": 4}, "must be the id of one of 4 tokens"),
    "flag": ({"ggml__add_bos_token": "yes"}, "must be true or false"),
    "scores": ({"ggml__model": "llama", "ggml__scores": [1.0]}, "has 1 entries for 4"),
    "score": ({"ggml__model": "llama", "ggml__scores": [0, 0, 0, float("nan")]}, "finite"),
    "no scores": ({"ggml__model": "t5"}, "scores is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_does_not_fit(name: str) -> None:
    changes, expected = WRONG[name]
    usual: dict[str, Any] = {
        "ggml__model": "gpt2",
        "ggml__pre": "gpt-2",
        "ggml__tokens": ["a", "b", "ab", "<s>"],
        "ggml__token_type": [1, 1, 1, 3],
        "ggml__merges": ["a b"],
    }
    load_tokenizer(Metadata(**usual))
    with pytest.raises(StartupError) as caught:
        load_tokenizer(Metadata(**usual | changes))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_chat_templates() -> None:
    assert load_chat_template(Metadata(), {}) is None
    given = Metadata(chat_template="{{ bos_token }}{{ messages[0].content }}")
    template = load_chat_template(given, {"bos_token": "<s>"})
    assert template is not None and template.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    given.values |= {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools: {{ tools|length }}",
    }
    template = load_chat_template(given, {"bos_token": "<s>"})
    assert template is not None
    assert (
        template.render([{"role": "user", "content": "hi"}], tools=[{"type": "function", "function": {"name": "f"}}])
        == "tools: 1"
    )
    with pytest.raises(StartupError, match=r"tokenizer.chat_template"):
        load_chat_template(Metadata(chat_template="{% if %}"), {})
