"""--kv-disk and what belongs to it. Imports no numpy."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.config import StartupError, TierOptions

FLAG = "--kv-disk"


def add_flags(parser: argparse.ArgumentParser) -> None:
    default = TierOptions()
    group = parser.add_argument_group("pages on the disk")
    group.add_argument(
        FLAG,
        metavar="DIR",
        help="keep the KV cache's pages of prompts there, and recurrent states: a server that starts again, or another "
        "one, reads them",
    )
    group.add_argument(
        "--kv-disk-gb", type=float, metavar="GB", help=f"of 1e9 bytes, at most ({default.max_bytes / 1e9:g})"
    )
    group.add_argument(
        "--kv-disk-timeout",
        type=float,
        metavar="S",
        help=f"what has not been read by then is computed ({default.timeout_s:g})",
    )


def options_from(args: argparse.Namespace) -> TierOptions:
    """Raises StartupError."""
    if args.kv_disk is None:
        for name in ("kv_disk_gb", "kv_disk_timeout"):
            if getattr(args, name) is not None:
                raise StartupError(f"--{name.replace('_', '-')} is of {FLAG} DIR")
        return TierOptions()
    given = TierOptions(directory=Path(args.kv_disk).expanduser())
    size = given.max_bytes if args.kv_disk_gb is None else args.kv_disk_gb * 1e9
    timeout = given.timeout_s if args.kv_disk_timeout is None else args.kv_disk_timeout
    if not 1e6 <= size <= 1e18:
        raise StartupError(f"--kv-disk-gb must be at least 0.001, not {args.kv_disk_gb:g}")
    if not 0 < timeout <= 3600:
        raise StartupError(f"--kv-disk-timeout must be above 0 and at most 3600 seconds, not {timeout:g}")
    return TierOptions(given.directory, int(size), timeout)
