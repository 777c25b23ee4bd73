"""Tokenizer: text to ids and back, over the model directory's tokenizer.json.

Made once by serve.py. `encode` and `decode` are pure and safe on any thread; `encode_async` is called on the loop
thread and sends long prompts to a small pool (the `tokenizers` library works without the GIL).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import tokenizers

from engine.config import StartupError
from engine.recorder import stretch
from engine.request import QueueFullError, RequestError
from engine.text.added_tokens import named_tokens, read_json, settle_added_tokens
from engine.text.long_texts import PIECE, cut_text, packed
from engine.text.pieces import Opening, PieceRule, Pieces, Texts, compile_rule
from engine.text.segments import Segments, cut_tokens

R = TypeVar("R")

# Encoding costs about 0.35 us a character, and a hop to the pool and back about 0.1 ms of the loop's time: below
# this a prompt delays the loop by less than one small step, above it the hop is the cheaper half.
INLINE_CHARACTERS = 1024
# Long prompts that may wait for the pool at once; beyond it a 429, as the scheduler's own queue does.
MAX_WAITING_ENCODES = 4096
POOL_THREADS = max(1, min(4, (os.cpu_count() or 2) // 2))

# What holds a vocabulary where there is no tokenizer.json.
OLDER_FILES = ("tokenizer.model", "tekken.json", "tiktoken.model", "spiece.model", "vocab.json", "vocab.txt")
_NOTHING: frozenset[int] = frozenset()


def check_merges(path: Path) -> None:
    """The library cuts continuing_subword_prefix off the right half of every merge without a look, and where that is
    not there, it may end the process. StartupError instead."""
    # Few files have the field, and parsing one takes longer than the library does.
    if not re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', path.read_bytes()):
        return
    model = read_json(path).get("model")
    if not isinstance(model, dict) or not isinstance(prefix := model.get("continuing_subword_prefix"), str):
        return
    for merge in merges if isinstance(merges := model.get("merges"), list) else ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and len(pair) == 2 and not str(pair[1]).startswith(prefix):
            raise StartupError(
                f"{path}: model.continuing_subword_prefix is {prefix!r}, but the merge {pair} does not continue with it"
            )


class Tokenizer:
    """The words of one model.

    vocab_size: number of ids the tokenizer knows (the model's embedding may be padded beyond it).
    eos_token_ids: from tokenizer_config.json alone; generation_config.json may name more.
    special_ids: ids that decode to nothing when special tokens are skipped.
    named_tokens: eos_token, bos_token, ... as text, for chat templates.
    """

    def __init__(self, backend: tokenizers.Tokenizer, named: dict[str, str] | None = None) -> None:
        self.named_tokens = dict(named or {})
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        # A decoder never sees an id above the largest, which added tokens may leave beyond the count.
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        promoted = {vocabulary[text] for text in self.named_tokens.values() if text in vocabulary}
        self.special_ids = frozenset(id for id, token in added.items() if token.special) | (promoted & set(added))
        self.bos_token_id = vocabulary.get(self.named_tokens.get("bos_token", ""))
        self.pad_token_id = vocabulary.get(self.named_tokens.get("pad_token", ""))
        eos = vocabulary.get(self.named_tokens.get("eos_token", ""))
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)

        self.rule: PieceRule | None = self._find_rule(vocabulary)
        self._pieces = Pieces(self._piece)
        self._pieces_without_special = Pieces(self._piece_without_special)
        self._texts = Texts(self._pieces)
        self._texts_without_special = Texts(self._pieces_without_special)
        # Tables that show some special tokens, by which: one or two sets for a model.
        self._showing: dict[frozenset[int], tuple[Pieces, Texts]] = {}
        self._waiting = 0
        self._cuts = cut_tokens(added)
        self._segments = Segments(self._cuts, self._encode_bare)

    @classmethod
    def load(cls, directory: Path, rows: int = 0) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and, for older models, special_tokens_map.json.

        rows: of the model's embedding; a named token that is in no file gets an id only below it.

        Whether BOS is prepended is tokenizer.json's post-processor to say; `add_bos_token` beside it has no effect,
        as in transformers 5. Raises StartupError naming the file and the field.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            older = [name for name in OLDER_FILES if (directory / name).is_file()]
            hint = f"; {older[0]} is there, from which transformers' save_pretrained makes one" if older else ""
            raise StartupError(f"{directory}: no tokenizer.json (only `tokenizers` files are read){hint}")
        try:
            check_merges(path)
            backend = tokenizers.Tokenizer.from_file(str(path))
        except (StartupError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and a panic of its is none at all
            raise StartupError(f"{path}: {' '.join(str(error).split())}") from None
        named = named_tokens(directory)
        special_ids = settle_added_tokens(backend, directory, rows)
        tokenizer = cls(backend, named)
        tokenizer.special_ids |= special_ids
        eos = named.get("eos_token")
        if eos and not tokenizer.eos_token_ids:
            config_path = directory / "tokenizer_config.json"
            raise StartupError(f"{config_path}: eos_token {eos!r} is not in the vocabulary of tokenizer.json")
        return tokenizer

    # Text to ids.

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Raises RequestError for text that has no UTF-8 (a lone surrogate)."""
        if not add_special_tokens and len(text) > INLINE_CHARACTERS:
            return self._segments.encode(text)
        return self._encode_special(text) if add_special_tokens else self._encode_bare(text)

    def _encode_bare(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in cut_text(text, self._encode_piece):
            ids += self._encode_piece(piece)
        return ids

    def _encode_piece(self, text: str) -> list[int]:
        return self._encode_whole(text, add_special_tokens=False)

    def _encode_special(self, text: str) -> list[int]:
        """With special tokens before and behind it, which are found by those of its beginning."""
        if len(text) > 2 * PIECE:
            head = text[:INLINE_CHARACTERS]
            framed, bare = self._encode_whole(head, add_special_tokens=True), self._encode_piece(head)
            # A beginning that leaves no ids behind says nothing.
            for before in range(len(framed) - len(bare) + 1 if bare else 0):
                if framed[before : before + len(bare)] == bare:
                    return framed[:before] + self.encode(text, add_special_tokens=False) + framed[before + len(bare) :]
        return self._encode_whole(text, add_special_tokens=True)

    def _encode_whole(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # encode_batch_fast skips the character offsets: a quarter less time than encode.
            with stretch("text", "tokenise", len(text)):
                [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise RequestError("The prompt is not valid Unicode: it holds a lone surrogate.") from None
        ids: list[int] = encoding.ids
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`encode` that never holds the loop for long. Raises QueueFullError when too many texts wait."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await self._in_pool(lambda: self.encode(text, add_special_tokens=add_special_tokens))

    async def prompt_ids(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """`encode_async` of what may be a long prompt, whose ids are then an array."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await self._in_pool(lambda: packed(self.encode(text, add_special_tokens=add_special_tokens)))

    async def _in_pool(self, work: Callable[[], R]) -> R:
        if self._waiting >= MAX_WAITING_ENCODES:
            raise QueueFullError("Too many prompts wait to be tokenized; try again later.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        finally:
            self._waiting -= 1

    def encode_pair(self, first: str, second: str, most: int | None = None) -> tuple[list[int], int]:
        """Ids of two texts as the tokenizer joins them, and the place at which its second type of tokens begins,
        or 0. most: tokens beyond which the longer of the two is cut. Raises RequestError as `encode` does.
        """
        try:
            one, two = (self._backend.encode(text, add_special_tokens=False) for text in (first, second))
        except (TypeError, UnicodeEncodeError):
            raise RequestError("The prompt is not valid Unicode: it holds a lone surrogate.") from None
        joined = self._backend.post_process(one, two, True)
        ids, types = joined.ids, joined.type_ids
        if most is not None and len(ids) > most:
            # `Encoding.truncate` would keep what it cuts off, and joining that takes the product of both lengths.
            left = list(_longest_first(len(one.ids), len(two.ids), most - (len(ids) - len(one.ids) - len(two.ids))))
            kept = []
            for place, text in enumerate(joined.sequence_ids):
                if text is not None:
                    left[text] -= 1
                if text is None or left[text] >= 0:
                    kept.append(place)
            ids, types = [ids[place] for place in kept], [types[place] for place in kept]
        return ids, types.index(1) if 1 in types else 0

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads for texts that would hold the loop: long prompts, and the server's chat templates."""
        return ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Stop the pool; texts that still wait are given up."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    # Ids to text.

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD, as the Unicode standard advises.

        It is `tokenizers`' own decoding but for one thing: there, a run of byte-fallback tokens with one bad byte
        turns into U+FFFD altogether, here the whole characters of the run are kept.
        """
        rule = self.rule
        if rule is None:
            return self._decode_unknown(token_ids, skip_special_tokens, spaces_between_special_tokens)
        pieces = self.pieces(skip_special_tokens)
        opening = Opening(rule)
        head = b""
        used = 0
        for token_id in token_ids:
            if opening.done:
                break
            used += 1
            if (token := self.counted_token(token_id, skip_special_tokens)) is not None:
                head += opening.feed(token)
        rest = token_ids[used:] if used else token_ids
        return (head + b"".join(map(pieces.__getitem__, rest))).decode(errors="replace")

    def _decode_unknown(self, token_ids: Sequence[int], skip_special: bool, spaces: bool) -> str:
        """Decoders without a table (WordPiece, CTC, none): the library's own, over the whole."""
        ids = list(token_ids)
        if skip_special or spaces:
            return self._backend.decode(ids, skip_special_tokens=skip_special)
        parts: list[str] = []
        ordinary: list[int] = []
        for token_id in ids:
            if token_id not in self.added_ids:
                ordinary.append(token_id)
                continue
            if ordinary:
                parts.append(self._backend.decode(ordinary, skip_special_tokens=False))
                ordinary = []
            parts.append(self._backend.id_to_token(token_id) or "")
        if ordinary:
            parts.append(self._backend.decode(ordinary, skip_special_tokens=False))
        return "".join(parts)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id; None for an unknown one."""
        if token_id < 0 or token_id >= self.vocab_size:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of the vocabulary's own spelling."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes that an id stands for inside a text; special tokens are their own name, unknown ids b""."""
        if self.rule is not None:
            return self._pieces[token_id]
        return (self.id_to_token(token_id) or "").encode()

    # For the detokenizer.

    def pieces(self, skip_special_tokens: bool, kept: frozenset[int] = _NOTHING) -> Pieces:
        """id -> bytes inside a text; only where `rule` is known. kept: special tokens that are not skipped."""
        if not skip_special_tokens:
            return self._pieces
        return self._tables(kept)[0] if kept else self._pieces_without_special

    def texts(self, skip_special_tokens: bool, kept: frozenset[int] = _NOTHING) -> Texts:
        """id -> text where it is whole; only where `rule` is known. kept: see `pieces`."""
        if not skip_special_tokens:
            return self._texts
        return self._tables(kept)[1] if kept else self._texts_without_special

    def _tables(self, kept: frozenset[int]) -> tuple[Pieces, Texts]:
        tables = self._showing.get(kept)
        if tables is None:
            pieces = Pieces(lambda id: self._piece(id) if id in kept else self._piece_without_special(id))
            tables = self._showing[kept] = pieces, Texts(pieces)
        return tables

    def counted_token(self, token_id: int, skip_special_tokens: bool, kept: frozenset[int] = _NOTHING) -> str | None:
        """The token, or None when it has no part in the text: skipped or unknown."""
        if skip_special_tokens and token_id in self.special_ids and token_id not in kept:
            return None
        return self.id_to_token(token_id)

    def _piece(self, token_id: int) -> bytes | None:
        token = self.id_to_token(token_id)
        assert self.rule is not None
        return None if token is None else self.rule.inner(token)

    def _piece_without_special(self, token_id: int) -> bytes | None:
        return b"" if token_id in self.special_ids else self._pieces[token_id] or None

    def _find_rule(self, vocabulary: dict[str, int]) -> PieceRule | None:
        """The decoder's rule, if it gives what the library gives on a sample of the vocabulary."""
        decoder = self._backend.decoder
        if decoder is None:
            return None
        rule = compile_rule(json.loads(decoder.__getstate__()))
        if rule is None:
            return None
        ids = sorted(vocabulary.values())
        for token_id in ids[:: max(1, len(ids) // 64)]:
            token = self._backend.id_to_token(token_id) or ""
            ours = Opening(rule).feed(token).decode(errors="replace")
            theirs = self._backend.decode([token_id], skip_special_tokens=False)
            if ours != theirs and "�" not in theirs:
                return None
        return rule


def _longest_first(first: int, second: int, most: int) -> tuple[int, int]:
    """Tokens of two texts that are left where `most` fit: the longer one loses, then both, as `tokenizers` has it."""
    most = max(most, 0)
    short, long = min(first, second), max(first, second)
    if short + long > most:
        long = min(long, max(short, most - short))
    if short + long > most:
        short = most // 2
        long = short + most % 2
    return (short, long) if first <= second else (long, short)
