"""Hand-over: a new process takes the listening socket of the one that serves, which then answers what it has and ends.

`--handover unix:PATH`, the same for both. The socket itself passes through a Unix socket (SCM_RIGHTS), so connections
that wait in the kernel are accepted by whoever comes next, and none is refused. Only processes of the same user get it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable

from engine.config import StartupError

_GREETING, _SERVING = b"oneloop listens\n", b"serving\n"
# Of the other process, which has nothing to do but to answer.
_TIMEOUT_S = 10.0
MAX_PATH = 100


def path_of(given: str) -> str:
    """The path in "unix:PATH". Raises StartupError for anything else."""
    scheme, _, path = given.partition(":")
    if scheme != "unix" or not path.startswith("/") or len(os.fsencode(path)) > MAX_PATH or "\0" in path:
        raise StartupError(f"--handover: '{given}' is not unix:/PATH with a path of at most {MAX_PATH} bytes")
    return path


class Taken:
    """A listening socket from another process. `serving` tells that process that it may stop."""

    def __init__(self, listening: socket.socket, control: socket.socket) -> None:
        self.listening = listening
        self._control = control

    def serving(self) -> None:
        with contextlib.suppress(OSError), self._control:
            self._control.sendall(_SERVING)


def take(path: str) -> Taken | None:
    """Ask the process at `path` for its socket; None where there is none. Blocks."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.settimeout(_TIMEOUT_S)
    try:
        control.connect(path)
        _check_peer(control)
        greeting, fds, _, _ = socket.recv_fds(control, len(_GREETING), 1)
        if greeting != _GREETING or len(fds) != 1:
            raise StartupError(f"--handover: what listens at {path} has no socket to give")
        return Taken(socket.socket(fileno=fds[0]), control)
    except OSError as error:
        control.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return None
        raise StartupError(f"--handover: {path}: {error.strerror or 'no answer'}") from None
    except StartupError:
        control.close()
        raise


def _check_peer(control: socket.socket) -> None:
    """Raises PermissionError where another user is at the other end."""
    _, uid, _ = struct.unpack("3i", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid != os.getuid():
        raise PermissionError(errno.EPERM, "another user's process")


class Offer:
    """Gives a listening socket to whoever asks at `path`, and closes it in the end. on_taken: called once, on a thread
    of its own."""

    def __init__(self, path: str, listening: socket.socket, on_taken: Callable[[], object]) -> None:
        self._path = path
        self._listening = listening
        self._on_taken = on_taken
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                if not _is_socket(path):
                    raise StartupError(f"--handover: {path} is there, and no socket")
                os.unlink(path)
            before = os.umask(0o177)
            try:
                self._control.bind(path)
            finally:
                os.umask(before)
            self._control.listen(1)
            self._inode = os.stat(path).st_ino
        except (OSError, StartupError) as error:
            self._control.close()
            if isinstance(error, StartupError):
                raise
            raise StartupError(f"--handover: {path}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._serve, name="handover", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                other, _ = self._control.accept()
            except OSError:
                return  # closed
            with other, contextlib.suppress(OSError):
                other.settimeout(_TIMEOUT_S)
                _check_peer(other)
                socket.send_fds(other, [_GREETING], [self._listening.fileno()])
                # One that goes before it serves has changed nothing.
                if other.recv(len(_SERVING)) == _SERVING:
                    self._on_taken()
                    return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            # Wakes up `accept`, which closing alone does not.
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        self._listening.close()
        # Another process may have its own there by now.
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.stat(path).st_mode)
