"""The tokenizer as the grammar library reads one."""

from __future__ import annotations

from llguidance import LLTokenizer

from engine.text.tokenizer import Tokenizer


class Words:
    """Our tokenizer as the library reads one: `tokens`, `special_token_ids` and a call from text to ids.

    exact: the call gives ids whose bytes are the text again, which jump-ahead needs.
    """

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: list[int], vocab_size: int) -> None:
        assert eos_token_ids, "a grammar ends with an EOS"
        self.eos_token_ids = eos_token_ids
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = sorted(id for id in {*tokenizer.special_ids, *eos_token_ids} if id < vocab_size)
        # An id that the model cannot say is in no forced text either.
        special = frozenset((*self.special_token_ids, *range(vocab_size, tokenizer.vocab_size)))
        # A token without bytes is in nobody's text. Special ones go by their name.
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(min(tokenizer.vocab_size, vocab_size))]
        self.tokens += [b""] * (vocab_size - len(self.tokens))
        for token_id in special:
            if token_id < vocab_size and not self.tokens[token_id]:
                self.tokens[token_id] = f"<special {token_id}>".encode()
        self.fallback: LLTokenizer | None = None
        self._tokenizer = tokenizer
        self._special = special
        # SentencePiece models put a space before the first word. Behind a byte that merges with nothing there is none.
        self._lead: str | None = None
        self._num_lead = 0
        for lead in ("", "\x02", "\n"):
            ids = tokenizer.encode(lead, add_special_tokens=False)
            if all(
                self._exact(text, lead, len(ids)) is not None for text in ('{"name": "', "a b", " x", "é", "\n\n1,")
            ):
                self._lead, self._num_lead = lead, len(ids)
                break
        self.exact = tokenizer.rule is not None and self._lead is not None

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        ids = None if self._lead is None else self._exact(text, self._lead, self._num_lead)
        if ids is None:
            # Rare: the text spells a special token, or the tokenizer normalises it.
            ids = self.fallback.greedy_tokenize(text) if self.fallback is not None else []
        return ids

    def _exact(self, text: str, lead: str, num_lead: int) -> list[int] | None:
        ids = self._tokenizer.encode(lead + text, add_special_tokens=False)[num_lead:]
        if not self._special.isdisjoint(ids) or b"".join(map(self._tokenizer.token_bytes, ids)) != text.encode():
            return None
        return ids
