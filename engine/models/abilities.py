"""What a model can be asked for: text, embeddings, scores. Read at start from its directory and the flags.

Understood are the files of sentence-transformers (modules.json, the configs of its Pooling, Dense and LogitScore
modules, its prompts and its longest text) and a few fields of config.json. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config import ModelOptions, StartupError
from engine.models.fields import Fields, show
from engine.models.gguf.config import model_fields
from engine.models.spec import Classifier, HeadActivation, ModelSpec, Projection

Kind = Literal["cls", "last", "mean", "max", "weightedmean", "mean_sqrt_len"]
# Pooling modes of sentence-transformers.
_MODES: dict[str, Kind] = {
    "cls": "cls",
    "lasttoken": "last",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
}
# The flags of a Pooling module's older config.json, and the words of its newer `pooling_mode`.
_MODE_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, HeadActivation] = {
    "GELU": "gelu",
    "Identity": "none",
    "ReLU": "relu",
    "SiLU": "silu",
    "Tanh": "tanh",
}
# More, or longer, are no prompts.
MAX_PROMPTS, MAX_PROMPT_LENGTH = 256, 4096


@dataclass(frozen=True, slots=True)
class Abilities:
    """generates: it continues a text.

    embedding: how a prompt becomes a vector, None where it does not. normalize: that vector is scaled to length 1.
    width: its numbers. dimensions: the shorter lengths that the model was trained for (matryoshka): None for none,
    empty for any. score_tokens: the ids whose odds as the next token are a relevance (yes, no). classifier: its head,
    of which one label alone is a relevance, too. prompts: what stands before a text, by name; default_prompt: the name
    of what stands there unless another is asked for. projections: what the model puts vectors through. max_length:
    tokens of a text that it was trained for, where its directory says so.
    """

    generates: bool = True
    embedding: Kind | None = None
    normalize: bool = True
    width: int = 0
    dimensions: tuple[int, ...] | None = None
    score_tokens: tuple[int, int] | None = None
    classifier: Classifier | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    projections: tuple[Projection, ...] = ()
    max_length: int | None = None

    @property
    def needs_head(self) -> bool:
        """Its output layer is of use."""
        return self.generates or self.score_tokens is not None

    @property
    def ranks(self) -> bool:
        """Its classifier's one number is a relevance."""
        head = self.classifier
        return head is not None and len(head.labels) == 1 and head.pooling != "all"

    def describe(self) -> str:
        """For the start-up table."""
        parts = ["text"] if self.generates else []
        if self.embedding is not None:
            length = ", length 1" if self.normalize else ""
            parts.append(f"embeddings ({self.embedding} pooling, {self.width} numbers{length})")
        if self.score_tokens is not None:
            parts.append("scores (odds of tokens {} and {})".format(*self.score_tokens))
        if self.classifier is not None:
            count = len(self.classifier.labels)
            of = "every token" if self.classifier.pooling == "all" else f"{self.classifier.pooling} pooling"
            parts.append("scores (classifier of one label)" if self.ranks else f"classes ({count} labels of {of})")
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
    modules = _Modules.read(directory) if runner != "generate" else _Modules([])
    score_tokens = _score_tokens(directory, config.vocab_size, fields, options, modules, token_id)
    pools = "Pooling" in modules.paths and config.classifier is None
    embedding = _MODES[modules.mode()] if pools and asked == "auto" else None
    generates = runner == "generate" or (runner == "auto" and not pools and not config.headless)
    normalize = True
    projections: tuple[Projection, ...] = ()
    if pools:
        projections = modules.projections(config.hidden_size)
        normalize = "Normalize" in modules.paths
    if asked != "auto":
        embedding = _asked(asked)
    elif embedding is None and not generates and score_tokens is None and config.classifier is None:
        # What says nothing: an encoder's first token stands for its text, as in vLLM.
        embedding = ("cls" if config.final_norm is None else "mean") if config.bidirectional else "last"
    if score_tokens is not None and config.headless:
        raise StartupError(f"scores need the output layer, and {config.architecture} in {directory} has none")
    dimensions: tuple[int, ...] | None = None
    if fields.has("matryoshka_dimensions"):
        dimensions = fields.integers("matryoshka_dimensions")
    elif fields.flag("is_matryoshka", False):
        dimensions = ()
    prompts, default_prompt = _read_prompts(directory) if embedding is not None else ({}, None)
    return Abilities(
        generates,
        embedding,
        normalize,
        projections[-1].size if projections else config.hidden_size,
        dimensions,
        score_tokens,
        config.classifier,
        prompts,
        default_prompt,
        projections,
        _read_max_length(directory) if not generates else None,
    )


