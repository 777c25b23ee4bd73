"""Weights from a directory of this machine, whatever the trainer that names it calls it."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from engine.config import StartupError
from server.protocol.body import invalid
from server.protocol.errors import ApiError, without_paths
from server.state import STATE


async def take_directory(request: web.Request, path: str, name: str, mode: str, version: str | None) -> None:
    """Serve with a checkpoint of the served architecture. name: of the field that says where it is. mode, version: see
    Resting.load_weights. Raises ApiError; then the old weights go on serving."""
    directory = _within(path, request.app[STATE].options.weights_root, name)
    try:
        await request.app[STATE].engine.load_weights(directory, mode=mode, version=version)
    except StartupError as error:
        raise ApiError(400, f"The weights were not taken: {without_paths(str(error))}", param=name) from None
    except OSError as error:  # a name that is too long, a directory that may not be looked into
        raise ApiError(400, f"The weights were not taken: {error.strerror}.", param=name) from None


def _within(path: str, root: str | None, name: str) -> Path:
    """A client's path as a directory under --weights-root. Raises the 403 for any other; links do not lead out."""
    if root is None:
        raise ApiError(403, "This server takes no other weights: it was started without --weights-root.")
    if "\0" in path:
        raise invalid(name, "must be a directory on the server's machine")
    try:
        top = Path(root).resolve(strict=True)
        directory = (top / path).resolve()
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        raise invalid(name, "must be a directory under --weights-root") from None
    if not directory.is_relative_to(top):
        raise ApiError(403, f"`{name}` must be a directory under --weights-root.", param=name)
    return directory
