"""Which weights wrote a page: all bytes count, and nothing but what is in the files."""

from __future__ import annotations

from pathlib import Path

from engine.transfer.fingerprint import fingerprint


def test_every_byte_counts(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    data = bytes(9 << 20)
    for directory in (one, other):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(data)
    assert fingerprint(one, 1) == fingerprint(other, 1) != fingerprint(other, 2)
    # Between two samples.
    (other / "model.safetensors").write_bytes(data[:100_000] + b"x" + data[100_001:])
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one, whole=False) == fingerprint(other, whole=False)