def _asked(pooling: str) -> Kind:
    kinds: dict[str, Kind] = {"cls": "cls", "last": "last", "max": "max", "mean": "mean"}
    return kinds[pooling]


def _read_max_length(directory: Path) -> int | None:
    """Of sentence-transformers' settings of its Transformer module."""
    path = directory / "sentence_bert_config.json"
    if not path.is_file():
        return None
    return Fields.read(path).optional_integer("max_seq_length")


def _read_prompts(directory: Path) -> tuple[dict[str, str], str | None]:
    """Of sentence-transformers' settings: what stands before texts of some use, and the name of the default."""
    path = directory / "config_sentence_transformers.json"
    if not path.is_file():
        return {}, None
    fields = Fields.read(path)
    given = fields.raw("prompts") or {}
    if (
        not isinstance(given, dict)
        or len(given) > MAX_PROMPTS
        or any(
            not isinstance(text, str) or len(text) > MAX_PROMPT_LENGTH for text in given.values() if text is not None
        )
    ):
        fields.fail("prompts", "must be an object of short texts")
    prompts = {name: text or "" for name, text in given.items()}
    default = fields.raw("default_prompt_name")
    if default is not None and default not in prompts:
        fields.fail("default_prompt_name", f"({show(default)}) is not one of the prompts")
    return prompts, default


class _Modules:
    """The modules of a sentence-transformers model, in order: the last word of each one's type, and its directory.

    paths: the same by that word.
    """

    def __init__(self, entries: list[tuple[str, Path]], file: Path | None = None) -> None:
        self._entries = entries
        self.paths = dict(entries)
        self._file = file

    @classmethod
    def read(cls, directory: Path) -> _Modules:
        """None are named where there is no modules.json."""
        file = directory / "modules.json"
        if not file.exists():
            return cls([])
        try:
            given: Any = json.loads(file.read_bytes())
            entries = [(str(entry["type"]).rsplit(".", 1)[-1], directory / str(entry["path"])) for entry in given]
        except (OSError, ValueError, TypeError, KeyError):
            raise StartupError(f"{file}: must be a list of objects with `type` and `path`") from None
        if any(not path.resolve().is_relative_to(directory.resolve()) for _, path in entries):
            raise StartupError(f"{file}: a path leads out of the directory")
        return cls(entries, file)

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
                f"{fields.path}: pooling by {shown} is not supported, only by one of {', '.join(_MODES)}; --pooling "
                "forces one of these, --runner generate serves the model without embeddings"
            )
        if not fields.flag("include_prompt", True):
            fields.fail("include_prompt", "is false, which is not supported: the tokens of a prompt are pooled, too")
        return str(modes[0])

    def projections(self, width: int) -> tuple[Projection, ...]:
        """Of the Dense modules. A vector goes through these and no others; last of all it may be scaled."""
        found: list[Projection] = []
        kinds = [kind for kind, _ in self._entries]
        for place, (kind, path) in enumerate(self._entries):
            if kind == "Dense":
                found.append(self._dense(path, width))
                width = found[-1].size
            at = {"Transformer": 0, "Pooling": 1, "Dense": place, "Normalize": len(kinds) - 1}.get(kind)
            if at != place or (kind == "Dense" and place < 2):
                why = "is not supported" if at is None else "is not supported in this place"
                raise StartupError(
                    f"{self._file}: the module {kind} {why}; --runner generate serves the model without embeddings"
                )
        return tuple(found)

    def _dense(self, path: Path, width: int) -> Projection:
        fields = Fields.read(path / "config.json")
        if fields.integer("in_features") != width:
            fields.fail("in_features", f"must be {width}, as many numbers as there are before it")
        given = fields.raw("activation_function") or "torch.nn.modules.activation.Tanh"
        activation = _ACTIVATIONS.get(str(given).rsplit(".", 1)[-1])
        if activation is None:
            fields.fail("activation_function", f"({show(given)}) must be one of {', '.join(_ACTIVATIONS)}")
        assert self._file is not None
        name = path.relative_to(self._file.parent).as_posix()
        return Projection(f"{name}.linear", fields.integer("out_features"), fields.flag("bias", True), activation)


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
