"""Paths and hub ids; the hub itself is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from engine.config import StartupError
from engine.models.hub import resolve


def test_directory_is_used_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "no model is named; give a directory or a Hugging Face id"),
        ("/no/such/place", "/no/such/place: no such directory, and not a Hugging Face id (owner/name)"),
        ("./model", "./model: no such directory, and not a Hugging Face id (owner/name)"),
        ("a/b/c", "a/b/c: no such directory, and not a Hugging Face id (owner/name)"),
        ("owner/..", "owner/..: no such directory, and not a Hugging Face id (owner/name)"),
    ],
)
def test_not_a_model(name: str, expected: str) -> None:
    with pytest.raises(StartupError) as caught:
        resolve(name)
    assert str(caught.value) == expected


def test_file_instead_of_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(StartupError, match="is a file; a model is a directory"):
        resolve(str(path))


def test_download_asks_for_data_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", "abc", "/cache") == tmp_path
    assert asked == {
        "name": "owner/name",
        "revision": "abc",
        "cache_dir": "/cache",
        "allow_patterns": ["*.safetensors", "*.json", "*.jinja"],
        "ignore_patterns": ["*/*", "consolidated*.safetensors"],
    }


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), ValueError(""), RuntimeError("x" * 1000)])
def test_download_that_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(StartupError) as caught:
        resolve("owner/name", "v2")
    message = str(caught.value)
    assert message.startswith(
        "owner/name: not a directory, and the download at revision v2 from the Hugging Face hub failed: "
        + type(error).__name__
    )
    assert "\n" not in message and len(message) < 500
