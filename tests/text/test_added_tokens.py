"""Which tokens are added and special, by every file that may say so: against transformers, text for text."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.config import StartupError
from engine.text.tokenizer import Tokenizer

# <a>, <s>, <e> have the ids 257 to 259; `plain` (256) is an ordinary word, <n> and <m> are in no file.
SIZE = 260
TEXTS = ("x <a> y", "x <s> y", "<e>plain", "a<n>b", "q <m> r", "<a><n> <a>", "plain  <e> ")


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content, "special": False, "lstrip": False, "rstrip": False, "normalized": False,
        "single_word": False, **flags,
    }  # fmt: skip


A, S, E = token("<a>", normalized=True), token("<s>", special=True), token("<e>")
WIDE = {"special": True, "lstrip": True, "rstrip": True}
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
Files = dict[str, dict[str, Any]]

CASES: dict[str, tuple[dict[str, Any], Files]] = {
    "nothing": ({}, {}),
    "special": ({"added_tokens_decoder": {"257": token("<a>", special=True), "258": S, "259": E}}, {}),
    "strips": ({"added_tokens_decoder": {"257": token("<a>", **WIDE), "258": S, "259": E}}, {}),
    "strips-left": ({"added_tokens_decoder": {"257": token("<a>", lstrip=True), "258": S, "259": E}}, {}),
    "single-word": ({"added_tokens_decoder": {"257": token("<a>", single_word=True)}}, {}),
    "no-longer-special": ({"added_tokens_decoder": {"258": token("<s>")}}, {}),
    "some": ({"added_tokens_decoder": {"257": token("<a>", special=True)}}, {}),
    "another-id": ({"added_tokens_decoder": {"3": token("<a>", special=True)}}, {}),
    "only-there": ({"added_tokens_decoder": {"260": token("<n>", special=True), "261": token("<m>", lstrip=True)}}, {}),
    "only-there-far": ({"added_tokens_decoder": {"300": token("<n>", special=True)}}, {}),
    "word": ({"added_tokens_decoder": {"256": token("plain", special=True)}}, {}),
    "word-strips": ({"added_tokens_decoder": {"256": token("plain", rstrip=True)}}, {}),
    "no-flags": ({"added_tokens_decoder": {"257": {"content": "<a>"}}}, {}),
    "named": ({"eos_token": "<e>"}, {}),
    "named-object": ({"eos_token": token("<e>", lstrip=True, special=True) | {"__type": "AddedToken"}}, {}),
    "named-declared": ({"eos_token": "<e>", "added_tokens_decoder": {"259": E}}, {}),
    "named-declared-strips": ({"eos_token": "<e>", "added_tokens_decoder": {"259": token("<e>", rstrip=True)}}, {}),
    "named-word": ({"eos_token": "plain"}, {}),
    "named-unknown": ({"pad_token": "<n>"}, {}),
    "named-only-declared": ({"pad_token": "<n>", "added_tokens_decoder": {"260": token("<n>")}}, {}),
    "map": ({}, {MAP: {"eos_token": token("<e>", lstrip=True)}}),
    "map-word": ({}, {MAP: {"eos_token": token("plain", lstrip=True)}}),
    "map-text": ({}, {MAP: {"eos_token": "plain", "additional_special_tokens": ["<a>", "<n>"]}}),
    "map-not-read": ({"added_tokens_decoder": {}}, {MAP: {"eos_token": token("plain", lstrip=True)}}),
    "added": ({}, {ADDED: {"<n>": 260, "<m>": 261, "<a>": 257}}),
    "added-far": ({}, {ADDED: {"<m>": 270, "<n>": 260}}),
    "added-named": ({"pad_token": "<n>"}, {ADDED: {"<n>": 260, "<m>": 261}}),
    "added-map": ({}, {ADDED: {"<n>": 260}, MAP: {"pad_token": "<n>"}}),
    "added-not-read": ({"added_tokens_decoder": {}}, {ADDED: {"<n>": 260}}),
    "additional": ({"additional_special_tokens": ["<a>", "<n>"]}, {}),
    "additional-word": ({"additional_special_tokens": ["plain"]}, {}),
    "extra": ({"extra_special_tokens": ["<a>", "<n>"]}, {}),
    "extra-named": ({"extra_special_tokens": {"foo_token": "<a>", "bar": "<n>"}}, {}),
    "own-name": ({"image_token": "<n>"}, {}),
    "own-name-known": ({"image_token": "<a>"}, {}),
}


def write(directory: Path, config: dict[str, Any], files: Files) -> Path:
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary | {"plain": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(**A), AddedToken(**S), AddedToken(**E)])
    backend.save(str(directory / "tokenizer.json"))
    for name, values in ({"tokenizer_config.json": config} | files).items():
        (directory / name).write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    config, files = CASES[name]
    write(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"} | config, files)
    ours = Tokenizer.load(tmp_path, rows=512)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_name_of_no_token_needs_a_row(tmp_path: Path) -> None:
    """transformers adds it, and the first text that holds it fails; here it is ordinary text."""
    write(tmp_path, {"pad_token": "<n>"}, {})
    for rows in (0, SIZE):
        assert Tokenizer.load(tmp_path, rows).vocab_size == SIZE
    tokenizer = Tokenizer.load(tmp_path, SIZE + 1)
    assert tokenizer.encode("<n>") == [SIZE] and tokenizer.pad_token_id == SIZE


def test_an_id_that_the_library_does_not_give_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"added_tokens_decoder": {"300": token("<n>")}}, {})
    assert Tokenizer.load(tmp_path).encode("<n>") == [SIZE]
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: token '<n>' gets the id 260, not 300"]


def test_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path, {}, {})
    (tmp_path / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{\r\n"eos_token": "<e>"}\r\n')
    assert Tokenizer.load(tmp_path).eos_token_ids == (259,)


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"added_tokens_decoder": {"257": {"content": 3}}}, {}, "added_tokens_decoder: content must be text, got 3"),
        ({"added_tokens_decoder": {"257": token("<a>") | {"lstrip": "yes"}}}, {}, "tokenizer_config.json: token '<a>'"),
        ({}, {ADDED: {"<n>": "x"}}, "added_tokens.json: '<n>' must have a token id, not 'x'"),
        ({}, {MAP: {"additional_special_tokens": 3}}, "special_tokens_map.json: additional_special_tokens must be"),
    ],
)
def test_bad_files(config: dict[str, Any], files: Files, words: str, tmp_path: Path) -> None:
    write(tmp_path, config, files)
    with pytest.raises(StartupError) as caught:
        Tokenizer.load(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_a_vocabulary_of_another_kind_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(StartupError, match=rf"no tokenizer\.json .*; {name} is there"):
        Tokenizer.load(tmp_path)
