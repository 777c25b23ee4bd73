"""A Tokenizer and a ChatTemplate from the metadata of a GGUF file (`tokenizer.*`).

Built once at start with the `tokenizers` library, part by part as a tokenizer.json of the same model would have them.
Words of the metadata (`tokenizer.ggml.pre`) are looked up, never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from engine.config import StartupError
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"
# `tokenizer.ggml.NAME_token_id` -> the name that templates know.
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "separator": "sep_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = rf"{_CASED % (_SHORT + '?', _SHORT + '?')}|\p{{N}}{{1,3}}|{_REST_SLASH}"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_REST_SLASH}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_NO_HAN = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]")
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN[0]}*{_NO_HAN[1]}+{_SHORT}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN[0]}+{_NO_HAN[1]}*{_SHORT}?|\p{{N}}{{1,3}}|{_REST}"
)
_DIGIT = r"\p{N}"

# `tokenizer.ggml.pre` -> the patterns that a text is split by, one after another.
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        (_LLAMA3,),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"), (_LLAMA3,)),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo", "jais", "trillion",
         "granite-docling", "exaone4", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code",
         "roberta-bpe"),
        (_GPT2,),
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (_DIGIT, _GPT2),
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        (_QWEN2,),
    ),
    "qwen35": (_QWEN35,),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), (r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "deepseek-llm": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"), (_GPT4O,)),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "seed-coder": (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
            r"|\s+(?!\S)|\s+",
        ),
    ),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "viking": (r" ?[^(\s|.,!?…。，、।۔،)]+", _DIGIT),
    "kimi-k2": (_KIMI,),
    "minicpm5": (
        r"\p{N}{1,3}",
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_REST}",
    ),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2),
    "exaone-moe": (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
}  # fmt: skip
# A word that is in the vocabulary is that token, whatever the merges say.
_WHOLE_WORDS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
     "glm4", "glm5", "minicpm5")
)  # fmt: skip
# Texts are composed (NFC) before they are split, as the tokenizer.json of these models says.
_COMPOSED = frozenset(("qwen2", "qwen35", "deepseek-r1-qwen", "megrez", "stablelm2", "olmo", "modern-bert"))
# Where the metadata does not say whether BOS comes first.
_BOS_FIRST = frozenset(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                        "jina-v5-nano", "tekken"))  # fmt: skip


class Metadata(Protocol):
    """Of a GGUF file; what is of another type raises StartupError."""

    path: Path

    def fail(self, name: str, problem: str) -> NoReturn: ...
    def get(self, name: str) -> Any: ...
    def text(self, name: str) -> str | None: ...
    def words(self, name: str) -> list[str] | None: ...
    def array(self, name: str) -> Any: ...


class _Vocabulary:
    """The tokens of a file. ids: of each text, the first where it stands twice. kinds: `token_type`, a number each."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        tokens = metadata.words(PREFIX + "tokens")
        if not tokens:
            metadata.fail(PREFIX + "tokens", "is missing: the file has no vocabulary; --tokenizer names a directory")
        self.tokens = tokens
        self.ids: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            self.ids.setdefault(token, token_id)
        kinds = metadata.array(PREFIX + "token_type")
        if kinds is None:
            kinds = np.ones(len(tokens), dtype=np.int32)
        if len(kinds) != len(tokens):
            metadata.fail(PREFIX + "token_type", f"has {len(kinds)} entries for {len(tokens)} tokens")
        self.kinds: list[int] = [int(kind) for kind in kinds]

    def of_kind(self, kind: int) -> list[str]:
        return [token for token, each in zip(self.tokens, self.kinds, strict=True) if each == kind]

    def scores(self) -> list[float]:
        scores = self.metadata.array(PREFIX + "scores")
        if scores is None or len(scores) != len(self.tokens):
            count = "is missing" if scores is None else f"has {len(scores)} entries for {len(self.tokens)} tokens"
            self.metadata.fail(PREFIX + "scores", count)
        if not np.isfinite(scores).all():
            self.metadata.fail(PREFIX + "scores", "must hold finite numbers")
        return [float(score) for score in scores]

    def named(self, name: str) -> str | None:
        """The text of the token that `tokenizer.ggml.NAME_token_id` is the id of."""
        key = f"{PREFIX}{name}_token_id"
        token_id = self.metadata.get(key)
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            self.metadata.fail(key, f"must be the id of one of {len(self.tokens)} tokens, not {token_id!r:.40}")
        return self.tokens[token_id]

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.metadata.fail(PREFIX + name, f"must be true or false, not {value!r:.40}")
        return value


