"""--kv-disk and what belongs to it, --kv-host-gb. Imports no numpy."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.config import StartupError, TierOptions

FLAG, HOST_FLAG = "--kv-disk", "--kv-host-gb"


def add_flags(parser: argparse.ArgumentParser) -> None:
    default = TierOptions()
    group = parser.add_argument_group("pages in host memory and on the disk")
    group.add_argument(
        FLAG,
        metavar="DIR",
        help="keep the KV cache's pages of prompts there, and recurrent states: a server that starts again, or another "
        "one, reads them",
    )
    group.add_argument(
        HOST_FLAG,
        type=float,
        metavar="GB",
        help="of 1e9 bytes of page-locked host memory, for what leaves a GPU's KV cache (0: none)",
    )
    group.add_argument(
        "--kv-disk-gb", type=float, metavar="GB", help=f"of 1e9 bytes, at most (default: {default.max_bytes / 1e9:g})"
    )
    group.add_argument(
        "--kv-disk-timeout",
        type=float,
        metavar="S",
        help=f"what has not been read by then is computed (default: {default.timeout_s:g})",
    )


def options_from(args: argparse.Namespace) -> TierOptions:
    """Raises StartupError."""
    host = args.kv_host_gb or 0.0
    if host and not 0.001 <= host <= 1e6:
        raise StartupError(f"{HOST_FLAG} must be 0 or at least 0.001, not {host:g}")
    if args.kv_disk is None:
        if args.kv_disk_gb is not None:
            raise StartupError(f"--kv-disk-gb is of {FLAG} DIR")
        if args.kv_disk_timeout is not None and not host:
            raise StartupError(f"--kv-disk-timeout is of {FLAG} DIR")
    given = TierOptions(None if args.kv_disk is None else Path(args.kv_disk).expanduser())
    size = given.max_bytes if args.kv_disk_gb is None else args.kv_disk_gb * 1e9
    timeout = given.timeout_s if args.kv_disk_timeout is None else args.kv_disk_timeout
    if not 1e6 <= size <= 1e18:
        raise StartupError(f"--kv-disk-gb must be at least 0.001, not {args.kv_disk_gb:g}")
    if not 0 < timeout <= 3600:
        raise StartupError(f"--kv-disk-timeout must be above 0 and at most 3600 seconds, not {timeout:g}")
    return TierOptions(given.directory, int(size), timeout, int(host * 1e9))
