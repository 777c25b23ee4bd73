"""One exposition of Prometheus metrics made of several replicas' own: each sample says whose it is."""

from __future__ import annotations

from collections.abc import Iterable


def merge(expositions: Iterable[tuple[str, str]]) -> str:
    """expositions: a replica's name and its text each. A family's help and type are told once, as the format wants."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in expositions:
        label = f'replica="{replica}"'
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                kind = line.split(" ", 2)[1]
                if not any(told.split(" ", 2)[1] == kind for told in head):
                    head.append(line)
            elif line and not line.startswith("#"):
                name, bracket, rest = line.partition("{")
                if bracket:
                    line = f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
                else:
                    name, _, value = line.partition(" ")
                    line = f"{name}{{{label}}} {value}"
                samples.setdefault(family, []).append(line)
    return "".join(f"{line}\n" for family in samples for line in (*heads.get(family, ()), *samples[family]))
