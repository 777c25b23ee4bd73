"""From a path or a Hugging Face id to a directory with a model in it. Called once at start.

Only data is ever fetched (safetensors, GGUF, JSON, templates); no code of a repository is downloaded or run.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from engine.config import StartupError
from engine.models.gguf.reader import find_gguf, is_gguf, model_name

ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
# Folders hold other formats of the same weights (original/, onnx/); so do Mistral's consolidated files.
IGNORE_PATTERNS = ["*/*", "consolidated*.safetensors"]

# Of several files of one model what most people take.
USUAL = "Q4_K_M"

# Names that are no ids, and how the model of each is had: the Makefile knows smollm2, and demo is the bundled model's.
SHORT_NAMES = {"smollm2": "make serve MODEL=smollm2", "demo": "make serve without MODEL"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_WANTED = re.compile(r"[\w.-]{1,64}")


def resolve(path_or_id: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory of a model, or its GGUF file: `path_or_id` itself where it is one, else a snapshot from the hub.

    An id may end in `:WORD`, which chooses among GGUF files (owner/name:Q8_0).
    revision: branch, tag or commit on the hub. download_dir: a cache in place of the usual one. Files that the
    cache holds are not fetched again, and with HF_HUB_OFFLINE=1 nothing is. Raises StartupError.
    """
    if not path_or_id:
        raise StartupError("no model is named; give a directory or a Hugging Face id")
    path = Path(path_or_id).expanduser()
    try:
        is_directory = path.is_dir()
    except OSError as error:  # a name that is too long, a directory that is closed to us
        raise StartupError(f"{_shown(path_or_id)}: {error.strerror}") from error
    if is_directory:
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
        raise StartupError(f"{_shown(str(path))}: no such file")
    repository, colon, wanted = path_or_id.partition(":")
    if not _HUB_ID.fullmatch(repository) or (colon and not _WANTED.fullmatch(wanted)):
        raise StartupError(f"{_shown(path_or_id)}: no such directory, and not a Hugging Face id (owner/name)")
    # The hub knows old names without an owner; what is all but a short name is that one, misspelt.
    near = [] if "/" in repository else get_close_matches(repository.lower(), SHORT_NAMES, 1)
    if near:
        raise StartupError(_no_such_name(path_or_id, near[0]))
    try:
        return _download(repository, wanted, revision, download_dir)
    except StartupError:
        raise
    except Exception as error:  # the hub's own errors, HTTP, disk: a start that fails, whatever it was
        # A word is hardly one of the hub's old names without an owner, of which something might be here.
        is_word = "/" not in repository
        owner = "; old names may need their owner (owner/name)" if is_word else ""
        raise StartupError(f"{path_or_id}: no such directory, and {_why(error, revision, is_word)}{owner}") from error


def _shown(name: str) -> str:
    """A name as a line can hold it."""
    return name if len(name) <= 255 else f"{name[:100]}...{name[-100:]}"


def _no_such_name(name: str, near: str) -> str:
    if name in SHORT_NAMES:
        return f"{name}: no such directory or file; the model of this name is served by {SHORT_NAMES[name]}"
    known = " and ".join(f"{short} ({how})" for short, how in SHORT_NAMES.items())
    return (
        f"{name}: no such directory or file, and not a Hugging Face id (owner/name). Did you mean {near}? "
        f"Short names are {known}"
    )


def _why(error: Exception, revision: str | None, brief: bool) -> str:
    """Why nothing came from the hub, whose own errors are of several lines and addresses. brief: not what is here."""
    at = f" at revision {revision}" if revision else ""
    reason = " ".join(str(error).split()) or type(error).__name__
    failed = f"the download{at} from the Hugging Face hub failed: {type(error).__name__}: {reason[:200]}"
    if isinstance(error, ImportError):  # the hub's library may be what cannot be imported
        return failed
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "the Hugging Face hub gives it only to who has agreed to its terms there, with a token (HF_TOKEN)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hugging Face hub has no such model, or shows it only with another token (HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hugging Face hub has no revision {revision} of it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        # Raised whenever no list of files came, by what the hub answered as well.
        silent = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face hub cannot be reached"
        if brief:
            return _answer(error) or silent
        if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):  # not in all versions
            here = "what is here of it is incomplete"
        else:
            here = "nothing of this revision is here from before"
        return f"{_answer(error) or silent}, and {here}"
    return failed


def _answer(error: BaseException | None) -> str:
    """What the hub answered, where its answer caused an error; else empty."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError) and (response := getattr(error, "response", None)) is not None:
            status: int = response.status_code
            hints = {403: " (this token may not read it)", 429: " (too many requests; try later)"}
            hint = " (try later)" if status >= 500 else hints.get(status, "")
            return f"the Hugging Face hub answered {status}{hint}"
        error = error.__cause__
    return ""


def _download(repository: str, wanted: str, revision: str | None, cache_dir: str | None) -> Path:
    """wanted: of several GGUF files the one whose name has this word; the repository is then read for that alone."""
    import huggingface_hub

    if not wanted:
        directory = Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=ALLOW_PATTERNS,
                ignore_patterns=IGNORE_PATTERNS,
            )
        )
        if any(directory.glob("*.safetensors")):
            return directory
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return find_gguf(directory) or directory
    files = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
    chosen = choose_files(repository, files, wanted)
    if not chosen:
        return directory
    found = huggingface_hub.snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=chosen)
    return Path(found) / chosen[0]


def choose_files(repository: str, files: list[str], wanted: str) -> list[str]:
    """The GGUF file of a repository, or all its parts: the only one, that with the word `wanted`, or else that of
    USUAL. Empty where there is none and none is wanted. Raises StartupError.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(files):
        if is_gguf(Path(name)) and not Path(name).name.startswith(("mmproj", "mtp-")):
            models.setdefault(str(Path(name).parent / model_name(Path(name))), []).append(name)
    fitting = list(models)
    if wanted or len(models) > 1:
        word = re.compile(rf"(^|[-._/]){re.escape(wanted or USUAL)}($|[-._/])", re.IGNORECASE)
        fitting = [name for name in models if word.search(name)]
    if not models and not wanted:
        return []
    if len(fitting) != 1:
        words = ", ".join(sorted(Path(name).name for name in models)[:20]) or "none"
        raise StartupError(
            f"{repository}: {'no' if not fitting else 'more than one'} GGUF file is named {wanted or USUAL}; say "
            f"{repository}:WORD with a word that one name alone has. There are: {words}"
        )
    return models[fitting[0]]
