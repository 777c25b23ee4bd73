"""What a model can be asked for: text, embeddings, scores. Read at start from its directory and the flags.

Understood are the files of sentence-transformers (modules.json, the configs of its Pooling and LogitScore modules) and
a few fields of config.json. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import ModelOptions, StartupError
from engine.models.fields import Fields
from engine.models.gguf.config import model_fields
from engine.models.spec import ModelSpec

# Pooling modes of sentence-transformers that a causal model is served with.
_MODES: dict[str, Literal["last", "mean"]] = {"lasttoken": "last", "mean": "mean"}
# The flags of a Pooling module's older config.json, and the words of its newer `pooling_mode`.
_MODE_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class Abilities:
    """generates: it continues a text.

    embedding: how a prompt becomes a vector, None where it does not. normalize: that vector is scaled to length 1.
    width: its numbers. dimensions: the shorter lengths that the model was trained for (matryoshka): None for none,
    empty for any. score_tokens: the ids whose odds as the next token are a relevance (yes, no).
    """

    generates: bool = True
    embedding: Literal["last", "mean"] | None = None
    normalize: bool = True
    width: int = 0
    dimensions: tuple[int, ...] | None = None
    score_tokens: tuple[int, int] | None = None

    @property
    def needs_head(self) -> bool:
        """Its output layer is of use."""
        return self.generates or self.score_tokens is not None

    def describe(self) -> str:
        """For the start-up table."""
        parts = ["text"] if self.generates else []
        if self.embedding is not None:
            length = ", length 1" if self.normalize else ""
            parts.append(f"embeddings ({self.embedding} pooling, {self.width} numbers{length})")
        if self.score_tokens is not None:
            parts.append("scores (odds of tokens {} and {})".format(*self.score_tokens))
        return ", ".join(parts)


def read_abilities(
    directory: Path, config: ModelSpec, options: ModelOptions, token_id: Callable[[str], int | None]
) -> Abilities:
    """token_id: of a token's exact spelling in the vocabulary. Raises StartupError.

    runner auto: a model that says how to pool it embeds and nothing else. pooling: overrules the model, and lets one
    that generates embed beside that. runner generate: what the model says of pooling is not read.
    """
    fields = model_fields(directory)
    runner, asked = options.runner, options.pooling
    if runner == "generate" and config.headless:
        raise StartupError(f"--runner generate: {config.architecture} in {directory} has no output layer")
    modules = _Modules.read(directory) if runner != "generate" else _Modules({})
    score_tokens = _score_tokens(directory, config.vocab_size, fields, options, modules, token_id)
    embedding = _MODES[modules.mode()] if "Pooling" in modules.paths and asked == "auto" else None
    generates = runner == "generate" or (runner == "auto" and "Pooling" not in modules.paths and not config.headless)
    normalize = True
    if "Pooling" in modules.paths:
        modules.refuse_others()
        normalize = "Normalize" in modules.paths
    if asked != "auto":
        embedding = "last" if asked == "last" else "mean"
    elif embedding is None and not generates and score_tokens is None:
        embedding = "last"
    if score_tokens is not None and config.headless:
        raise StartupError(f"scores need the output layer, and {config.architecture} in {directory} has none")
    dimensions: tuple[int, ...] | None = None
    if fields.has("matryoshka_dimensions"):
        dimensions = fields.integers("matryoshka_dimensions")
    elif fields.flag("is_matryoshka", False):
        dimensions = ()
    return Abilities(generates, embedding, normalize, config.hidden_size, dimensions, score_tokens)


class _Modules:
    """The modules of a sentence-transformers model: paths has the directory of each by the last word of its type."""

    def __init__(self, paths: dict[str, Path], file: Path | None = None) -> None:
        self.paths = paths
        self._file = file

    @classmethod
    def read(cls, directory: Path) -> _Modules:
        """None are named where there is no modules.json."""
        file = directory / "modules.json"
        if not file.exists():
            return cls({})
        try:
            entries: Any = json.loads(file.read_bytes())
            paths = {str(entry["type"]).rsplit(".", 1)[-1]: directory / str(entry["path"]) for entry in entries}
        except (OSError, ValueError, TypeError, KeyError):
            raise StartupError(f"{file}: must be a list of objects with `type` and `path`") from None
        if any(not path.resolve().is_relative_to(directory.resolve()) for path in paths.values()):
            raise StartupError(f"{file}: a path leads out of the directory")
        return cls(paths, file)

    def mode(self) -> str:
        """The one mode of the Pooling module."""
        fields = Fields.read(self.paths["Pooling"] / "config.json")
        if fields.has("pooling_mode"):
            given = fields.raw("pooling_mode")
            modes = given if isinstance(given, list) else [given]
        else:
            modes = [mode for name, mode in _MODE_FLAGS.items() if fields.flag(name, False)]
        if len(modes) != 1 or modes[0] not in tuple(_MODES):
            shown = " and ".join(map(str, modes)) or "no mode"
            raise StartupError(
                f"{fields.path}: pooling by {shown} is not supported, only mean and lasttoken; --pooling mean or last "
                "forces one of these, --runner generate serves the model without embeddings"
            )
        return str(modes[0])

    def refuse_others(self) -> None:
        """A vector goes through these modules and no other."""
        for name in self.paths:
            if name not in ("Transformer", "Pooling", "Normalize"):
                raise StartupError(
                    f"{self._file}: the module {name} is not supported; --runner generate serves the model without "
                    "embeddings"
                )


def _score_tokens(
    directory: Path,
    vocab_size: int,
    fields: Fields,
    options: ModelOptions,
    modules: _Modules,
    token_id: Callable[[str], int | None],
) -> tuple[int, int] | None:
    """By flag, by the LogitScore module of sentence-transformers, or by vLLM's `classifier_from_token` (no, yes)."""
    spellings: list[str] | tuple[str, ...] | None = options.score_tokens
    origin = "--score-tokens"
    if spellings is None and "LogitScore" in modules.paths:
        module = Fields.read(modules.paths["LogitScore"] / "config.json")
        if not module.has("false_token_id"):
            module.fail("false_token_id", "is missing: a score is the odds of two tokens; --score-tokens sets both")
        yes, no = (module.integer(f"{name}_token_id", minimum=0, maximum=vocab_size - 1) for name in ("true", "false"))
        return yes, no
    if spellings is None and fields.has("classifier_from_token"):
        given = fields.raw("classifier_from_token")
        if not isinstance(given, list) or len(given) != 2 or not all(isinstance(item, str) for item in given):
            fields.fail("classifier_from_token", "must be a list of two tokens")
        spellings, origin = given[::-1], f"{fields.path}: classifier_from_token"
    if spellings is None:
        return None
    ids: list[int] = []
    for spelling in spellings:
        if (found := token_id(spelling)) is None or found >= vocab_size:
            raise StartupError(f"{origin}: {spelling!r} is no token of the vocabulary in {directory}")
        ids.append(found)
    return ids[0], ids[1]
