"""The model's own defaults for sampling: generation_config.json, or metadata of a GGUF file. Read once at start.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.models.fields import Fields
from engine.models.gguf.reader import GGUF, is_gguf, open_gguf


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The model's own sampling defaults; None where generation_config.json says nothing.

    As vLLM does, only these fields count and `do_sample` is ignored. top_k: 0 is off.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> GenerationDefaults:
        """Read `directory/generation_config.json`; a missing file means no defaults. Raises StartupError."""
        if is_gguf(directory):
            return cls._of_gguf(open_gguf(directory))
        path = directory / "generation_config.json"
        if not path.exists():
            return cls()
        fields = Fields.read(path)
        top_k = fields.optional_integer("top_k", minimum=-1)
        return cls(
            temperature=fields.optional_number("temperature", minimum=0.0),
            top_p=fields.optional_number("top_p", above=0.0, maximum=1.0),
            top_k=None if top_k is None else max(top_k, 0),
            min_p=fields.optional_number("min_p", minimum=0.0, maximum=1.0),
            repetition_penalty=fields.optional_number("repetition_penalty", above=0.0),
            max_new_tokens=fields.optional_integer("max_new_tokens", minimum=1),
            eos_token_ids=fields.token_ids("eos_token_id"),
        )

    @classmethod
    def _of_gguf(cls, model: GGUF) -> GenerationDefaults:
        """What newer files recommend under `general.sampling`; where answers end, their spec says."""
        prefix = "general.sampling."
        names = ("temp", "top_p", "top_k", "min_p", "penalty_repeat")
        fields = Fields(model.path, {name: model.get(prefix + name) for name in names}, prefix)
        top_k = fields.optional_integer("top_k", minimum=-1)
        return cls(
            temperature=fields.optional_number("temp", minimum=0.0),
            top_p=fields.optional_number("top_p", above=0.0, maximum=1.0),
            top_k=None if top_k is None else max(top_k, 0),
            min_p=fields.optional_number("min_p", minimum=0.0, maximum=1.0),
            repetition_penalty=fields.optional_number("penalty_repeat", above=0.0),
        )
