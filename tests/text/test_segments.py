"""Segments: the ids of a text in pieces are those of the whole, and what is kept is not tokenised again."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import AddedToken

from engine.text import segments as module
from engine.text.segments import Segments, cut_tokens
from engine.text.tokenizer import INLINE_CHARACTERS
from tests.text import kinds

WORDS = [
    "the cat",
    " sat",
    "\n",
    "<|im_end|>",
    "</s>",
    "<s>",
    "<|im_",
    "end|>",
    " ",
    "  ",
    "中文",
    "😀",
    "a",
    "<unk>",
    "x" * 40,
]


@pytest.mark.parametrize("kind", kinds.MAKERS)
def test_pieces_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random texts of a growing conversation, so that their beginnings and their middles are known already."""
    monkeypatch.setattr(module, "MIN_SEGMENT", 8)
    tokenizer, rng = kinds.load(kind), random.Random(7)
    backend = tokenizers.Tokenizer.from_str(kinds.backend(kind))
    made = Segments(cut_tokens(backend.get_added_tokens_decoder()), tokenizer._encode_bare)
    assert made._pattern is not None
    text = ""
    for _ in range(150):
        text = rng.choice([text, text, "", text[rng.randrange(len(text) + 1) :]])
        text += "".join(rng.choices(WORDS, k=rng.randrange(1, 9)))
        text = text[-600:]
        assert made.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
    assert made._kept


def test_a_growing_conversation_is_not_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = kinds.load("byte_level")
    encoded: list[str] = []
    real = tokenizer._encode_bare

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return real(text)

    monkeypatch.setattr(tokenizer, "_segments", Segments(tokenizer._cuts, encode))
    turns = [f"<|im_end|>turn {index} " + f"the cat sat {index} " * 60 for index in range(4)]
    text = "system " * 100
    assert len(text + turns[0]) > INLINE_CHARACTERS
    for turn in turns:
        text += turn
        assert tokenizer.encode(text, add_special_tokens=False) == real(text)
    assert "".join(encoded) == text, "every part once"


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 10_000)
    made = Segments({"<c>": 1}, lambda text: [1 if text.startswith("<c>") else 0])
    for index in range(40):
        made.encode(f"<c>{index:0>400}")
    assert 10 <= len(made._kept) <= 25 and made._size <= 10_000
    assert made._size == sum(len(key[1]) + len(ids) for key, ids in made._kept.items())


@pytest.mark.parametrize(
    ("others", "why"),
    [
        (["<end>>"], "a longer token begins with it"),
        (["x<end>"], "another holds it"),
        (["abc<"], "another ends with its beginning"),
        ([AddedToken("<end>", special=True, normalized=False, rstrip=True)], "it takes spaces with it"),
        ([AddedToken("<end>", special=True, normalized=True)], "it is looked for after normalisation"),
        ([AddedToken("<end>", special=True, normalized=False, single_word=True)], "it looks at its neighbours"),
    ],
)
def test_tokens_that_are_not_cut_at(others: list[str | AddedToken], why: str) -> None:
    plain = [AddedToken("<end>", special=True, normalized=False), AddedToken("[sep]", special=True, normalized=False)]
    assert cut_tokens(dict(enumerate(plain))) == {"<end>": 0, "[sep]": 1}
    more = [AddedToken(one, special=True, normalized=False) if isinstance(one, str) else one for one in others]
    if any(one.content == "<end>" for one in more):
        plain = plain[1:]
    assert list(cut_tokens(dict(enumerate([*plain, *more]))))[0:1] == ["[sep]"], why
    assert "<end>" not in cut_tokens(dict(enumerate([*plain, *more]))), why


def test_a_token_that_begins_as_a_word_does_is_not_cut_at_behind_one_that_wants_a_words_end() -> None:
    backend = tokenizers.Tokenizer.from_str(kinds.backend("byte_level"))
    backend.add_special_tokens(
        [
            AddedToken("END", special=True, normalized=False),
            AddedToken("[sep]", special=True, normalized=False),
            AddedToken("foo", special=True, normalized=False, single_word=True),
        ]
    )
    long = "the cat " * 60
    made = Segments(
        cut_tokens(backend.get_added_tokens_decoder()), lambda text: backend.encode(text, add_special_tokens=False).ids
    )
    for text in (f"END{long}", f"{long} fooEND{long}", f"{long} foo[sep]{long}", f"[sep]{long} foo"):
        assert made.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("seed", range(4))
def test_what_is_cut_at_is_what_no_other_token_takes_away(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        texts = {"".join(draw.choices("ab<|", k=draw.randint(2, 6))) for _ in range(draw.randint(1, 8))}
        alone = {
            text
            for text in texts
            if not any(text in other for other in texts - {text})
            and not any(other.endswith(text[:size]) for other in texts for size in range(1, min(len(text), len(other))))
        }
        tokens = [AddedToken(text, special=True, normalized=False) for text in sorted(texts)]
        assert set(cut_tokens(dict(enumerate(tokens)))) == alone


def test_thousands_of_reserved_tokens_are_cut_at() -> None:
    """Each against each took minutes of a start."""
    tokens = [AddedToken(f"<|reserved_{index}|>", special=True, normalized=False) for index in range(20_000)]
    assert len(cut_tokens(dict(enumerate(tokens)))) == len(tokens)