def load_tokenizer(metadata: Metadata) -> Tokenizer:
    """Raises StartupError naming the file and the key."""
    kind = metadata.text(PREFIX + "model")
    if kind is None:
        metadata.fail(PREFIX + "model", "is missing: the file has no tokenizer; --tokenizer names a directory")
    if kind not in _KINDS:
        metadata.fail(PREFIX + "model", f"{kind!r:.60} is not supported; supported are: {', '.join(_KINDS)}")
    words = _Vocabulary(metadata)
    try:
        backend = _KINDS[kind](words)
        _add_tokens(backend, words, normalized=kind == "llama")
    except (StartupError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic of its is none at all
        raise StartupError(f"{metadata.path}: tokenizer: {' '.join(str(error).split())[:300]}") from None
    named = {ours: text for name, ours in _NAMED.items() if (text := words.named(name)) is not None}
    tokenizer = Tokenizer(backend, named)
    if tokenizer.vocab_size > len(words.tokens):
        metadata.fail(PREFIX + "tokens", f"has {len(words.tokens)} tokens, and the tokenizer {tokenizer.vocab_size}")
    return tokenizer


def load_chat_template(metadata: Metadata, named: dict[str, str]) -> ChatTemplate | None:
    """The one in the metadata, and its named ones; None where there is none. Raises StartupError."""
    templates = {}
    if (default := metadata.text(TEMPLATE)) is not None:
        templates["default"] = default
    for name in metadata.words("tokenizer.chat_templates") or []:
        if (text := metadata.text(f"{TEMPLATE}.{name}")) is not None:
            templates[name] = text
    if not templates:
        return None
    return ChatTemplate(templates, named, f"{metadata.path}: {TEMPLATE}")


def _add_tokens(backend: Backend, words: _Vocabulary, *, normalized: bool) -> None:
    """Tokens that are cut out of a text before anything else: control tokens, and those that users defined.

    normalized: the latter are looked for where spaces have become what the vocabulary writes for them.
    """
    controls = words.of_kind(_CONTROL) + words.of_kind(_UNKNOWN)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls if token])
    users = [AddedToken(token, normalized=normalized, special=False) for token in words.of_kind(_USER) if token]
    backend.add_tokens(users)


def _frame(backend: Backend, words: _Vocabulary, *, bos: bool, eos: bool, names: tuple[str, str]) -> None:
    """Put BOS and EOS around every text, where the metadata says so. bos, eos: where it says nothing."""
    first, last = words.flag("add_bos_token", bos), words.flag("add_eos_token", eos)
    parts: Any = ["$A:0"]
    special: list[Any] = []
    for wanted, name, place in ((first, names[0], 0), (last, names[1], 2)):
        text = words.named(name) if wanted else None
        if text is None:
            # What the metadata only implies is no error.
            continue
        parts.insert(place, f"{text}:0")
        if (text, words.ids[text]) not in special:
            special.append((text, words.ids[text]))
    if special:
        backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=special)


def _merges(words: _Vocabulary) -> list[tuple[str, str]]:
    """`tokenizer.ggml.merges`; each is two tokens with a space between, and may begin with one."""
    name = PREFIX + "merges"
    merges = []
    for merge in words.metadata.words(name) or words.metadata.fail(name, "is missing"):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 1 or not right:
            words.metadata.fail(name, f"must hold two tokens with a space between, not {merge!r:.60}")
        for token in (left, right, left + right):
            if token not in words.ids:
                words.metadata.fail(name, f"holds {merge!r:.60}, and {token!r:.60} is no token of the vocabulary")
        merges.append((left, right))
    return merges


