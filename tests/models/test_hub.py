"""Paths and hub ids; the hub itself is replaced."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from engine.config import StartupError
from engine.models.hub import choose_files, resolve


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

    (tmp_path / "model.safetensors").touch()
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
        "owner/name: no such directory, and the download at revision v2 from the Hugging Face hub failed: "
        + type(error).__name__
    )
    assert "\n" not in message and len(message) < 500


def of_hub(kind: type[Exception]) -> Exception:
    """One of the hub's own, as long as they are, without the response that some of them ask for."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error.\n\nRepository Not Found for url: https://huggingface.co/api/models/owner/name.\n",)
    return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.GatedRepoError, "the Hugging Face hub gives it only to who has agreed to its terms there, with a"),
        (errors.RepositoryNotFoundError, "the Hugging Face hub has no such model, or shows it only with another token"),
        (errors.RevisionNotFoundError, "the Hugging Face hub has no revision v2 of it"),
        (
            errors.LocalEntryNotFoundError,
            "the Hugging Face hub cannot be reached, and nothing of this revision is here",
        ),
    ],
)
def test_what_the_hub_says_is_one_line(kind: type[Exception], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise of_hub(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(StartupError) as caught:
        resolve("owner/name", "v2")
    message = str(caught.value)
    assert message.startswith(f"owner/name: no such directory, and {expected}")
    assert "\n" not in message and "http" not in message


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A hub on this machine; what is put in here is the status that it answers with."""
    statuses: list[int] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield statuses
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (403, " (this token may not read it)"),
        (429, " (too many requests; try later)"),
        (500, " (try later)"),
        (503, " (try later)"),
        (418, ""),
    ],
)
def test_a_hub_that_answers_can_be_reached(status: int, hint: str, answers: list[int], tmp_path: Path) -> None:
    answers.append(status)
    with pytest.raises(StartupError) as caught:
        resolve("owner/name", "v2", str(tmp_path))
    assert str(caught.value) == (
        f"owner/name: no such directory, and the Hugging Face hub answered {status}{hint}, and nothing of this "
        "revision is here from before"
    )


@pytest.mark.parametrize(
    ("offline", "answered", "silent"),
    [
        (False, True, "the Hugging Face hub answered 503 (try later)"),
        (False, False, "the Hugging Face hub cannot be reached"),
        (True, False, "HF_HUB_OFFLINE is set"),
    ],
)
def test_part_of_a_model_is_here(offline: bool, answered: bool, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Incomplete(errors.LocalEntryNotFoundError):
        """As newer versions of the hub's library have it."""

    class Response:
        status_code = 503

        def __bool__(self) -> bool:  # as requests has it, which older versions use
            return False

    def download(name: str, **options: Any) -> str:
        cause: Exception = ConnectionError("refused")
        if answered:
            answer = of_hub(errors.HfHubHTTPError)
            answer.response = Response()  # type: ignore[attr-defined]
            cause = RuntimeError("of several causes")
            cause.__cause__ = answer
        raise Incomplete("Some\nfiles of http://hub are missing") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(errors, "IncompleteSnapshotError", Incomplete, raising=False)
    with pytest.raises(StartupError) as caught:
        resolve("owner/name")
    assert str(caught.value) == f"owner/name: no such directory, and {silent}, and what is here of it is incomplete"
    monkeypatch.delattr(errors, "IncompleteSnapshotError")
    with pytest.raises(StartupError, match="nothing of this revision is here from before"):
        resolve("owner/name")


def test_of_a_word_it_is_not_said_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise of_hub(errors.LocalEntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(StartupError) as caught:
        resolve("nosuch")
    assert str(caught.value) == (
        "nosuch: no such directory, and the Hugging Face hub cannot be reached; "
        "old names may need their owner (owner/name)"
    )


def test_without_the_hubs_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StartupError) as caught:
        resolve("owner/name", "v2")
    assert str(caught.value).startswith(
        "owner/name: no such directory, and the download at revision v2 from the Hugging Face hub failed: "
        "ModuleNotFoundError: import of huggingface_hub halted"
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [("smolm2", "smollm2"), ("SmolLM", "smollm2"), ("dmeo", "demo"), ("smolm2:Q8_0", "smollm2")],
)
def test_a_mistyped_name_is_not_asked_of_the_hub(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise AssertionError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(StartupError) as caught:
        resolve(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: no such directory or file, and not a Hugging Face id (owner/name). ")
    assert f"Did you mean {meant}?" in message
    assert message.endswith("smollm2 (make serve MODEL=smollm2) and demo (make serve without MODEL)")


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "roberta-base", "distilgpt2", "t5-small"])
def test_an_old_name_without_an_owner_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(tmp_path)

    def refuse(name: str, **options: Any) -> str:
        raise of_hub(errors.RepositoryNotFoundError)

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(name) == tmp_path and asked == [name]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(StartupError) as caught:
        resolve(name)
    assert str(caught.value) == (
        f"{name}: no such directory, and the Hugging Face hub has no such model, or shows it only with another token "
        "(HF_TOKEN); old names may need their owner (owner/name)"
    )
    with pytest.raises(StartupError) as caught:
        resolve(f"owner/{name}")
    assert str(caught.value).endswith("(HF_TOKEN)")


def test_an_old_name_is_found_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--gpt2" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert resolve("gpt2", "a" * 40, str(tmp_path)) == snapshot


@pytest.mark.parametrize("name", ["x" * 256, "x" * 100_000, "owner/" + "x" * 256, "é" * 200])
def test_a_name_that_is_too_long_is_one_line(name: str) -> None:
    with pytest.raises(StartupError) as caught:
        resolve(name)
    message = str(caught.value)
    assert message.startswith(name[:100]) and len(message) < 300 and "\n" not in message


def test_the_bundled_model_is_no_id() -> None:
    with pytest.raises(StartupError) as caught:
        resolve("demo")
    assert str(caught.value).endswith("; the model of this name is served by make serve without MODEL")


def test_a_short_name_is_the_makefiles() -> None:
    with pytest.raises(StartupError) as caught:
        resolve("smollm2")
    assert str(caught.value).endswith("; the model of this name is served by make serve MODEL=smollm2")
    assert "MODEL=smollm2" in (Path(__file__).parents[2] / "Makefile").read_text()


FILES = [
    "README.md",
    "mmproj-F16.gguf",
    "Model-7B-Q4_K_M.gguf",
    "Model-7B-Q8_0.gguf",
    "Model-7B-Q4_K_S.gguf",
    "BF16/Model-7B-BF16-00002-of-00002.gguf",
    "BF16/Model-7B-BF16-00001-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("files", "wanted", "expected"),
    [
        (FILES, "", ["Model-7B-Q4_K_M.gguf"]),
        (FILES, "q8_0", ["Model-7B-Q8_0.gguf"]),
        (FILES, "BF16", ["BF16/Model-7B-BF16-00001-of-00002.gguf", "BF16/Model-7B-BF16-00002-of-00002.gguf"]),
        (["only.gguf", "config.json"], "", ["only.gguf"]),
        (["config.json"], "", []),
        (FILES, "Q4", "more than one GGUF file is named Q4; say owner/name:WORD"),
        (FILES, "Q5_K_M", "no GGUF file is named Q5_K_M; say owner/name:WORD"),
        (FILES, "7B", "more than one GGUF file is named 7B"),
        (["a-Q2_K.gguf", "a-Q8_0.gguf"], "", "no GGUF file is named Q4_K_M"),
        (["config.json"], "Q8_0", "There are: none"),
    ],
)
def test_one_of_several_gguf_files(files: list[str], wanted: str, expected: list[str] | str) -> None:
    if isinstance(expected, list):
        assert choose_files("owner/name", files, wanted) == expected
        return
    with pytest.raises(StartupError) as caught:
        choose_files("owner/name", files, wanted)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"), [("owner/name", "Model-7B-Q4_K_M.gguf"), ("owner/name:Q8_0", "Model-7B-Q8_0.gguf")]
)
def test_gguf_from_the_hub(name: str, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(repository: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: FILES)
    assert resolve(name) == tmp_path / file
    # What is for transformers is looked for first, unless a file is named.
    assert asked == [["*.safetensors", "*.json", "*.jinja"]] * (":" not in name) + [[file]]
    with pytest.raises(StartupError, match="not a Hugging Face id"):
        resolve("owner/name:../x")
