"""The house keeps its shape: import arrows point down only (read from the source by `ast`, nothing is run)."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOT_WORDS = {"config", "clock", "request", "forward", "stream", "metrics", "groups", "failures", "keys", "recorder"}
ROOT_WORDS |= {"addresses", "page_names", "history", "bounds"}
# What each part may import of ours, beside itself and the words at the root.
ALLOWED = {
    "engine.words": set(),
    "engine.cache": set(),
    # Of features that decide in a step: what the step has to know of them.
    "engine.scheduling": {"engine.cache", "engine.lora.places", "engine.speculation.rows"},
    "engine.text": set(),
    "engine.ops": {"engine.executor.tables"},
    # What a model is, what computes it, where its tensors come from: families and parts do not know each other.
    "engine.models": set(),
    "engine.models.fields": set(),
    "engine.models.mixers": set(),
    "engine.models.spec": {"engine.models.mixers"},
    "engine.models.families": {"engine.models.fields", "engine.models.mixers", "engine.models.spec"},
    "engine.models.gguf": {"engine.models.fields", "engine.models.mixers", "engine.models.spec"},
    "engine.models.registry": {
        "engine.models.fields",
        "engine.models.mixers",
        "engine.models.spec",
        "engine.models.families",
        "engine.models.gguf",
        "engine.models.quantisation",
    },
    "engine.models.quantisation": {"engine.models.fields", "engine.models.spec", "engine.models.families"},
    "engine.models.generation": {"engine.models.fields", "engine.models.gguf"},
    "engine.models.abilities": {
        "engine.models.fields",
        "engine.models.mixers",
        "engine.models.spec",
        "engine.models.gguf",
    },
    "engine.models.hub": {"engine.models.gguf"},
    "engine.models.offload": set(),
    "engine.models.parts": {"engine.models.mixers", "engine.models.spec", "engine.ops"},
    "engine.models.loading": {
        "engine.later",
        "engine.models.parts",
        "engine.models.fields",
        "engine.models.mixers",
        "engine.models.spec",
        "engine.models.gguf",
        "engine.models.registry",
        "engine.ops",
    },
    "engine.speculation": {"engine.models", "engine.ops", "engine.executor.tables"},
    "engine.lora": {"engine.models", "engine.ops"},
    "engine.executor": {"engine.lora", "engine.models", "engine.ops", "engine.report", "engine.speculation"},
    # What takes a device's place where several processes share a model.
    "engine.distributed": {"engine.executor", "engine.models", "engine.ops", "engine.report", "engine.speculation"},
    "engine.admission": {"engine.scheduling"},
    "engine.books": {"engine.cache"},
    "engine.pace": {"engine.process"},
    "engine.process": {"engine.later"},
    "engine.later": set(),
    "engine.publisher": {"engine.lora.tally", "engine.pace", "engine.scheduling", "engine.text"},
    "engine.grammar_masks": {"engine.scheduling", "engine.publisher", "engine.executor.base"},
    "engine.lending": {"engine.cache", "engine.scheduling"},
    "engine.transfer": {"engine.cache", "engine.scheduling", "engine.executor.base", "engine.lending"},
    "engine.tiers": {"engine.cache", "engine.scheduling", "engine.executor.base", "engine.lending"},
    "engine.misses": {"engine.cache"},
    "engine.carriers": {
        "engine.scheduling",
        "engine.executor.base",
        "engine.lending",
        "engine.publisher",
        "engine.tiers",
        "engine.transfer",
    },
    "engine.resting": {
        "engine.scheduling",
        "engine.publisher",
        "engine.executor.base",
        "engine.carriers",
        "engine.lending",
        "engine.lora.store",
    },
    # What trainers send becomes a checkpoint; the group that it comes over is loaded when there is one.
    "engine.updates": {"engine.resting", "engine.models.loading.checkpoint", "engine.distributed.trainer"},
    "engine.inspection": {"engine.scheduling", "engine.cache", "engine.publisher"},
    "engine.engine": {
        "engine.scheduling",
        "engine.text",
        "engine.executor.base",
        "engine.admission",
        "engine.books",
        "engine.pace",
        "engine.publisher",
        "engine.grammar_masks",
        "engine.resting",
        "engine.inspection",
        "engine.lora.store",
        "engine.lora.tally",
        "engine.speculation.budgets",
    },
    "engine.draft_flags": set(),
    "engine.flags": {
        *("engine.draft_flags", "engine.logprob_flags", "engine.lora.flags", "engine.tiers.flags"),
        *("engine.transfer.flags", "engine.server_flags", "engine.flag_types"),
    },
    "engine.server_flags": {"engine.flag_types"},
    "engine.flag_types": set(),
    "engine.logprob_flags": set(),
    "engine.watchdog": set(),
    "engine.report": set(),
    "engine.build": {"engine"},
    "engine.loop_thread": {"engine"},
    "engine.llm": {"engine"},
    "engine.quantise": {"engine.models"},
    "engine.kernels": {"engine"},
    "server": {
        "engine.engine",
        "engine.updates",
        "engine.resting",
        "engine.inspection",
        "engine.watchdog",
        "engine.process",
        "engine.misses",
        "engine.text",
        "engine.models.mixers",
        "engine.models.spec",
        "engine.models.generation",
        "engine.models.abilities",
        "engine.lora.store",
        "engine.lora.words",
    },
    "engine.demo": {"engine.models", "engine.ops", "engine.text", "engine.executor"},
    "engine.serve": {"*"},
    "engine.serve_ray": {"*"},
    # The engine under somebody else's front.
    "engine.integrations": {"*"},
    "bench": {"*"},
}
# build.py puts the device wing together, inside its functions.
TORCH_ALLOWED = (
    "engine.build",
    "engine.kernels",
    "engine.distributed.collectives",
    "engine.distributed.device_rank",
    "engine.distributed.device_start",
    "engine.distributed.leader",
    "engine.distributed.rank",
    "engine.distributed.start",
    "engine.distributed.trainer",
    "engine.executor.cpu",
    "engine.executor.cuda",
    "engine.executor.drafting",
    "engine.executor.pooling",
    "engine.executor.speculator",
    "engine.lora.base",
    "engine.lora.files",
    "engine.lora.reader",
    "engine.models.loading",
    "engine.models.offload",
    "engine.models.parts",
    "engine.ops",
    "engine.speculation.draft",
    "engine.speculation.eagle3",
    "engine.speculation.hidden",
    "engine.speculation.mtp",
    "engine.speculation.nets",
    "engine.speculation.paged",
    "engine.demo",
    "bench",
)
NO_ASYNCIO = ("engine.scheduling", "engine.cache")


def modules() -> list[tuple[str, Path]]:
    found = []
    for top in ("engine", "server", "bench"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every imported module, also inside functions; imports under TYPE_CHECKING do not run and do not count."""
    names: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                continue  # an expression, which holds no statement
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative imports are not used here"
                assert child.module is not None
                names.add(child.module)
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(ast.parse(path.read_text()))
    return frozenset(names)


