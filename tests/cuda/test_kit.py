"""Kits of kernels: written, refused where they do not fit, unpacked once; and how they are compiled."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import kernels
from engine.config import StartupError
from engine.executor import cuda_kit
from engine.executor.cuda_kit import Target, open_kit, read_manifest, write_kit
from engine.flags import parse

HERE = Target("9.0a", "0.7.2", "13")


def kit(folder: Path, target: Target = HERE, names: tuple[str, ...] = ("sampling", "xqa_bf16")) -> Path:
    libraries = {}
    for name in names:
        libraries[name] = folder / f"built-{name}.so"
        libraries[name].write_bytes(name.encode() * 100)
    path = folder / "some.kit"
    assert write_kit(path, target, libraries, ["llama"]) == path.stat().st_size
    return path


def test_a_kit_is_unpacked_once(tmp_path: Path) -> None:
    path = kit(tmp_path)
    folder, count = open_kit(path, HERE, tmp_path / "cache")
    assert count == 2
    assert (folder / "sampling/sampling.so").read_bytes() == b"sampling" * 100
    (folder / "sampling/sampling.so").write_bytes(b"mine")
    assert open_kit(path, HERE, tmp_path / "cache") == (folder, 2)
    assert (folder / "sampling/sampling.so").read_bytes() == b"mine", "it was unpacked again"
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [folder.name], "no half a kit is left"
    assert read_manifest(path)["models"] == ["llama"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Target("8.9", "0.7.2", "13"), "is for GPUs of architecture 8.9, and here is 9.0a"),
        (Target("9.0a", "0.7.1", "13"), "is for FlashInfer 0.7.1, and here is 0.7.2"),
        (Target("9.0a", "0.7.2", "12"), "is for torch with CUDA 12, and here is 13"),
    ],
)
def test_a_kit_for_something_else_is_refused_in_a_line(tmp_path: Path, target: Target, says: str) -> None:
    with pytest.raises(StartupError, match=says) as error:
        open_kit(kit(tmp_path, target), HERE, tmp_path / "cache")
    assert "\n" not in str(error.value)


def write(path: Path, manifest: object, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in {"manifest.json": json.dumps(manifest).encode(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


GOOD = {"format": 1, "arch": "9.0a", "flashinfer": "0.7.2", "cuda": "13"}
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    ("manifest", "members", "says"),
    [
        ([], {}, "another version"),
        ({**GOOD, "format": 2, "kernels": {}}, {}, "another version"),
        ({**GOOD, "arch": None, "kernels": {}}, {}, "another version"),
        ({**GOOD, "kernels": []}, {}, "another version"),
        ({**GOOD, "kernels": {"a": EMPTY}}, {"a.so": b"x"}, "a is damaged"),
        ({**GOOD, "kernels": {"a": EMPTY, "b": EMPTY}}, {"a.so": b""}, "1 kernels of its manifest are missing"),
        ({**GOOD, "kernels": {"a": EMPTY}}, {"b.so": b""}, "does not name"),
        ({**GOOD, "kernels": {"../a": EMPTY}}, {"../a.so": b""}, "does not name"),
        ({**GOOD, "kernels": {"/a": EMPTY}}, {"/a.so": b""}, "does not name"),
        ({**GOOD, "kernels": {"": EMPTY}}, {".so": b""}, "does not name"),
    ],
)
def test_a_kit_that_is_not_whole_is_refused(tmp_path: Path, manifest: Any, members: Any, says: str) -> None:
    with pytest.raises(StartupError, match=says):
        open_kit(write(tmp_path / "bad.kit", manifest, members), HERE, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*")) and not (tmp_path / "a.so").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\xfd7zXZ\x00" + bytes(50), None])
def test_a_file_that_is_no_kit(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "no.kit"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=r"no kit|No such file") as error:
        open_kit(path, HERE, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_half_a_kit(tmp_path: Path) -> None:
    path = kit(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StartupError, match="--kernels"):
        open_kit(path, HERE, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_kit_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kit, "MOST_BYTES", 100)
    with pytest.raises(StartupError, match="name fewer models"):
        kit(tmp_path)
    assert not (tmp_path / "some.kit").exists() and not (tmp_path / "some.kit.part").exists()


def test_flashinfer_takes_its_kernels_from_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the folder where it looks for what came with it; nothing is compiled from then on."""
    places = SimpleNamespace(FLASHINFER_AOT_DIR=None)
    package = SimpleNamespace(__version__="0.7.2", jit=SimpleNamespace(env=places))
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.jit", package.jit)
    monkeypatch.setitem(sys.modules, "flashinfer.jit.env", places)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    path = kit(tmp_path)
    assert cuda_kit.use_kit(path, (9, 0), "13.0") == "2 from some.kit; none is compiled here"
    assert (places.FLASHINFER_AOT_DIR / "xqa_bf16" / "xqa_bf16.so").is_file()
    assert os.environ["FLASHINFER_DISABLE_JIT"] == "1"
    with pytest.raises(StartupError, match=r"architecture 9.0a, and here is 8.9"):
        cuda_kit.use_kit(path, (8, 9), "13.0")
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(StartupError, match="Python part"):
        cuda_kit.use_kit(path, (9, 0), "13.0")


