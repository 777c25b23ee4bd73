"""Compiles kernels.cpp at first use, loads it through ctypes and hands out its functions.

Called by the ops of this folder, on any thread. No torch headers: one build, of half a minute, serves every
torch. Without a compiler (or with ONELOOP_NO_NATIVE=1) `library()` is None and the ops fall back to torch;
`status()` is the line that the start-up table shows.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
_PARTS = ("kv", "packed", "packed8", "state", "lora", "encoder", "ranks")
INCLUDED = tuple(Path(__file__).with_name(f"kernels_{name}.h") for name in _PARTS)
# GCC sums integers as a tree when left to itself: every product is then a register, and most of them go to the stack.
FLAGS = (
    *("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=off", "-fno-tree-reassoc"),
    *("-fPIC", "-fvisibility=hidden", "-Wno-psabi"),
)
FLOAT32, BFLOAT16 = 0, 1
# Units of work (elements touched, or multiplications / 8) under which a call keeps the GIL: about 20 us. Giving it up
# for less invites the event loop to take it, and taking it back then costs up to a switch interval (5 ms).
HOLD_GIL_BELOW = 100_000

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ol_vector_lanes": (_I, []),
    "ol_threads": (_I, [_I]),
    "ol_multiplies_bf16": (_I, []),
    "ol_packed_size": (_I, [_I, _I, _I]),
    "ol_pack_weight": (None, [_I, _P, _I, _I, _P, _I]),
    "ol_unpack_rows": (None, [_I, _P, _I, _P, _I, _I, _P, _I]),
    "ol_linear": (None, [_I, _P, _I, _I, _I, _P, _I, _P, _P, _I, _I, _I]),
    "ol_codes_size": (_I, [_I, _I, _I]),
    "ol_pack_codes": (None, [_I, _P, _P, _I, _I, _P, _I]),
    "ol_code_rows": (None, [_I, _I, _P, _I, _P, _I, _I, _P, _I]),
    "ol_linear_codes": (None, [_I, _I, _P, _I, _I, _I, _P, _I, _P, _P, _I, _I]),
    "ol_takes_eight_bits": (_I, [_I]),
    "ol_packed_blocks": (_I, [_I, _I, _I]),
    "ol_pack_blocks": (_I, [_I, _P, _I, _I, _P, _I]),
    "ol_block_rows": (None, [_I, _I, _P, _I, _P, _I, _I, _P, _I]),
    "ol_linear_blocks": (None, [_I, _I, _P, _I, _I, _I, _P, _I, _P, _P, _I, _I]),
    "ol_linear_heads": (None, [_I, _P, _I, _I, _I, _I, _P, _I, _I, _P, _I, _I, _I]),
    "ol_rms_norm": (None, [_I, _P, _I, _P, _I, _I, _P, _P, _I, _I, _I, _F, _I]),
    "ol_layer_norm": (None, [_I, _P, _I, _P, _I, _P, _P, _P, _I, _I, _F, _I]),
    "ol_activate": (None, [_I, _P, _I, _P, _I, _I, _I, _I]),
    "ol_encode": (None, [_P, _P, _P, _I, _I]),
    "ol_copy_rows": (None, [_P, _I, _I, _I, _P]),
    "ol_gate_and_mul": (None, [_I, _P, _I, _P, _I, _I, _I, _I]),
    "ol_rope": (None, [_I, _P, _I, _I, _I, _I, _P, _I, _P, _I, _I]),
    "ol_attention": (None, [_P, _P, _I, _P, _I, _P, _I, _P, _P, _P, _I, _I, _P, _P, _I]),
    "ol_convolve": (None, [_P, _I, _P, _I, _P, _P, _I, _P, _P, _I, _I, _I, _I]),
    "ol_recur": (
        None,
        [_P, _I, _I, *(_P, _I) * 5, _P, _P, _P, _P, _I, _P, _I, _I, _I, _I, _F, _F, _F, _I],
    ),
    "ol_gate": (None, [_I, _P, _I, _P, _I, _P, _I, _I, _I, _I]),
    "ol_gated_norm": (None, [_I, _P, _I, _P, _I, _P, _I, _P, _I, _I, _I, _F, _I, _I]),
    "ol_lora": (None, [_I, _P, _I, _I, _P, _I, _P, _P, _I, _P, _P, _I, _I]),
    "ol_sample": (None, [_P, _I, _I, _P, _P, _P, _I]),
    "ol_process": (None, [_P, _I, _P, _I, _P, _P, _P, _I]),
    "ol_normalise": (None, [_P, _I, _P, _I, _I, _P, _P, _P, _I]),
    "ol_ranks": (None, [_P, _I, _P, _I, _P, _P, _I]),
    "ol_word_post": (None, [_P, _I]),
    "ol_word_wait": (_I, [_P, _I, _P]),
    "ol_ranks_end": (None, [_P]),
    "ol_ranks_arrive": (None, [_P]),
    "ol_ranks_meet": (_I, [_P, _I]),
    "ol_ranks_sum": (_I, [_P, _I, _P, _P, _I, _I, _P, _I]),
    "ol_ranks_go_on": (_I, [_P, _I, _P, _P, _I, _I, _P]),
    "ol_entry": (_P, [ctypes.c_char_p]),
    "ol_replay": (_I, [_P, _I]),
    "ol_read": (ctypes.c_double, [_P, _I, _I]),
    "ol_fma": (ctypes.c_double, [_I, _I]),
}


def argument_kinds(name: str) -> list[object]:
    """Types of a kernel's arguments."""
    return _SIGNATURES[name][1]


