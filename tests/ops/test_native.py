"""engine/ops/native.py: building, caching, falling back, and one OpenMP runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.ops import native
from engine.ops.norm import rms_norm

ROOT = Path(__file__).parents[2]
REPORT = """
from engine.ops import native
print(native.status())
print(len(native.openmp_runtimes()))
print(native.library().path if native.library() else None)
"""


def run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_threads_come_from_torchs_runtime(kernels: native.Library) -> None:
    torch.set_num_threads(2)
    rms_norm(torch.randn(4096, 512), torch.ones(512), 1e-5)
    assert kernels.has_openmp
    assert kernels.release.ol_threads(3) == 3
    assert len(native.openmp_runtimes()) == 1


def test_switched_off_by_environment() -> None:
    status, _, path = run(ONELOOP_NO_NATIVE="1")
    assert status == "torch (ONELOOP_NO_NATIVE is set)"
    assert path == "None"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The module as before its first use; undone afterwards."""
    monkeypatch.setattr(native, "_tried", False)
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_status", "not loaded")
    return monkeypatch


def test_no_compiler(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.setenv("PATH", str(tmp_path))
    assert native.library() is None
    assert native.status() == "torch (no C++ compiler found)"


def test_compiler_that_fails(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cannot do this' >&2\nexit 1\n")
    compiler.chmod(0o755)
    unloaded.setenv("CXX", str(compiler))
    unloaded.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library() is None
    assert "failed to build" in native.status() and "cannot do this" in native.status()
    assert not list((tmp_path / "oneloop").iterdir()), "nothing half made is left behind"


def test_cache_is_used(kernels: native.Library, unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "oneloop"
    cache.mkdir()
    built = cache / kernels.path.name
    built.write_bytes(kernels.path.read_bytes())
    before = built.stat().st_mtime_ns
    unloaded.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = native.library()
    assert found is not None and found.path == built
    assert built.stat().st_mtime_ns == before


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert native._cache_dir().is_dir()


def test_disabled_is_undone(kernels: native.Library) -> None:
    with native.disabled():
        assert native.library() is None
        assert native.status().startswith("torch")
    assert native.library() is kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_unknown_dtypes_fall_back(dtype: torch.dtype) -> None:
    assert native.type_code(dtype) is None
    assert rms_norm(torch.ones(2, 8, dtype=dtype), torch.ones(8, dtype=dtype), 1e-6).dtype == dtype
