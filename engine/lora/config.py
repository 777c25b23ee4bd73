"""adapter_config.json: what of it changes the arithmetic, and what asks for arithmetic that is not had here.

The file comes from strangers: every field that is used is checked, and a field that would change the answer in a way
that is not known is an error and never ignored. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.lora.words import AdapterError

NAME = "adapter_config.json"
# A resolved list of all modules of a large mixture of experts has 1 MB.
MAX_BYTES = 16 << 20
MAX_RANK = 65536
MAX_PATTERN = 512
_SHOWN = 80

# Keys that change the arithmetic when they are set, and how.
_REFUSED = {
    "alora_invocation_tokens": "an activated adapter (aLoRA) counts from its invocation tokens on alone",
    "layer_replication": "layers that are repeated make another model",
    "use_bdlora": "block-diagonal factors (BD-LoRA) are not computed here",
    "use_qalora": "factors over groups of inputs (QALoRA) are not computed here",
    "kasa_config": "it cuts singular values off the base's weights (KaSA)",
    "arrow_config": "it chooses among several adapters for each token (Arrow)",
    "monteclora_config": "its factors are drawn at random (MonteCLoRA)",
}
# Beginnings of `init_lora_weights` that change the base's weights; the others set A and B alone, which the file has.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KNOWN_USES = {"use_dora", "use_rslora", "use_qalora", "use_bdlora"}
# What takes long in a regular expression: a group that is repeated, a repetition that is, and many of them.
_SLOW = re.compile(r"[)*+?}][*+{]|([*+{].*){4}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """rank, alpha: of a module that no pattern names. patterns: (regular expression, value) in the file's order.

    token_ids: by module, of trainable tokens; under "" those of whatever the embedding is called. targets: parameters
    that were named as such (target_parameters). ensure_tying: a tied output layer follows the embedding.
    """

    adapter: str
    rank: int
    alpha: float
    by_root: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    dora: bool
    token_ids: Mapping[str, tuple[int, ...]]
    targets: tuple[str, ...]
    ensure_tying: bool
    base_model_name: str

    def rank_of(self, module: str) -> int:
        """Of a module by its path in transformers' model."""
        return next((value for key, value in self.rank_pattern if _matches(key, module)), self.rank)

    def scaling_of(self, module: str, rank: int) -> float:
        """The factor on B A. rank: what the module's own is."""
        alpha = next((value for key, value in self.alpha_pattern if _matches(key, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _matches(key: str, module: str) -> bool:
    """As peft has it: a pattern is the end of a path, from a dot on."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def read_config(directory: Path, adapter: str) -> AdapterConfig:
    """Of an adapter's directory. adapter: what it is called in errors. Raises AdapterError."""
    path = directory / NAME
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise AdapterError(f"adapter {adapter}: {NAME} is no file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"adapter {adapter}: {NAME} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise AdapterError(f"adapter {adapter}: {NAME} is longer than {MAX_BYTES} bytes")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise AdapterError(f"adapter {adapter}: {NAME} is no JSON object")
    return _Reader(adapter, values).config()


class _Reader:
    def __init__(self, adapter: str, values: dict[str, Any]) -> None:
        self._adapter, self._values = adapter, values

    def fail(self, key: str, reason: str) -> AdapterError:
        value = json.dumps(self._values.get(key))
        value = value if len(value) <= _SHOWN else value[: _SHOWN - 3] + "..."
        return AdapterError(f"adapter {self._adapter}: {NAME}: {key} = {value}: {reason}")

    def config(self) -> AdapterConfig:
        values = self._values
        kind = values.get("peft_type", "LORA")
        if kind != "LORA":
            raise self.fail("peft_type", "only LORA is served")
        for key, reason in _REFUSED.items():
            if values.get(key):
                raise self.fail(key, reason)
        for key, value in values.items():
            if key.startswith("use_") and key not in _KNOWN_USES and value:
                raise self.fail(key[:_SHOWN], "is not known here")
        init = values.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_CHANGING_BASE):
            raise self.fail("init_lora_weights", "the adapter is for base weights that this changed; convert it with "
                            "path_initial_model_for_weight_conversion of peft's save_pretrained")  # fmt: skip
        if values.get("bias", "none") not in ("none", "lora_only", "all", None):
            raise self.fail("bias", "must be none, lora_only or all")
        base = values.get("base_model_name_or_path")
        return AdapterConfig(
            adapter=self._adapter,
            rank=self._rank("r", values.get("r", 8)),
            alpha=self._number("lora_alpha", values.get("lora_alpha", 8)),
            by_root=self._flag("use_rslora"),
            rank_pattern=tuple(
                (key, self._rank("rank_pattern", value)) for key, value in self._patterns("rank_pattern")
            ),
            alpha_pattern=tuple(
                (key, self._number("alpha_pattern", value)) for key, value in self._patterns("alpha_pattern")
            ),
            dora=self._flag("use_dora"),
            token_ids=self._token_ids(),
            targets=self._names("target_parameters"),
            ensure_tying=self._flag("ensure_weight_tying"),
            base_model_name=base if isinstance(base, str) else "",
        )

    def _flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value not in (None, True, False):
            raise self.fail(key, "must be true or false")
        return bool(value)

    def _rank(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_RANK:
            raise self.fail(key, f"a rank must be an integer from 1 to {MAX_RANK}")
        return value

    def _number(self, key: str, value: object) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not abs(float(value)) < 1e30:  # type: ignore[arg-type]
            raise self.fail(key, "must be a number")
        return float(value)  # type: ignore[arg-type]

    def _patterns(self, key: str) -> list[tuple[str, object]]:
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, dict):
            raise self.fail(key, "must be an object")
        for pattern in value:
            if len(pattern) > MAX_PATTERN or _SLOW.search(pattern):
                raise self.fail(key, "has a pattern that could take for ever")
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError):
                raise self.fail(key, "has a key that is no regular expression") from None
        return list(value.items())

    def _names(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        value = [value] if isinstance(value, str) else value
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.fail(key, "must be a list of names")
        return tuple(value)

    def _token_ids(self) -> dict[str, tuple[int, ...]]:
        key = "trainable_token_indices"
        value = self._values.get(key)
        if not value:
            return {}
        by_module = {"": value} if isinstance(value, list) else value
        if not isinstance(by_module, dict):
            raise self.fail(key, "must be a list of token ids, or lists by module")
        for ids in by_module.values():
            if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
                raise self.fail(key, "must have token ids")
            if len(set(ids)) != len(ids):
                raise self.fail(key, "has a token id twice")
        return {module: tuple(ids) for module, ids in by_module.items()}
