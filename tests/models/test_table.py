"""The README's table of classes is the one that these tests have seen."""

from __future__ import annotations

from pathlib import Path

from tests.models.table import compared, rows, table

# Others by another name: their text part, or all of them, is one that is compared.
ALIKE = {"AyaVision": "Cohere2Vision", "Glm46V": "Glm4v", "New": "Gte", "VipLlava": "Llava"}


def test_every_class_is_compared_and_in_the_readme() -> None:
    names = {name for each in rows().values() for name in each}
    assert names - compared() == ALIKE.keys() and set(ALIKE.values()) <= compared()
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert table() in readme, "python -m tests.models.table prints it"
