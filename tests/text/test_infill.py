"""Fill in the middle: the marks of real families by their names, and prompts that fit."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers.models import WordLevel

from engine.text.infill import Infill
from engine.text.tokenizer import Tokenizer


def with_tokens(*names: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, names[0])))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("x", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), (1, 3, 2)),
        (("x", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"), (1, 3, 2)),
        (("x", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), (1, 2, 3)),
        (("x", "▁<PRE>", "▁<SUF>", "▁<MID>"), (1, 2, 3)),
        (("x", "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"), (1, 3, 2)),
        (("x", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"), (1, 3, None)),
        (("x", "<fim_prefix>", "<|fim_suffix|>", "<fim_middle>"), None),
        (("x", "<SUF>", "[SUFFIX]"), None),
    ],
)
def test_marks_are_told_by_name(names: tuple[str, ...], found: tuple[int, int, int | None] | None) -> None:
    infill = Infill.find(with_tokens(*names))
    assert (None if infill is None else (infill.prefix, infill.suffix, infill.middle)) == found
    if infill is not None:
        assert {infill.prefix, infill.suffix} <= set(infill.ends)


MARKS = Infill(100, 101, 102, None, None, ())


def test_a_prompt() -> None:
    assert MARKS.prompt([1, 2], [3]) == [100, 1, 2, 101, 3, 102]
    assert MARKS.prompt([], [], begin=[9], extra=[7]) == [9, 7, 100, 101, 102]
    assert Infill(100, 101, None, None, None, ()).prompt([1, 2], [3]) == [101, 3, 100, 1, 2]


@pytest.mark.parametrize("room", range(3, 40))
def test_what_is_far_from_the_hole_goes_first(room: int) -> None:
    before, behind, extra = [*range(16)], [*range(20, 28)], [*range(30, 40)]
    prompt = MARKS.prompt(before, behind, extra=extra, room=room)
    assert len(prompt) == min(room, 37)
    start, middle = prompt.index(100), prompt.index(101)
    kept, left, right = prompt[:start], prompt[start + 1 : middle], prompt[middle + 1 : -1]
    assert left == before[len(before) - len(left) :] and right == behind[: len(right)]
    assert kept == extra[len(extra) - len(kept) :]
    if kept:
        assert (left, right) == (before, behind)
    elif len(left) < len(before) and len(right) < len(behind):
        assert len(right) * 2 <= len(left) + 2
    assert MARKS.prompt(before, [], room=room)[1:-2] == before[max(0, 16 - (room - 3)) :]


def test_other_files_go_before() -> None:
    files = [("a.py", "x"), ("b.py", "y")]
    assert MARKS.files([]) == [] and MARKS.files(files) == ["\n\n--- a.py ---\n\nx\n", "\n\n--- b.py ---\n\ny\n"]
    qwen = Infill(1, 2, 3, 4, 5, ())
    assert qwen.files(files) == [4, "project\n", 5, "a.py\nx\n", 5, "b.py\ny\n", 5, "filename\n"]
