"""What `engine.kernels check` says of a kit, whose libraries a C compiler makes here in no time."""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from engine import kernels
from engine.executor.cuda_kit import Target, write_kit
from engine.executor.kernel_library import CUBIN, FAT_BINARY, read_library

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
PTX = 1
# How the entry of a cubin begins: kind, its version, bytes of its header.
ENTRY = struct.pack("<HHI", CUBIN, 0x101, 64)
# As long as it must be for the rest to be found.
CODE = b"\x7fELF code of a GPU.."


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """(kind, architecture) of each piece of code."""
    code = CODE.ljust(-(-len(CODE) // 8) * 8, b"\0")
    body = b""
    for kind, architecture in entries:
        head = struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(code), 0, 0, 0, 0, architecture)
        body += head.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", FAT_BINARY, 1, 16, len(body)) + body


@functools.cache
def library(
    functions: tuple[str, ...] = ("plan", "paged_run"),
    entries: tuple[tuple[int, int], ...] = ((CUBIN, 90), (CUBIN, 90)),
    calls: tuple[str, ...] = ("TVMFFIBacktrace",),
    linked: tuple[str, ...] = ("cudart",),
) -> bytes:
    """A library with these functions and code, which calls what it does not have."""
    numbers = ",".join(map(str, b"\0" * 24 + b"".join(fat_binary(entry) for entry in entries)))
    lines = [f'__attribute__((section(".nv_fatbin"), aligned(8))) const unsigned char code[] = {{{numbers}}};']
    lines += [f"void {name}(void); void use_{number}(void) {{ {name}(); }}" for number, name in enumerate(calls)]
    lines += [f"void __tvm_ffi_{name}(void) {{}}" for name in functions]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "kernel.c").write_text("\n".join(lines))
        (folder / "runtime.c").write_text("void cudaLaunchKernel(void) {}")
        runtime = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcudart.so.13", "-o", "libcudart.so", "runtime.c"]
        subprocess.run(runtime, cwd=folder, check=True)
        flags = ["-L.", "-Wl,--no-as-needed", "-lcudart"] if "cudart" in linked else []
        flags += kernels.link_driver(folder).split() if "cuda" in linked else []
        subprocess.run(["cc", "-shared", "-fPIC", "-o", "kernel.so", "kernel.c", *flags], cwd=folder, check=True)
        return (folder / "kernel.so").read_bytes()


def kit(folder: Path, content: bytes, name: str = "batch_prefill_with_bf16", arch: str = "9.0a") -> Path:
    (folder / "built.so").write_bytes(content)
    write_kit(folder / "some.kit", Target(arch, "0.7.2", "13"), {name: folder / "built.so"}, ["Llama-3.2-1B"])
    return folder / "some.kit"


@needs_compiler
def test_a_good_kit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kit(tmp_path, library())
    assert kernels.main(["check", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{path}: 1 kernels for Llama-3.2-1B (FlashInfer 0.7.2, CUDA 13, 9.0a)\n" and not said.err


XQA = ("xqa_wrapper",)
FA2 = "_ZN10flashinfer38BatchPrefillWithPagedKVCacheDispatchedILb1ELj{}ELj64E"


@needs_compiler
@pytest.mark.parametrize(
    ("name", "made", "says"),
    [
        ("batch_prefill_x", {"functions": ("plan", "ragged_run")}, "has no paged_run"),
        ("batch_decode_x", {"functions": ()}, "has no plan, run"),
        ("batch_decode_x", {"functions": ("plan", "run")}, None),
        ("sampling", {}, "nothing here asks for such a kernel"),
        # Found when it is first called, which ends the process where no library is named that has it.
        ("xqa_x", {"functions": XQA, "calls": ("cuTensorMapEncodeTiled",)}, "nothing brings cuTensorMapEncodeTiled"),
        ("xqa_x", {"functions": XQA, "calls": ("cuTensorMapEncodeTiled",), "linked": ("cudart", "cuda")}, None),
        ("xqa_x", {"functions": XQA, "calls": ("launch",), "linked": ("cudart", "cuda")}, "nothing brings launch"),
        ("batch_prefill_x", {"calls": (FA2.format(32),)}, None),
        ("batch_prefill_x", {"calls": (FA2.format(64),)}, f"nothing brings {FA2.format(64)}"),
        ("batch_prefill_x", {"entries": ((CUBIN, 90), (CUBIN, 89))}, "its code is for 89, 90, not 90"),
        ("batch_prefill_x", {"entries": ((CUBIN, 80),)}, "its code is for 80, not 90"),
        ("batch_prefill_x", {"entries": ((PTX, 90),)}, "its code is for no GPU, not 90"),
        ("batch_prefill_x", {"entries": ()}, "its code is for no GPU, not 90"),
        ("batch_prefill_x", {"linked": ()}, "it is not linked to libcudart.so.13"),
    ],
)
def test_what_would_fail_on_a_gpu(
    name: str, made: dict[str, tuple[object, ...]], says: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kit(tmp_path, library(**made), name)  # type: ignore[arg-type]
    assert kernels.main(["check", str(path)]) == int(says is not None)
    assert capsys.readouterr().err == ("" if says is None else f"error: {name}: {says}\n")


@needs_compiler
def test_the_architecture_is_the_kits(tmp_path: Path) -> None:
    assert kernels.problems_of(kit(tmp_path, library(entries=((CUBIN, 89),)), arch="8.9")) == []


@needs_compiler
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: b"", "no shared library"),
        (lambda content: b"#!/bin/sh\n" * 100, "no shared library"),
        (lambda content: content[: len(content) // 2], "cut or damaged"),
        (lambda content: content[:70], "cut or damaged"),
        # Little-endian becomes big-endian; a library becomes a program.
        (lambda content: content[:5] + b"\x02" + content[6:], "no shared library"),
        (lambda content: content[:16] + b"\x02" + content[17:], "no shared library"),
        (
            lambda content: content.replace(struct.pack("<HHI", CUBIN, 0x101, 64), bytes(8)),
            "fat binary in it is damaged",
        ),
    ],
)
def test_a_damaged_library(change: object, says: str, tmp_path: Path) -> None:
    content = change(library())  # type: ignore[operator]
    with pytest.raises(ValueError, match=says):
        read_library(content)
    (problem,) = kernels.problems_of(kit(tmp_path, content))
    assert says in problem and "\n" not in problem


def test_a_file_that_is_no_kit_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    assert kernels.main(["check", str(tmp_path / "x")]) == 1
    assert kernels.main(["check", str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no kit" in lines[0] and "No such file" in lines[1]