def test_the_flag() -> None:
    assert parse(["--kernels", "a.kit"])[0].cuda.kernels == "a.kit" and parse([])[0].cuda.kernels is None


# ---- how they are compiled


class Spec:
    """What FlashInfer says of a module: with a compiler that copies its source."""

    def __init__(self, folder: Path, name: str, source: str = "code", command: str = "cp $in $out") -> None:
        self.name, self.source, self.command = name, source, command
        self.folder = folder / "ops" / name
        self.ninja_path = self.folder / "build.ninja"
        self.jit_library_path = self.folder / f"{name}.so"

    def write_ninja(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        source = self.folder / "source.cu"
        if not source.exists():
            source.write_text(self.source)
        part = self.folder / f"{self.name}_part.cuda.o"
        self.ninja_path.write_text(
            f"rule compile\n  command = {self.command} # error -o $out\nrule link\n  command = cp $in $out # -o $out\n"
            f"build {part}: compile {source}\nbuild {self.jit_library_path}: link {part}\n"
            f"default {self.jit_library_path}\n"
        )


needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not installed")


@needs_ninja
def test_progress_is_told_and_libraries_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    specs = [Spec(tmp_path, name) for name in ("a", "b", "c")]
    found = kernels.compile_all(specs, 2, tmp_path, lambda line, flush: said.append(line))
    assert found == {spec.name: spec.jit_library_path for spec in specs}
    assert [line.partition(",")[0] for line in said] == [f"{number} of 6" for number in range(1, 7)]
    assert sorted(line.partition(": ")[2] for line in said) == [
        line for name in "abc" for line in (f"{name} (0.0 MB)", f"{name}, part")
    ]


@needs_ninja
def test_only_what_is_new_is_compiled(tmp_path: Path) -> None:
    """After a build that failed half way, and where a kit for one more model is wanted."""
    said: list[str] = []

    def compile_all(*names: str, **options: str) -> None:
        said.clear()
        specs = [Spec(tmp_path, name, **options) for name in names]  # type: ignore[arg-type]
        kernels.compile_all(specs, 1, tmp_path, lambda line, flush: said.append(line))

    compile_all("a")
    with pytest.raises(StartupError):
        kernels.compile_all(
            [Spec(tmp_path, "a"), Spec(tmp_path, "b", command="false")], 1, tmp_path, lambda *a, **o: None
        )
    compile_all("a", "b")
    assert {line.partition(": ")[2][0] for line in said} == {"b"}
    compile_all("a", "b")
    assert not said
    (tmp_path / "ops/a/source.cu").write_text("other code")
    compile_all("a", "b")
    assert len(said) == 2 and (tmp_path / "ops/a/a.so").read_text() == "other code"


@needs_ninja
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo 'x.cu(3): error: no such thing' && echo more && false", "x.cu(3): error: no such thing"),
        ("echo 'cicc died due to signal 9' && false", "cicc died due to signal 9"),
        ("false", "it does not say why"),
    ],
)
def test_what_does_not_compile_says_why_in_a_line(tmp_path: Path, command: str, says: str) -> None:
    specs = [Spec(tmp_path, "a", command=command), Spec(tmp_path, "b")]
    with pytest.raises(StartupError) as error:
        kernels.compile_all(specs, 1, tmp_path, lambda *a, **o: None)
    assert str(error.value) == f"a does not compile: {says}"


def test_what_cannot_even_begin_says_so(tmp_path: Path) -> None:
    if shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    spec = Spec(tmp_path, "a")
    spec.write_ninja()
    (spec.folder / "source.cu").unlink()
    spec.write_ninja = lambda: None  # type: ignore[method-assign]
    with pytest.raises(StartupError, match=r"ninja fails: .*source\.cu"):
        kernels.compile_all([spec], 1, tmp_path, lambda *a, **o: None)