def part_of(module: str) -> str:
    pieces = module.split(".")
    if pieces[0] != "engine":
        return pieces[0]
    if len(pieces) == 1 or pieces[1] in ROOT_WORDS:
        return "engine.words"
    return ".".join(pieces[: 3 if pieces[1] == "models" and len(pieces) > 2 else 2])


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_imports_point_down(module: str, path: Path) -> None:
    part = part_of(module)
    assert part in ALLOWED, f"{module} belongs to no known part: name it in ALLOWED"
    allowed = ALLOWED[part]
    for name in imports(path):
        if name.split(".")[0] in ("engine", "server", "bench") and "*" not in allowed:
            target = part_of(name)
            fine = target in (part, "engine.words") or any(starts_with(name, one) for one in allowed)
            # `from engine.executor import base` yields the package name first; the second name is the real one.
            fine = fine or any(one.startswith(name + ".") for one in allowed)
            assert fine, f"{module} must not import {name}"
        if name.split(".")[0] == "torch":
            assert any(module.startswith(one) for one in TORCH_ALLOWED), f"{module} must not import torch"
        if name.split(".")[0] == "asyncio":
            assert not any(starts_with(module, one) for one in NO_ASYNCIO), f"{module} must not import asyncio"


def test_no_circles() -> None:
    """No module needs itself, by any way and not even inside a function."""
    known = {module for module, _ in modules()}
    needs = {module: imports(path) & known - {module} for module, path in modules()}
    while leaves := {module for module, others in needs.items() if not others & needs.keys()}:
        for module in leaves:
            del needs[module]
    assert not needs, f"these import each other in a circle, or import such a circle: {sorted(needs)}"


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def test_the_core_is_read_in_a_morning() -> None:
    parts = ("engine.engine", "engine.scheduling", "engine.cache")
    assert sum(lines_of(path) for module, path in modules() if part_of(module) in parts) < 4000


def test_no_file_is_long() -> None:
    """But for the words that the bundled model is trained on."""
    too_long = [module for module, path in modules() if lines_of(path) > 600 and module != "engine.demo.corpus"]
    assert not too_long, f"split these where a reader would: {too_long}"


def test_what_mypy_does_not_check_it_does_not_report() -> None:
    """A module that is excluded as a file but reported as an import is so by turns: as mypy's cache has it."""
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    excluded, silent = re.compile("|".join(mypy["exclude"])), mypy["overrides"][0]["module"]
    left = [name for name, path in modules() if excluded.search(path.relative_to(ROOT).as_posix())]
    assert left
    for name in left:
        assert any(name == one or (one.endswith(".*") and starts_with(name, one[:-2])) for one in silent), name


def test_package_inits_are_empty() -> None:
    for module, path in modules():
        if path.name == "__init__.py":
            assert not path.read_text().strip(), f"{module}/__init__.py must stay empty: `import engine` costs nothing"


@pytest.mark.parametrize(
    "statement",
    ["import engine.scheduling.scheduler", "import engine.engine", "import engine.llm", "import server.app"],
)
def test_thinking_wing_and_server_run_without_torch(statement: str) -> None:
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Packages that a start may import beside torch (which is more than half of a start's imports) and what torch imports.
# What a flag or a route needs of others is imported when it is asked for. Modules: 254 of these when this was written.
START_PACKAGES = {
    *("aiohappyeyeballs", "aiohttp", "aiosignal", "attr", "frozenlist", "idna", "jinja2", "llguidance", "markupsafe"),
    *("multidict", "numpy", "orjson", "prometheus_client", "propcache", "tokenizers", "uvloop", "yarl"),
    *("_distutils_hack", "attrs", "typing_extensions"),
}
MOST_START_MODULES = 300


def test_start_keeps_its_import_budget() -> None:
    code = (
        "import sys, sysconfig\nbefore = set(sys.modules)\n"
        "import engine.flags, engine.build, engine.report, server.app, server.serving, uvloop\n"
        "packages = sysconfig.get_path('purelib'), sysconfig.get_path('platlib')\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name not in before and (getattr(module, '__file__', None) or '').startswith(packages):\n"
        "        print(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split()
    assert "aiohttp" in names, "nothing was seen"
    assert {name.partition(".")[0] for name in names} <= START_PACKAGES
    assert len(names) <= MOST_START_MODULES


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['serve', '--help']\n"
        "try:\n    runpy.run_module('engine.serve', run_name='__main__')\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "--max-model-len" in done.stdout
