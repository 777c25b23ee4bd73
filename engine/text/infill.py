"""Fill in the middle: the tokens that a model was trained to read a hole by, told by their names, and its prompt.

Pure. Callers bring the ids of what stands before and behind the hole, and of other files that may help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.text.tokenizer import Tokenizer

# By their place in a prompt, the names that families have for them: Qwen Coder and CodeGemma, StarCoder and Granite,
# SantaCoder, DeepSeek Coder, GLM-4.5, CodeLlama.
_PREFIXES = (
    "<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<｜fim▁begin｜>", "<|code_prefix|>", "▁<PRE>", "<PRE>",
)  # fmt: skip
_SUFFIXES = (
    "<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<｜fim▁hole｜>", "<|code_suffix|>", "▁<SUF>", "<SUF>",
)  # fmt: skip
_MIDDLES = (
    "<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<｜fim▁end｜>", "<|code_middle|>", "▁<MID>", "<MID>",
)  # fmt: skip
_PADS = ("<|fim_pad|>", "<fim_pad>", "<fim-pad>")
_REPOSITORIES = ("<|repo_name|>", "<|fim_repo|>", "<reponame>", "<repo_name>")
_FILES = ("<|file_sep|>", "<|file_separator|>", "<file_sep>", "<filename>")
# Codestral says what is behind the hole first, and has no mark for the hole itself.
_MISTRAL = ("[SUFFIX]", "[PREFIX]")
# The end of a middle that was taken for a whole text.
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "▁<EOT>", "<EOT>", "<eot_id>")
# Of the room, the part that the text before the hole gets where not all of it fits.
_PREFIX_SHARE = 3 / 4


@dataclass(frozen=True, slots=True)
class Infill:
    """A family's marks as token ids. middle: None where the prefix comes last and begins the answer.

    repository, file: what a list of other files and each of them begin with; None where a family has none. ends:
    tokens that end a middle.
    """

    prefix: int
    suffix: int
    middle: int | None
    repository: int | None
    file: int | None
    ends: tuple[int, ...]

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> Infill | None:
        """None for a model without such tokens."""

        def first(names: Sequence[str]) -> int | None:
            return next((found for name in names if (found := tokenizer.token_to_id(name)) is not None), None)

        # All three of one family: another's single one may be there for another purpose.
        for names in zip(_PREFIXES, _SUFFIXES, _MIDDLES, strict=True):
            ids = [tokenizer.token_to_id(name) for name in names]
            if None not in ids:
                prefix, suffix, middle = (found for found in ids if found is not None)
                break
        else:
            last_two = [tokenizer.token_to_id(name) for name in _MISTRAL]
            if last_two[0] is None or last_two[1] is None:
                return None
            suffix, prefix, middle = last_two[0], last_two[1], None
        repository, file = first(_REPOSITORIES), first(_FILES)
        marks = [prefix, suffix, middle, first(_PADS), repository, file, *map(tokenizer.token_to_id, _TEXT_ENDS)]
        ends = tuple(dict.fromkeys(mark for mark in marks if mark is not None))
        return cls(prefix, suffix, middle, repository, file, ends)

    def prompt(
        self,
        before: list[int],
        behind: list[int],
        *,
        room: int | None = None,
        extra: Sequence[int] = (),
        begin: Sequence[int] = (),
    ) -> list[int]:
        """What the model reads. room: most tokens of it; where it is too small what is far from the hole is left out,
        `extra` first. extra: other files, see `files`. begin: goes before everything, as BOS does."""
        if room is not None:
            room = max(0, room - len(begin) - 3)
            if len(before) + len(behind) > room:
                behind = behind[: max(room - len(before), room - int(room * _PREFIX_SHARE))]
                before = before[max(0, len(before) - (room - len(behind))) :]
            extra = extra[max(0, len(extra) - (room - len(before) - len(behind))) :]
        hole = [self.suffix, *behind, self.prefix, *before]
        if self.middle is not None:
            hole = [self.prefix, *before, self.suffix, *behind, self.middle]
        return [*begin, *extra, *hole]

    def files(self, files: Sequence[tuple[str, str]]) -> list[int | str]:
        """Names and texts of other files as marks and texts between them."""
        pieces: list[int | str] = []
        if not files:
            return pieces
        if self.repository is not None:
            pieces += [self.repository, "project\n"]
        for name, text in files:
            pieces += [f"\n\n--- {name} ---\n\n{text}\n"] if self.file is None else [self.file, f"{name}\n{text}\n"]
        if self.repository is not None and self.file is not None:
            # The file with the hole, whose name nobody has told.
            pieces += [self.file, "filename\n"]
        return pieces
