"""The added and the named tokens of a tokenizer: which there are, and how each is split off and shown.

tokenizer.json lists them, and the files beside it overrule that. Used by the Tokenizer when it is loaded; the names
also by chat templates.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from engine.config import StartupError

logger = logging.getLogger("oneloop.start")

# Named tokens of tokenizer_config.json. Each is special: split off when encoding, skipped when decoding.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the model directory. StartupError when it cannot be read."""
    try:
        value = json.loads(path.read_bytes())  # with or without a byte order mark
    except OSError as error:
        raise StartupError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StartupError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def named_tokens(directory: Path) -> dict[str, str]:
    """`*_token` fields of tokenizer_config.json (and of the older special_tokens_map.json) by name, as text."""
    found: dict[str, str] = {}
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    old = directory / "special_tokens_map.json"
    # Files that list their added tokens carry the names themselves; only older ones need the map.
    sources = [(path, config)]
    if old.is_file() and "added_tokens_decoder" not in config:
        sources.append((old, read_json(old)))
    for source, fields in sources:
        for name, value in fields.items():
            if not name.endswith("_token") or isinstance(value, bool) or value is None:
                continue  # add_bos_token and its like end in _token too
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[name] = content
            elif name in NAMED_TOKENS:
                raise StartupError(f"{source}: {name} must be text or an object with content, got {value!r}")
        extra = fields.get("extra_special_tokens")
        if isinstance(extra, dict):
            found.update({name: text for name, text in extra.items() if isinstance(text, str)})
    return found


def settle_added_tokens(backend: tokenizers.Tokenizer, directory: Path, rows: int) -> frozenset[int]:
    """Bring the added tokens into the state that transformers 5 brings them into; the ids of the special ones.

    `added_tokens_decoder` of tokenizer_config.json decides over tokenizer.json: flags, and tokens that are only there.
    Where it is missing, added_tokens.json and special_tokens_map.json of older directories add theirs. A named token
    that is an ordinary word becomes special; one that is in no vocabulary is added only where its id is below `rows`,
    so that the model has a row for it, and never for EOS, for answers would not end. What tokenizer.json calls special
    stays so when decoding, as in the library. Raises StartupError.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    existing = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    special = {text for text, token in existing.items() if token.special}
    extra = _extra_tokens(config, path)
    named = named_tokens(directory)
    texts = list(named.values())
    if "added_tokens_decoder" in config:
        declared = _declared(config["added_tokens_decoder"], path)
        flags: dict[str, dict[str, Any]] = {}
    else:
        declared = _older(directory, existing, {*texts, *extra})
        flags = _flags_of_names(directory)
        extra += _extra_tokens(_read(directory / "special_tokens_map.json"), directory / "special_tokens_map.json")
    settled = {text: (token_id, _token(text, values, path)) for token_id, text, values in declared}
    for text in texts:
        if text in settled:
            token_id, token = settled[text]
            settled[text] = token_id, _as_special(token)
        elif text in existing:
            settled[text] = -1, _as_special(existing[text])
        elif backend.token_to_id(text) is not None:
            settled[text] = -1, _token(text, {**flags.get(text, {}), "special": True}, path)
    changed = [
        (token_id, token) for token_id, token in settled.values() if repr(token) != repr(existing.get(token.content))
    ]
    backend.add_tokens([token for _, token in changed])
    for token_id, token in changed:
        if token_id >= 0 and (given := backend.token_to_id(token.content)) != token_id:
            logger.warning("%s: token %r gets the id %s, not %d", directory, token.content[:80], given, token_id)
    for text in (*texts, *extra):
        # Not those that are added tokens already: only a name makes such a one special.
        known = backend.token_to_id(text) is not None
        room = text != named.get("eos_token") and _next_id(backend) < rows
        if text not in settled and text not in existing and (known or room):
            backend.add_tokens([_token(text, {**flags.get(text, {}), "special": True}, path)])
    added = backend.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special or token.content in special)


def _next_id(backend: tokenizers.Tokenizer) -> int:
    size: int = backend.get_vocab_size()
    return size


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _extra_tokens(config: dict[str, Any], path: Path) -> list[str]:
    """Special tokens without a name. The named ones of a dict are in `named_tokens`."""
    name = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    value = config.get(name) or []
    if not isinstance(value, list | dict):
        raise StartupError(f"{path}: {name} must be a list of tokens, got {value!r}")
    listed = [item.get("content") if isinstance(item, dict) else item for item in value if isinstance(value, list)]
    return [item for item in listed if isinstance(item, str)]


def _declared(value: Any, path: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """`added_tokens_decoder` as (id, content, flags), by id."""
    if not isinstance(value, dict):
        raise StartupError(f"{path}: added_tokens_decoder must be an object")
    try:
        entries = [(int(token_id), fields["content"], dict(fields)) for token_id, fields in value.items()]
    except (ValueError, TypeError, KeyError) as error:
        raise StartupError(f"{path}: added_tokens_decoder: {error!r}") from None
    for _, text, _ in entries:
        if not isinstance(text, str):
            raise StartupError(f"{path}: added_tokens_decoder: content must be text, got {text!r}")
    return sorted(entries, key=lambda entry: entry[0])


def _older(directory: Path, existing: dict[str, Any], special: set[str]) -> list[tuple[int, str, dict[str, Any]]]:
    """added_tokens.json (text -> id) as (id, content, flags), without what tokenizer.json has, which counts more."""
    path = directory / "added_tokens.json"
    entries = []
    for text, token_id in _read(path).items():
        if not isinstance(token_id, int):
            raise StartupError(f"{path}: {text!r} must have a token id, not {token_id!r}")
        if text not in existing:
            entries.append((token_id, text, {"special": text in special, "normalized": text not in special}))
    return sorted(entries, key=lambda entry: entry[0])


def _flags_of_names(directory: Path) -> dict[str, dict[str, Any]]:
    """Flags of tokens that are written as objects in special_tokens_map.json."""
    values = [value for value in _read(directory / "special_tokens_map.json").values() if isinstance(value, dict)]
    return {value["content"]: value for value in values if isinstance(value.get("content"), str)}


def _token(text: str, fields: dict[str, Any], path: Path) -> tokenizers.AddedToken:
    flags = {name: fields[name] for name in _FLAGS if fields.get(name) is not None}
    try:
        return tokenizers.AddedToken(text, **flags)
    except (TypeError, ValueError) as error:
        raise StartupError(f"{path}: token {text!r}: {error}") from None


def _as_special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    flags = {name: getattr(token, name) for name in _FLAGS}
    return tokenizers.AddedToken(token.content, **{**flags, "special": True})
