"""Tokenizer against transformers' AutoTokenizer and against the library's own decoding."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing

from engine.config import StartupError
from engine.request import QueueFullError, RequestError
from engine.text import tokenizer as module
from engine.text.pieces import byte_level_bytes, compile_rule
from engine.text.tokenizer import Tokenizer
from tests.text import kinds

TEXTS = [
    "",
    " ",
    "Hello world!",
    "  two  spaces\n\n",
    "<s>Hello</s>",
    "你好 😀 café",
    "a<|im_end|>b <tool_call>x",
    "\t",
]


@pytest.mark.parametrize("kind", kinds.MAKERS)
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = kinds.write(kind, tmp_path)
    ours = Tokenizer.load(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.special_ids >= {theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id}
    assert ours.special_ids == set(theirs.all_special_ids)
    assert ours.named_tokens == theirs.special_tokens_map
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram"])
def test_bos_is_the_post_processors_to_say(kind: str, add_bos: bool | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = {name: value for name, value in kinds.CONFIG.items() if name != "add_bos_token"}
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    directory = kinds.write(kind, tmp_path, config)
    assert Tokenizer.load(directory).encode("Hello") == AutoTokenizer.from_pretrained(directory).encode("Hello")


def test_a_named_token_that_is_an_ordinary_word_becomes_special(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    config = {**kinds.CONFIG, "eos_token": "the", "pad_token": "[never in the vocabulary]"}
    directory = kinds.write("no_decoder", tmp_path, config)
    ours, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    ids = ours.encode("the cat sat on the mat")
    assert ids == theirs.encode("the cat sat on the mat")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "cat sat on mat"
    assert ours.pad_token_id is None
    assert ours.vocab_size == 1 + max(ours._backend.get_vocab().values())


def test_older_directories(tmp_path: Path) -> None:
    directory = kinds.write("byte_level", tmp_path, {})
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.named_tokens == {"eos_token": "<|im_end|>"}
    assert tokenizer.eos_token_ids == (tokenizer.token_to_id("<|im_end|>"),)
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").unlink()
    assert Tokenizer.load(directory).eos_token_ids == ()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no tokenizer.json"]),
        ({"tokenizer.json": "{"}, ["tokenizer.json"]),
        ({"tokenizer.json": "{}"}, ["tokenizer.json", "Model missing"]),
        ({"tokenizer_config.json": "{"}, ["tokenizer_config.json", "JSON"]),
        ({"tokenizer_config.json": "[]"}, ["tokenizer_config.json", "object", "list"]),
        ({"tokenizer_config.json": '{"eos_token": 7}'}, ["tokenizer_config.json", "eos_token", "7"]),
        ({"tokenizer_config.json": '{"eos_token": "<gone>"}'}, ["tokenizer_config.json", "eos_token", "<gone>"]),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"x": {}}}'}, ["added_tokens_decoder"]),
        ({"tokenizer_config.json": '{"added_tokens_decoder": []}'}, ["added_tokens_decoder"]),
        ({"special_tokens_map.json": "nope"}, ["special_tokens_map.json"]),
    ],
)
def test_bad_files_are_one_readable_line(files: dict[str, str], words: list[str], tmp_path: Path) -> None:
    if files:
        kinds.write("byte_level", tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StartupError) as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_panic_of_the_library_is_one_readable_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises what is no Exception; planted here, for what is known to make it panic is refused before."""
    kinds.write("byte_level", tmp_path)

    class Panic(BaseException):
        pass

    def panic(path: str) -> None:
        raise Panic("range end index 7\nout of range")

    monkeypatch.setattr(module.tokenizers.Tokenizer, "from_file", panic)
    with pytest.raises(StartupError, match=r"tokenizer\.json: range end index 7 out of range$"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("merge", ["a ##b", ["a", "##b"]])
def test_merges_that_continue_with_the_prefix(merge: Any, tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": [merge], "continuing_subword_prefix": "##"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert Tokenizer.load(tmp_path).encode("ab") == [2]


def test_lone_surrogate_is_a_400() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        kinds.load("byte_level").encode("a\ud800b")


async def test_encode_async_gives_the_same_ids_and_keeps_the_loop_free() -> None:
    tokenizer = kinds.load("byte_level")
    text = " ".join(kinds.CORPUS) * 8
    assert len(text) > module.INLINE_CHARACTERS
    short, long = await asyncio.gather(
        tokenizer.encode_async("Hello"), tokenizer.encode_async(text, add_special_tokens=False)
    )
    assert short == tokenizer.encode("Hello")
    assert long == tokenizer.encode(text, add_special_tokens=False)
    with pytest.raises(RequestError, match="surrogate"):
        await tokenizer.encode_async(text + "\ud800")
    assert tokenizer._waiting == 0


async def test_waiting_encodes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = kinds.load("byte_level")
    monkeypatch.setattr(module, "MAX_WAITING_ENCODES", 2)
    text = "word " * 4000
    results = await asyncio.gather(*(tokenizer.encode_async(text) for _ in range(5)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFullError)]
    assert len(refused) == 3
    assert refused[0].status == 429
    assert tokenizer._waiting == 0


def test_close_stops_the_pool() -> None:
    tokenizer = Tokenizer(kinds.oracle("byte_level"))
    assert tokenizer.pool.submit(tokenizer.encode, "a").result() == tokenizer.encode("a")
    tokenizer.close()
    with pytest.raises(RuntimeError):
        tokenizer.pool.submit(tokenizer.encode, "a")


def _runs_are_whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> bool:
    """Every run of byte-fallback tokens is UTF-8: only then does the library keep its characters."""
    run = b""
    for token_id in [*ids, -1]:
        if skip and token_id in tokenizer.special_ids:
            continue
        token = tokenizer.id_to_token(token_id) or ""
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run = b""
    return True


@pytest.mark.parametrize("kind", kinds.MAKERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_decode_equals_the_library_on_random_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = kinds.load(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=24))
    for skip in (True, False):
        ours = tokenizer.decode(ids, skip_special_tokens=skip)
        if kind.startswith("byte_fallback") and not _runs_are_whole(tokenizer, ids, skip):
            assert "�" in ours
            continue
        assert ours == kinds.oracle(kind).decode(ids, skip_special_tokens=skip)


def test_whole_characters_of_a_broken_byte_run_are_kept() -> None:
    tokenizer = kinds.load("byte_fallback")
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode() + "é".encode()[:1]]
    assert tokenizer.decode([id for id in ids if id is not None]) == "😀�"


@pytest.mark.parametrize("kind", kinds.WITH_TABLE)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_token_bytes_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = kinds.load(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if kind == "unigram":
        text = tokenizer.decode(ids, skip_special_tokens=False)  # NFKC and <unk> do not come back
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined.removeprefix(" ") == text.removeprefix(" ")


def test_token_bytes_of_unknown_ids() -> None:
    for kind in kinds.MAKERS:
        tokenizer = kinds.load(kind)
        assert tokenizer.token_bytes(10**9) == b""
        assert tokenizer.id_to_token(10**9) is None
        assert tokenizer.id_to_token(-1) is None
        assert tokenizer.decode([10**9]) == ""
        assert tokenizer.token_bytes(1) == b"<s>"
    assert 10**9 not in kinds.load("byte_level").pieces(False)


def test_spaces_between_special_tokens() -> None:
    tokenizer = kinds.load("no_decoder")
    ids = tokenizer.encode("</s></s>cat sat</s>", add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    close = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert whole == "</s> </s> cat sat </s>"
    assert close == "</s></s>cat sat</s>"
    assert tokenizer.decode([*ids, ids[2]], skip_special_tokens=False, spaces_between_special_tokens=False).endswith(
        "cat"
    )


def test_byte_level_alphabet_is_the_librarys() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_level_bytes(letter) for letter in ByteLevel.alphabet()) == [bytes([i]) for i in range(256)]
    assert byte_level_bytes("a b") == b"a b"  # a space is no letter of the alphabet: the token is literal
    assert byte_level_bytes("｜") == "｜".encode()


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""},
        {"type": "Replace", "pattern": {"String": "ab"}, "content": ""},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
            ],
        },
    ],
)
def test_decoders_without_a_table(decoder: dict[str, Any] | None) -> None:
    assert compile_rule(decoder) is None


