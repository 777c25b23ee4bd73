"""IncrementalDetokenizer: the text of one sequence, as its tokens come; stop strings are found here.

The engine pushes ids on the loop thread and gets back text that will never change: an unfinished UTF-8 character
and the possible start of a stop string are held back. Cutting the ids differently changes neither text nor stop, so
an unstreamed text is one `push` of everything and a `finish`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.request import SamplingParams
from engine.text.pieces import Opening
from engine.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")

# Prompt tokens that a decoder without a table of pieces sees before the first output token.
_CONTEXT_TOKENS = 8


class IncrementalDetokenizer:
    """One per sequence.

    The prompt is context, not output: a SentencePiece model's first word keeps its space unless the prompt has no
    text of its own. stop_reason: the stop string that was met; whatever is pushed after it is ignored.

    Which stop string wins: the one that is complete first, character by character; of two that end together, the
    longer. min_tokens: the text of that many first tokens takes no part in the search.
    """

    __slots__ = (
        "_first_characters",
        "_held",
        "_include_stop",
        "_kept",
        "_longest",
        "_num_unsearched",
        "_opening",
        "_pieces",
        "_prefixes",
        "_skip_special",
        "_stop",
        "_texts",
        "_tokenizer",
        "_utf8",
        "_whole",
        "_window",
        "stop_reason",
    )

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer
        self._skip_special = sampling.skip_special_tokens
        self._kept = sampling.kept_special_ids
        self._texts = tokenizer.texts(self._skip_special, self._kept)
        self._pieces = tokenizer.pieces(self._skip_special, self._kept)
        self._utf8 = _Utf8Decoder("replace")
        self._opening: Opening | None = None
        self._window: _Window | None = None
        if tokenizer.rule is None:
            self._window = _Window(tokenizer, prompt_token_ids, sampling)
        else:
            opening = Opening(tokenizer.rule)
            for token_id in prompt_token_ids:
                if opening.done:
                    break
                if (token := tokenizer.counted_token(token_id, self._skip_special, self._kept)) is not None:
                    opening.feed(token)
            if not opening.done:
                self._opening = opening
        # Nothing is pending: a token that is whole UTF-8 is its own text.
        self._whole = self._window is None and self._opening is None

        self._stop = sampling.stop
        self._held = ""
        self._include_stop = sampling.include_stop_str_in_output
        self._num_unsearched = 0
        if self._stop:
            self._num_unsearched = sampling.min_tokens
            self._first_characters = {stop[0] for stop in self._stop}
            self._prefixes = {stop[:size] for stop in self._stop for size in range(1, len(stop))}
            self._longest = max(map(len, self._stop))

    def push(self, token_ids: Sequence[int]) -> str:
        """Newly stable text. One token costs about 0.2 us without stop strings, 0.4 us with."""
        if self._num_unsearched:
            return self._push_unsearched(token_ids)
        text = self._texts[token_ids[0]] if self._whole and len(token_ids) == 1 else None
        if text is None:
            text = self._push_text(token_ids)
        if not self._stop:
            return text
        if self.stop_reason is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        return self._search(text)

    def finish(self) -> str:
        """What was held back, at a natural end; "" after a stop string. An unfinished character is U+FFFD."""
        if self.stop_reason is not None:
            return ""
        text = self._window.finish() if self._window is not None else self._utf8.decode(b"", True)
        if self._stop and not self._num_unsearched:
            text = self._search(text)
            if self.stop_reason is None:
                text, self._held = text + self._held, ""
        return text

    def _push_unsearched(self, token_ids: Sequence[int]) -> str:
        head, rest = token_ids[: self._num_unsearched], token_ids[self._num_unsearched :]
        self._num_unsearched -= len(head)
        text = self._push_text(head)
        return text + self.push(rest) if rest else text

    def _push_text(self, token_ids: Sequence[int]) -> str:
        if self._window is not None:
            return self._window.push(token_ids)
        head, used = self._open(token_ids) if self._opening is not None else (b"", 0)
        utf8 = self._utf8
        text = utf8.decode(head + b"".join(map(self._pieces.__getitem__, token_ids[used:])))
        self._whole = self._opening is None and not utf8.getstate()[0]
        return text

    def _open(self, token_ids: Sequence[int]) -> tuple[bytes, int]:
        """Tokens while the text has not begun, where a leading space may be dropped: bytes, and ids used."""
        opening = self._opening
        assert opening is not None
        data, used = b"", 0
        for token_id in token_ids:
            if opening.done:
                break
            used += 1
            if (token := self._tokenizer.counted_token(token_id, self._skip_special, self._kept)) is not None:
                data += opening.feed(token)
        if opening.done:
            self._opening = None
        return data, used

    def _search(self, new: str) -> str:
        """Stable text out of what was held and what is new; sets stop_reason when a stop string is complete."""
        if not new:
            return ""
        text = self._held + new
        end, start = len(text) + 1, 0
        for stop in self._stop:
            found = text.find(stop)
            if found >= 0 and (found + len(stop), found) < (end, start):
                end, start, self.stop_reason = found + len(stop), found, stop
        if self.stop_reason is not None:
            self._held = ""
            return text[:end] if self._include_stop else text[:start]
        # Hold the longest end of the text that begins a stop string.
        prefixes = self._prefixes
        for place in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[place:] in prefixes:
                self._held = text[place:]
                return text[:place]
        self._held = ""
        return text


class _Window:
    """For decoders where a token's text depends on its neighbours: decode a short window twice, send the difference.

    Costs two library calls a token. Ids go in one by one, so that their cutting does not matter.
    """

    __slots__ = ("_before", "_ids", "_read", "_sampling", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._ids = [id for id in prompt_token_ids[-4 * _CONTEXT_TOKENS :] if self._counts(id)][-_CONTEXT_TOKENS:]
        self._read = len(self._ids)
        self._before = self._decode(self._ids)

    def _counts(self, token_id: int) -> bool:
        sampling = self._sampling
        return (
            self._tokenizer.counted_token(token_id, sampling.skip_special_tokens, sampling.kept_special_ids) is not None
        )

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids,
            # What is skipped is not among the ids; what is kept would be skipped here.
            skip_special_tokens=self._sampling.skip_special_tokens and not self._sampling.kept_special_ids,
            spaces_between_special_tokens=self._sampling.spaces_between_special_tokens,
        )

    def push(self, token_ids: Sequence[int]) -> str:
        parts = []
        for token_id in token_ids:
            if not self._counts(token_id):
                continue
            self._ids.append(token_id)
            text = self._decode(self._ids)
            if len(text) > len(self._before) and not text.endswith("\ufffd"):
                parts.append(text[len(self._before) :])
                del self._ids[: self._read]
                self._read = len(self._ids)
                self._before = self._decode(self._ids)
        return "".join(parts)

    def finish(self) -> str:
        return self._decode(self._ids)[len(self._before) :]
