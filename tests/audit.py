"""`python -m tests.audit`: whether a known hole is in what is installed for serving; a part of `make check`.

All packages that ours requires, with theirs, go to osv.dev in one question (--url: a mirror of it). Without a network
the answer is of KNOWN alone, which is looked at in any case: holes in what clients' bytes reach. Exits with 1 where one
is found that is not in ACCEPTED.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.metadata
import json
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Set
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

OSV = "https://api.osv.dev/v1/querybatch"
# By package: the first version without it, and its name.
KNOWN = {
    "aiohttp": ("3.12.14", "CVE-2025-53643: requests smuggled in trailers"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a template leaves the sandbox by |attr"),
    "orjson": ("3.9.15", "CVE-2024-27454: deeply nested JSON overflows the stack"),
    "torch": ("2.6.0", "CVE-2025-32434: torch.load runs code with weights_only"),
}
# By name: why it does not concern us.
ACCEPTED: dict[str, str] = {}


def installed(requirements: list[str]) -> dict[str, str]:
    """Versions by name of all that these bring here, themselves included."""
    found: dict[str, str] = {}
    todo = [one for one in map(Requirement, requirements) if _applies(one, set())]
    # The same package may be asked for again with more extras.
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = distribution.version.partition("+")[0]
        todo += [one for one in map(Requirement, distribution.requires or []) if _applies(one, extras)]
    return found


def _applies(requirement: Requirement, extras: Set[str]) -> bool:
    """extras: those that the package which requires it is wanted with."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})


def known(versions: dict[str, str]) -> list[tuple[str, str]]:
    """Packages and holes of KNOWN."""
    return [
        (name, told)
        for name, (good, told) in KNOWN.items()
        if name in versions and Version(versions[name]) < Version(good)
    ]


def ask(url: str, versions: dict[str, str], timeout_s: float) -> list[tuple[str, str]]:
    """Packages and holes as OSV knows them. Raises OSError where it cannot be asked, ValueError or HTTPException
    for no such answer."""
    names = list(versions)
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": versions[name]} for name in names]
    request = urllib.request.Request(
        url, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        told = json.load(answer)
    try:
        results = told["results"]
        return [
            (name, hole["id"])
            for name, one in zip(names, results, strict=True)
            for hole in (one or {}).get("vulns", [])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer of OSV's: {error!r}") from None


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default=OSV)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds")
    parser.add_argument("--offline", action="store_true", help="do not ask")
    arguments = parser.parse_args(words)
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    versions = installed(project["dependencies"])
    found, source = known(versions), "known here"
    if not arguments.offline:
        try:
            found += ask(arguments.url, versions, arguments.timeout)
            source = "known to OSV"
        except (OSError, ValueError, http.client.HTTPException) as error:
            print(f"audit: OSV could not be asked: {error}", file=sys.stderr)
    found = [(name, hole) for name, hole in found if hole.partition(":")[0] not in ACCEPTED]
    for name, hole in found:
        print(f"audit: {name} {versions[name]}: {hole}", file=sys.stderr)
    print(f"audit: {len(versions)} packages, {len(found)} holes {source}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
