"""bench.structured: the figures that need no large model come out, and jump-ahead saves what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import structured


def test_masks_and_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = structured.made_up_tokenizer(4000)
    assert made.vocab_size == 4256 and made.decode(made.encode('{"a b": 12}')) == '{"a b": 12}'
    monkeypatch.setattr(structured, "made_up_tokenizer", lambda: made)
    monkeypatch.setattr(structured, "EOS", 4001)
    path = tmp_path / "rows.json"
    assert structured.main(["masks", "jump", "--repeat", "1", "--json", str(path)]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["mask: person"]["tokens"] > 20 and rows["mask: all"]["us"]["mean"] > 0
    off, on = rows["jump-ahead off"], rows["jump-ahead on"]
    assert on["tokens"] == off["tokens"] <= off["forwards"] and on["forwards"] < off["forwards"] / 4