def _byte_level(words: _Vocabulary) -> Backend:
    """GPT-2's kind: merges over bytes, after a split by patterns."""
    pre = words.metadata.text(PREFIX + "pre")
    if pre is None or pre == "default":
        words.metadata.fail(PREFIX + "pre", "is missing or default: the file does not say how text is split")
    if pre not in _SPLITS:
        words.metadata.fail(PREFIX + "pre", f"{pre!r:.60} is not supported; supported are: {', '.join(_SPLITS)}")
    backend = Backend(models.BPE(vocab=words.ids, merges=_merges(words), ignore_merges=pre in _WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    backend.decoder = decoders.ByteLevel()
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    _frame(backend, words, bos=pre in _BOS_FIRST, eos=False, names=("bos", "eos"))
    return backend


def _spaced(backend: Backend, prefix: bool, *before: Any) -> None:
    """Spaces as U+2581, one before the text (prefix), and back."""
    replace = normalizers.Replace(" ", _SPACE)
    parts = [*before, normalizers.Prepend(_SPACE), replace] if prefix else [*before, replace]
    backend.normalizer = normalizers.Sequence(parts)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _sentencepiece(words: _Vocabulary) -> Backend:
    """SentencePiece's BPE: of two neighbours those merge first whose union has the highest score."""
    scores, ids = words.scores(), words.ids
    plain = {token: token_id for token, token_id in ids.items() if words.kinds[token_id] not in (_UNUSED, _BYTE)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, token_id in plain.items():
        if words.kinds[token_id] == _CONTROL:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in plain and right in plain:
                found.append((-scores[token_id], ids[left], ids[right], left, right))
    found.sort(key=lambda each: each[:3])
    backend = Backend(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for *_, left, right in found],
            unk_token=words.named("unknown"),
            fuse_unk=True,
            byte_fallback=bool(words.of_kind(_BYTE)),
        )
    )
    _spaced(backend, words.flag("add_space_prefix", True))
    _frame(backend, words, bos=True, eos=False, names=("bos", "eos"))
    return backend


def _unigram(words: _Vocabulary) -> Backend:
    """SentencePiece's other kind: the likeliest of all ways to cut a text."""
    unknown = words.named("unknown")
    backend = Backend(
        models.Unigram(
            list(zip(words.tokens, words.scores(), strict=True)),
            words.ids[unknown] if unknown is not None else None,
            byte_fallback=bool(words.of_kind(_BYTE)),
        )
    )
    parts: list[Any] = []
    charsmap = words.metadata.array(PREFIX + "precompiled_charsmap")
    if charsmap is not None and len(charsmap):
        parts.append(normalizers.Precompiled(np.asarray(charsmap).astype(np.int8).tobytes()))
    if words.flag("remove_extra_whitespaces", False):
        parts += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if parts:
        backend.normalizer = normalizers.Sequence(parts)
    scheme = "always" if words.flag("add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(_SPACE, prepend_scheme=scheme)
    _frame(backend, words, bos=False, eos=True, names=("bos", "eos"))
    return backend


def _word_piece(words: _Vocabulary) -> Backend:
    """BERT's kind. Files mark the beginning of a word, BERT its continuation."""
    vocabulary: dict[str, int] = {}
    for token, token_id in words.ids.items():
        if words.kinds[token_id] in (_CONTROL, _UNKNOWN, _UNUSED):
            vocabulary[token] = token_id
        elif token.startswith(_SPACE):
            vocabulary[token[1:]] = token_id
        else:
            vocabulary[f"##{token}"] = token_id
    unknown = words.named("unknown") or "[UNK]"
    backend = Backend(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    lowercase = words.flag("normalizer.lowercase", True)
    strip = words.flag("normalizer.strip_accents", lowercase)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    last = "seperator" if words.metadata.get(f"{PREFIX}seperator_token_id") is not None else "eos"
    first = "cls" if words.metadata.get(f"{PREFIX}cls_token_id") is not None else "bos"
    _frame(backend, words, bos=True, eos=True, names=(first, last))
    return backend


# `tokenizer.ggml.model` -> what builds it.
_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram, "bert": _word_piece}
