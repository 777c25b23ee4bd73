"""A kit: FlashInfer kernels that were compiled beforehand, in one file, for machines without a compiler or a network.

Written by `python -m engine.kernels build`, taken into use by `--kernels FILE` before FlashInfer is asked for anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.config import StartupError

FORMAT = 1
MOST_BYTES = 45 * 10**6
# What a member may be, so that no file makes the disk overflow.
MOST_MEMBER_BYTES = 200 * 10**6
MANIFEST = "manifest.json"
# Where a kit is written if nothing else is said.
KIT_OF_BUILD = Path("build/kernels.kit")


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for. arch: 9.0a. flashinfer: its whole version. cuda: the runtime's, 13 of 13.0."""

    arch: str
    flashinfer: str
    cuda: str


def write_kit(path: Path, target: Target, libraries: Mapping[str, Path], models: list[str]) -> int:
    """Libraries by kernel name into one file. Returns its bytes; raises StartupError where it grows too large."""
    digests = {name: hashlib.sha256(library.read_bytes()).hexdigest() for name, library in libraries.items()}
    manifest = json.dumps({"format": FORMAT, **asdict(target), "models": models, "kernels": digests}, indent=1).encode()
    part = path.with_name(path.name + ".part")
    with tarfile.open(part, "w:xz") as archive:
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(manifest)
        archive.addfile(info, io.BytesIO(manifest))
        for name in sorted(libraries):
            archive.add(libraries[name], f"{name}.so", recursive=False)
    size = part.stat().st_size
    if size > MOST_BYTES:
        part.unlink()
        raise StartupError(
            f"the kit would have {size / 1e6:.0f} MB, more than {MOST_BYTES // 10**6}; name fewer models"
        )
    part.replace(path)
    return size


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises StartupError for a file that is no kit."""
    try:
        with tarfile.open(path, "r:xz") as archive:
            first = archive.next()
            file = archive.extractfile(first) if first is not None and first.name == MANIFEST else None
            if first is None or file is None or first.size > 10**6:
                raise StartupError(f"--kernels {path}: this is no kit of kernels")
            manifest = json.loads(file.read())
    except OSError as error:
        raise StartupError(f"--kernels {path}: {error.strerror or 'this is no kit of kernels'}") from None
    except (tarfile.TarError, ValueError, EOFError):
        raise StartupError(f"--kernels {path}: this is no kit of kernels") from None
    fields = ("arch", "flashinfer", "cuda")
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("kernels"), dict)
        or not isinstance(manifest.setdefault("models", []), list)
        or not all(isinstance(manifest.get(field), str) for field in fields)
    ):
        raise StartupError(f"--kernels {path}: a kit that another version has written; build it anew")
    return manifest


def open_kit(path: Path, here: Target, cache: Path | None = None) -> tuple[Path, int]:
    """Unpack a kit once. Returns the folder with NAME/NAME.so, and how many kernels there are. Raises StartupError."""
    manifest = read_manifest(path)
    for field, what in (("arch", "GPUs of architecture"), ("flashinfer", "FlashInfer"), ("cuda", "torch with CUDA")):
        if manifest[field] != getattr(here, field):
            raise StartupError(f"--kernels {path} is for {what} {manifest[field]}, and here is {getattr(here, field)}")
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    root = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "oneloop" / "kernels"
    folder = root / digest
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        trial = Path(tempfile.mkdtemp(dir=root))
        try:
            _unpack(path, manifest["kernels"], trial)
            try:
                trial.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was quicker
                    raise
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    return folder, len(manifest["kernels"])


def _unpack(path: Path, kernels: dict[str, str], folder: Path) -> None:
    found = set()
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                name = member.name.removesuffix(".so")
                if member.name == MANIFEST:
                    continue
                # Names are compared with the manifest's, whose names must be plain ones: nothing leaves the folder.
                plain = name.replace("_", "").replace("-", "").isalnum()
                if not plain or name not in kernels or not member.isfile() or member.size > MOST_MEMBER_BYTES:
                    raise StartupError(f"--kernels {path}: the kit holds what its manifest does not name")
                file = archive.extractfile(member)
                content = file.read() if file is not None else b""
                if hashlib.sha256(content).hexdigest() != kernels[name]:
                    raise StartupError(f"--kernels {path}: {name} is damaged")
                (folder / name).mkdir()
                (folder / name / f"{name}.so").write_bytes(content)
                found.add(name)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise StartupError(f"--kernels {path}: {error}") from None
    if found != set(kernels):
        raise StartupError(f"--kernels {path}: {len(kernels) - len(found)} kernels of its manifest are missing")


def use_kit_of_build() -> str:
    """The kit that tests and benchmarks take where there is one; what is said of it. Raises StartupError."""
    import torch

    if not KIT_OF_BUILD.exists():
        return ""
    return use_kit(KIT_OF_BUILD, torch.cuda.get_device_capability(), torch.version.cuda)


def use_kit(path: Path, capability: tuple[int, int], torch_cuda: str | None) -> str:
    """Let FlashInfer take its kernels from a kit, and build none. Returns a line for the start-up table.

    capability: of the GPU. torch_cuda: `torch.version.cuda`. Raises StartupError.
    """
    from engine.ops.attention.flashinfer import load_driver

    load_driver()
    try:
        import flashinfer
        import flashinfer.jit.env as places
    except ImportError:
        raise StartupError("--kernels needs FlashInfer's Python part: pip install flashinfer-python") from None
    major, minor = capability
    here = Target(
        f"{major}.{minor}" + ("a" if major >= 9 else ""), flashinfer.__version__, (torch_cuda or "").split(".")[0]
    )
    folder, count = open_kit(path, here)
    places.FLASHINFER_AOT_DIR = folder
    os.environ["FLASHINFER_DISABLE_JIT"] = "1"
    return f"{count} from {path.name}; none is compiled here"