def test_a_rule_that_disagrees_with_the_library_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compile_rule", lambda _: compile_rule({"type": "Sequence", "decoders": []}))
    tokenizer = Tokenizer(kinds.oracle("byte_level"))
    assert tokenizer.rule is None
    assert tokenizer.decode(tokenizer.encode("你好 Hello")) == "你好 Hello"


def test_strip_of_single_tokens() -> None:
    rule = compile_rule({"type": "Strip", "content": "a", "start": 1, "stop": 2})
    assert rule is not None
    assert [rule.inner(text) for text in ("aabaaa", "a", "aa", "b", "")] == [b"aba", b"", b"", b"b", b""]


def test_a_pair_is_cut_as_the_library_cuts_it() -> None:
    backend = tokenizers.Tokenizer(WordLevel({"a": 0, "[CLS]": 1, "[SEP]": 2, "b": 3}))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    ours = object.__new__(Tokenizer)
    ours._backend = backend
    for first, second, most in ((3, 9, 8), (9, 3, 8), (6, 6, 9), (5, 5, 4), (1, 1, 100), (3000, 3000, 64)):
        ids, at = ours.encode_pair("a " * first, "b " * second, most)
        if first + second + 3 > most and most < 64:
            backend.enable_truncation(most, strategy="longest_first")
        theirs = backend.encode("a " * first, "b " * second) if most != 64 else None
        backend.no_truncation()
        if theirs is not None:
            assert (ids, at) == (theirs.ids, theirs.type_ids.index(1))
        else:
            assert len(ids) == 64 and ids.count(0) in (30, 31)
