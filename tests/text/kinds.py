"""Small tokenizers of every kind the text wing must read, trained in a moment on a few sentences."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.text.tokenizer import Tokenizer

CORPUS = [
    "The cat sat on the mat, and the dog ran after the ball. The end of the story.",
    "Hello world! How are you today? I'm fine, thanks; you're welcome.",
    "def main():\n    print('hello', 42)\n    return None\n\n\n# done",
    "你好，世界。今天天气很好。", "Grüße aus München: naïve café, œuvre, Ångström", "emoji 😀 and 👨‍👩‍👧 and 🇩🇪!",
    "1234567890 3.14159 {\"key\": [1, 2, 3]}", "stop STOP </s> <|im_end|> User: Assistant:",
] * 4  # fmt: skip

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2, Llama 3, Qwen: bytes as printable letters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool_call>", "  "])
    return tokenizer


def byte_level_regex() -> tokenizers.Tokenizer:
    """Byte-level with a decoder step that no table can hold: the slow way must keep characters whole as well."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(tokenizers.Regex("qq+"), "q")]  # no token has two q
    )
    return tokenizer


def byte_fallback(*, strip: bool = True) -> tokenizers.Tokenizer:
    """Llama 2, Mistral (strip) and Gemma (no strip): SentencePiece BPE with <0xNN> for what it has no piece for."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if strip else "never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False, limit_alphabet=60)
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary = trained["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for run in ("▁▁", "▁▁▁▁"):
        vocabulary.setdefault(run, len(vocabulary))
    trained["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(trained))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """T5 and XLM-R: SentencePiece unigram, Metaspace both ways."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """A decoder that looks at the neighbours: no table of pieces."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def no_decoder() -> tokenizers.Tokenizer:
    """Words with a space between them: what the library does without a decoder."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "byte_level_regex": byte_level_regex,
    "byte_fallback": byte_fallback,
    "byte_fallback_no_strip": functools.partial(byte_fallback, strip=False),
    "unigram": unigram,
    "word_piece": word_piece,
    "no_decoder": no_decoder,
}
WITH_TABLE = ["byte_level", "byte_fallback", "byte_fallback_no_strip", "unigram"]

CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": {
        "__type": "AddedToken",
        "content": "<unk>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    },
    "additional_special_tokens": ["<|im_end|>"],
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000,
}


@functools.cache
def backend(kind: str) -> str:
    """tokenizer.json of a kind, as text."""
    text: str = MAKERS[kind]().to_str()
    return text


def write(kind: str, directory: Path, config: dict[str, Any] | None = None) -> Path:
    """A model directory with a tokenizer of that kind."""
    (directory / "tokenizer.json").write_text(backend(kind), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG if config is None else config))
    return directory


@functools.cache
def load(kind: str) -> Tokenizer:
    """Ours, in memory."""
    named = {name: token for name, token in CONFIG.items() if name.endswith("_token") and isinstance(token, str)}
    return Tokenizer(tokenizers.Tokenizer.from_str(backend(kind)), named)


@functools.cache
def oracle(kind: str) -> tokenizers.Tokenizer:
    """The library's own, for its whole decoding."""
    return tokenizers.Tokenizer.from_str(backend(kind))
