"""Runs a command where no other machine can be reached: `python -m tests.agents.loopback COMMAND ...`.

Namespaces of its own, with no network but loopback and with processes that all end with the command, need no
privileges on most Linux machines. Where they cannot be made the command does not run: agents look for updates, report
home, and leave daemons behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_OPTIONS = ("--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _IFF_UP).ljust(40, b"\0"))
        os.execvp(sys.argv[2], sys.argv[2:])
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, *_OPTIONS, "true"], capture_output=True).returncode:
        print("A namespace is needed (Linux with unshare and user namespaces); agents were not tried.")
        return 1
    os.execv(unshare, [unshare, *_OPTIONS, sys.executable, "-m", "tests.agents.loopback", "--inside", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