class Library:
    """The functions of kernels.cpp, twice: `hold` keeps the GIL, `release` gives it up for the time of the call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hold: ctypes.PyDLL = ctypes.PyDLL(str(path))
        self.release: ctypes.CDLL = ctypes.CDLL(str(path))
        for handle in (self.hold, self.release):
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(handle, name)
                function.restype, function.argtypes = result, arguments
        self.lanes: int = self.hold.ol_vector_lanes()
        self.multiplies_bf16: bool = bool(self.hold.ol_multiplies_bf16())
        # By name: addresses by which `ol_replay` calls a kernel; of those that it can.
        found = {name: self.hold.ol_entry(name.encode()) for name in _SIGNATURES}
        self.entries: dict[str, int] = {name: entry for name, entry in found.items() if entry}
        self.has_openmp: bool = self.release.ol_threads(2) == 2

    def by_work(self, work: int) -> ctypes.PyDLL | ctypes.CDLL:
        """The handle for a call of that size (HOLD_GIL_BELOW)."""
        return self.hold if work < HOLD_GIL_BELOW else self.release


_lock = threading.Lock()
_tried = False
_library: Library | None = None
_status = "not loaded"
_disabled = 0


def library() -> Library | None:
    """The compiled kernels; the first call compiles and loads them. None where that is not possible."""
    if _disabled:
        return None
    if not _tried:
        with _lock:
            if not _tried:
                _load()
    return _library


def status() -> str:
    """One line for the start-up table: what runs the CPU ops, and why."""
    found = library()
    if _disabled:
        return "torch (native kernels are switched off)"
    if found is None:
        return f"torch ({_status})"
    return _status


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run everything by torch inside the block (tests)."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


def type_code(dtype: torch.dtype) -> int | None:
    """How the kernels call this storage; None when they do not know it."""
    return FLOAT32 if dtype == torch.float32 else BFLOAT16 if dtype == torch.bfloat16 else None


def cpu_flags() -> frozenset[str]:
    """Features of the processor as the kernel names them (avx2, avx512f, avx512_bf16, amx_bf16, ...)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes loaded in this process; more than one would mean two thread pools."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    names = ("libgomp", "libomp", "libiomp")
    return sorted(path for path in paths if Path(path).name.startswith(names))


def _load() -> None:
    global _tried, _library, _status
    try:
        if os.environ.get("ONELOOP_NO_NATIVE", "") not in ("", "0"):
            _status = "ONELOOP_NO_NATIVE is set"
            return
        compiler = next(
            filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "c++", "clang++"))), None
        )
        if compiler is None:
            _status = "no C++ compiler found"
            return
        # torch's own runtime, made global: the library is linked without one and takes these symbols.
        runtimes = openmp_runtimes()
        if runtimes:
            ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)
        try:
            found = Library(_compiled(compiler, openmp=bool(runtimes)))
        except OSError as error:  # symbols that this runtime does not have: one thread then
            logger.warning("native kernels without OpenMP: %s", error)
            found = Library(_compiled(compiler, openmp=False))
        _library = found
        bits, several = 32 * found.lanes, openmp_runtimes()
        _status = f"native ({bits}-bit vectors, {'OpenMP' if found.has_openmp else 'one thread'})"
        if len(several) > 1:
            _status += f"; {len(several)} OpenMP runtimes are loaded: {', '.join(several)}"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _status = f"the native kernels failed to build: {error}"
        logger.warning("%s", _status)
    finally:
        _tried = True


def _cache_dir() -> Path:
    """The user's cache, or a private temporary folder where that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "oneloop"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="oneloop-"))


def _compiled(compiler: str, *, openmp: bool) -> Path:
    """Path of the shared object, built unless this source, compiler, machine and flags were built before."""
    source = b"\0".join(path.read_bytes() for path in (SOURCE, *INCLUDED))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    flags = (*FLAGS, "-fopenmp") if openmp else FLAGS
    machine = " ".join((platform.machine(), *sorted(cpu_flags())))
    key = hashlib.sha256(b"\0".join((source, version, " ".join(flags).encode(), machine.encode()))).hexdigest()[:20]
    target = _cache_dir() / f"kernels-{key}.so"
    if target.exists():
        return target
    start = time.perf_counter()
    logger.info("compiling the CPU kernels, once for this machine: half a minute or more")
    # Concurrent starts each build their own and the last rename wins: all are equal.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        obj, shared = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", str(obj)],
            [compiler, "-shared", str(obj), "-o", str(shared)],  # no -fopenmp: torch's runtime serves
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise OSError(f"{compiler}: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        os.replace(shared, target)
    logger.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - start, target)
    return target