def test_no_more_compilers_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for gigabytes, jobs in ((1, 1), (14, 4), (1000, 16)):
        monkeypatch.setattr(os, "sysconf", lambda name, size=gigabytes: size * 2**30 if "PHYS" in name else 1)
        assert kernels.default_jobs() == jobs


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_what_is_compiled_names_the_driver(tmp_path: Path) -> None:
    """Else its symbols are looked for in vain at their first use, which ends the process."""
    flags = kernels.link_driver(tmp_path)
    (tmp_path / "kernel.c").write_text("extern int cuGetErrorName(void); int use(void) { return cuGetErrorName(); }")
    words = f"cc -shared -fPIC -o {tmp_path}/kernel.so {tmp_path}/kernel.c"
    assert os.system(words) == 0 and b"libcuda.so.1" not in (tmp_path / "kernel.so").read_bytes()
    assert os.system(f"{words} {flags}") == 0 and b"libcuda.so.1" in (tmp_path / "kernel.so").read_bytes()


@pytest.mark.parametrize("tool", ["nvcc", "ninja", "cc"])
def test_a_tool_that_is_missing_is_named(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else name)
    assert kernels.main(["build", "--for", str(tmp_path), "--out", str(tmp_path / "x.kit")]) == 1
    assert capsys.readouterr().err == f"error: {tool} is needed to build kernels, and is not on the PATH\n"


def test_a_folder_without_a_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert kernels.main(["build", "--for", str(tmp_path), "--out", str(tmp_path / "x.kit")]) == 1
    assert "there is no config.json" in capsys.readouterr().err


@needs_ninja
def test_a_whole_kit_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that writes files: from the command line to a kit that fits here."""
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(kernels, "link_driver", lambda folder: "-lcuda")
    # What is in it: test_kit_check.py.
    monkeypatch.setattr(kernels, "problems_of", lambda path: [])
    monkeypatch.setattr(kernels, "nvcc_version", lambda: "13.0")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(kernels, "cuda_home", lambda: "/opt/cuda")
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__version__="0.7.2"))
    asked: list[argparse.Namespace] = []

    def specs(models: list[Path], kinds: list[str], arch: str) -> list[Spec]:
        asked.append(argparse.Namespace(models=models, kinds=kinds, arch=arch))
        return [Spec(tmp_path, "sampling"), Spec(tmp_path, "xqa")]

    monkeypatch.setattr(kernels, "kernels_for", specs)
    names = ("CUDA_ARCH_LIST", "WORKSPACE_BASE", "EXTRA_LDFLAGS", "EXTRA_CUDAFLAGS")
    for name in (f"FLASHINFER_{name}" for name in names):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    monkeypatch.setenv("FLASHINFER_USE_CUDA_NORM", "1")
    (tmp_path / "config.json").write_text("{}")
    words = ["build", "--for", str(tmp_path), "--kv-cache-dtype", "auto", "fp8", "--out", str(tmp_path / "out/a.kit")]
    assert kernels.main([*words, "--work", str(tmp_path / "work")]) == 0
    assert asked[0].kinds == ["auto", "fp8"] and asked[0].arch == "9.0a"
    assert "FLASHINFER_DISABLE_JIT" not in os.environ and os.environ["FLASHINFER_EXTRA_LDFLAGS"] == "-lcuda"
    assert os.environ.pop("CUDA_HOME") == "/opt/cuda"
    assert open_kit(tmp_path / "out/a.kit", HERE, tmp_path / "cache")[1] == 2


def test_where_the_headers_are_that_hopper_kernels_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit, wheel = tmp_path / "cuda", tmp_path / "a b/nvidia/curand/include"
    (toolkit / "targets/x86_64-linux/include").mkdir(parents=True)
    wheel.mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", "-lineinfo")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a b"), ""])
    assert kernels.headers(["batch_decode"]) == "-lineinfo", "no other kernel asks for them"
    with pytest.raises(StartupError, match="pip install nvidia-curand"):
        kernels.headers(["batch_decode", "batch_prefill_sm90"])
    monkeypatch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", "-isystem /headers")
    assert kernels.headers(["batch_prefill_sm90"]) == "-isystem /headers", "who names a folder knows"
    (wheel / "curand_kernel.h").touch()
    assert kernels.headers(["batch_prefill_sm90"]) == f"-isystem /headers -isystem '{wheel}'"
    (toolkit / "targets/x86_64-linux/include/curand_kernel.h").touch()
    assert kernels.headers(["batch_prefill_sm90"]) == "-isystem /headers", "the toolkit's own"


def test_where_the_compiler_has_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "#$ _NVVM_BRANCH_=nvvm\n#$ TOP=/opt/cuda/bin/..\n#$ x"
    monkeypatch.setattr(kernels.subprocess, "run", lambda *args, **options: SimpleNamespace(stderr=said))
    assert kernels.cuda_home() == "/opt/cuda"
    monkeypatch.setattr(kernels.subprocess, "run", lambda *args, **options: SimpleNamespace(stderr=""))
    with pytest.raises(StartupError, match="CUDA_HOME"):
        kernels.cuda_home()
