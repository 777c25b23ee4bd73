"""From a path or a Hugging Face id to a directory with a model in it. Called once at start.

Only data is ever fetched (safetensors, JSON, templates); no code of a repository is downloaded or run.
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.config import StartupError
from engine.models.gguf.reader import find_gguf, is_gguf

ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
# Folders hold other formats of the same weights (original/, onnx/); so do Mistral's consolidated files.
IGNORE_PATTERNS = ["*/*", "consolidated*.safetensors"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def resolve(path_or_id: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory of a model: `path_or_id` itself where it is one, else a snapshot from the hub.

    revision: branch, tag or commit on the hub. download_dir: a cache in place of the usual one. Files that the
    cache holds are not fetched again, and with HF_HUB_OFFLINE=1 nothing is. Raises StartupError.
    """
    if not path_or_id:
        raise StartupError("no model is named; give a directory or a Hugging Face id")
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        # What is for transformers goes first: it is what other formats were made from.
        if not any(path.glob("*.safetensors")) and (found := find_gguf(path)) is not None:
            return found
        return path
    if path.is_file() and is_gguf(path):
        return path
    if path.exists():
        raise StartupError(
            f"{path}: is a file; a model is a directory with config.json and safetensors files, or a GGUF file"
        )
    if is_gguf(path):
        raise StartupError(f"{path}: no such file")
    if not _HUB_ID.fullmatch(path_or_id):
        raise StartupError(f"{path_or_id}: no such directory, and not a Hugging Face id (owner/name)")
    try:
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(
                path_or_id,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=ALLOW_PATTERNS,
                ignore_patterns=IGNORE_PATTERNS,
            )
        )
    except Exception as error:  # the hub's own errors, HTTP, disk: a start that fails, whatever it was
        reason = " ".join(str(error).split()) or type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise StartupError(
            f"{path_or_id}: not a directory, and the download{at} from the Hugging Face hub failed: "
            f"{type(error).__name__}: {reason[:300]}"
        ) from error
