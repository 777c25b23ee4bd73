"""Whether two models' tokens are the same ones, and which are, by their strings. Used at start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from engine.config import StartupError
from engine.models.gguf.reader import is_gguf, open_gguf


def token_strings(directory: Path) -> dict[str, int] | None:
    """Every token's string and id; None where the model brings no tokenizer."""
    if is_gguf(directory):
        tokens = open_gguf(directory).get("tokenizer.ggml.tokens")
        return None if tokens is None else {str(token): index for index, token in enumerate(tokens)}
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"{path}: {error}") from error
    return vocabulary


class VocabularyMap:
    """Ids of a draft model and of its target. A token that the other lacks is -1 in `to_target`, and 0 in `to_draft`:
    the draft model then reads something else, and guesses worse."""

    def __init__(self, to_target: npt.NDArray[np.int32], to_draft: npt.NDArray[np.int32]) -> None:
        self.to_target, self.to_draft = to_target, to_draft

    @classmethod
    def by_strings(cls, target: dict[str, int], draft: dict[str, int], sizes: tuple[int, int]) -> VocabularyMap:
        """sizes: of the target's and the draft's vocabulary."""
        to_target = np.full(sizes[1], -1, np.int32)
        to_draft = np.zeros(sizes[0], np.int32)
        for text, own in draft.items():
            other = target.get(text)
            if other is not None and own < sizes[1] and other < sizes[0]:
                to_target[own], to_draft[other] = other, own
        return cls(to_target, to_draft)

    @classmethod
    def by_ids(cls, sizes: tuple[int, int]) -> VocabularyMap:
        """Ids that both have are the same tokens; one of the two has more."""
        to_target = np.arange(sizes[1], dtype=np.int32)
        to_draft = np.arange(sizes[0], dtype=np.int32)
        return cls(np.where(to_target < sizes[0], to_target, -1), np.where(to_draft < sizes[1], to_draft, 0))


def map_vocabularies(target: Path, draft: Path, sizes: tuple[int, int], *, by_strings: bool) -> VocabularyMap | None:
    """None: both are the same. sizes: rows of the target's and the draft's embedding. Raises StartupError."""
    own, other = token_strings(target), token_strings(draft)
    if own is None or other is None:
        if by_strings:
            raise StartupError(f"{target if own is None else draft}: a vocabulary map needs its tokenizer.json")
        if sizes[0] != sizes[1]:
            raise StartupError(
                f"the draft model {draft} has another vocabulary: {sizes[1]} tokens in config.json, not {sizes[0]}"
            )
        return None
    differing = next((text for text in sorted(own, key=own.__getitem__) if other.get(text) != own[text]), None)
    if differing is None:
        return None if sizes[0] == sizes[1] else VocabularyMap.by_ids(sizes)
    if not by_strings:
        raise StartupError(
            f"the draft model {draft} has another vocabulary: token {differing!r} is {own[differing]} in the model's "
            f"tokenizer, {other.get(differing)} in the draft's (use_heterogeneous_vocab maps tokens by their strings)"
        )
    found = VocabularyMap.by_strings(own, other, sizes)
    if not (found.to_target >= 0).any():
        raise StartupError(f"the draft model {draft} shares no token with the model")
    return found
