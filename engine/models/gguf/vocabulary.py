"""What a GGUF file's metadata says of single tokens: which of them end an answer. Imports no torch."""

from __future__ import annotations

from engine.models.gguf.reader import GGUF

# Keys that name a token at which an answer ends.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Files name one end, and their models have others; llama.cpp knows them by their text, too.
_ENDS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot|>",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
    )
)
_CONTROL = 3


def end_ids(model: GGUF) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, those that the file names first. Raises StartupError."""
    tokens = model.words("tokenizer.ggml.tokens") or []
    found = []
    for name in _END_KEYS:
        key = f"tokenizer.ggml.{name}"
        token_id = model.get(key)
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < max(len(tokens), 1):
            model.fail(key, f"must be the id of one of {len(tokens)} tokens, not {token_id!r:.40}")
        found.append(token_id)
    kinds = model.array("tokenizer.ggml.token_type")
    if kinds is not None and len(kinds) == len(tokens):
        texts = {tokens[index]: index for index in (kinds == _CONTROL).nonzero()[0].tolist()}
        named = [texts[text] for text in _ENDS & texts.keys()]
        # Where a model has both, <|end|> ends a message and not the answer.
        if "<|return|>" in texts and texts.get("<|end|>") in named:
            named.remove(texts["<|end|>"])
        found += sorted(named)
    return tuple(dict.fromkeys(found))
