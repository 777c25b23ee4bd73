"""`python -m engine.kernels build`: compiles what the named models need of FlashInfer into one file for `--kernels`.

No GPU is needed, but nvcc, ninja and flashinfer-python. What is compiled stays in a folder, so that the next kit takes
only what is new.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from engine.config import StartupError

PAGE_SIZE = 16


def kernels_of(spec: Any, dtype: Any, kv_dtype: Any, arch: str = "9.0a", page_size: int = PAGE_SIZE) -> list[Any]:
    """FlashInfer's build specs that a model's attention asks for, as ops/attention/flashinfer.py does."""
    import torch
    from flashinfer.jit.attention import modules
    from flashinfer.jit.xqa import gen_xqa_module

    from engine.ops.attention.flashinfer import CUDA_CORE_GROUPS, DTYPES, HEAD_DIMS, XQA_GROUPS, XQA_PAGE_SIZES

    if dtype not in DTYPES or spec.head_dim not in HEAD_DIMS:
        return []
    found: list[Any] = []
    group = spec.num_heads // spec.num_kv_heads
    capped = spec.softcap is not None
    for window in dict.fromkeys(spec.window or (None,)):
        windowed = window is not None
        types = (dtype, kv_dtype, dtype, torch.int32)
        rest = (spec.head_dim, spec.head_dim, 0, windowed, capped)
        if kv_dtype == dtype and arch == "9.0a":
            found.append(modules.gen_batch_prefill_module("fa3", *types, *rest, False))
        # Beside fa3 for decode rows that XQA has not, and what they decode by on tensor cores.
        found.append(modules._gen_batch_prefill_primary_module("fa2", *types, *rest, False))
        if group in CUDA_CORE_GROUPS and kv_dtype == dtype:
            found.append(modules.gen_batch_decode_module(*types, *rest))
        if group in XQA_GROUPS and page_size in XQA_PAGE_SIZES and not capped:
            found.append(gen_xqa_module(dtype, kv_dtype, page_size, spec.head_dim, group, windowed, dtype))
    return list({each.name: each for each in found}.values())


def kernels_for(directories: Iterable[Path], kv_cache_dtypes: Sequence[str], arch: str) -> list[Any]:
    """Build specs for models by their config.json alone."""
    import torch

    from engine.executor.cuda_start import pick_kv_dtype
    from engine.models.config import ModelConfig
    from engine.models.decoder import Decoder
    from engine.models.weights import ShapeRecorder

    found: dict[str, Any] = {}
    for directory in directories:
        spec = Decoder(ModelConfig.load(directory), ShapeRecorder(torch.bfloat16), 2048).attention_spec
        for name in kv_cache_dtypes:
            for each in kernels_of(spec, torch.bfloat16, pick_kv_dtype(name, torch.bfloat16), arch):
                found[each.name] = each
    return list(found.values())


def compile_all(specs: Sequence[Any], jobs: int, say: Any = print) -> dict[str, Path]:
    """Libraries by name; raises StartupError for the first that does not compile."""
    libraries = {}
    begin = time.monotonic()

    def compiled(spec: Any) -> Any:
        spec.build(verbose=False)
        return spec

    with ThreadPoolExecutor(jobs) as pool:
        tasks = {pool.submit(compiled, spec): spec for spec in specs}
        for task in as_completed(tasks):
            spec = tasks[task]
            try:
                task.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                lines = str(error).strip().splitlines() or [type(error).__name__]
                cause = next((line for line in lines if "error" in line.lower()), lines[-1])
                raise StartupError(f"{spec.name} does not compile: {cause}") from None
            libraries[spec.name] = Path(spec.jit_library_path)
            size = libraries[spec.name].stat().st_size / 1e6
            done = f"{len(libraries)} of {len(specs)}, {time.monotonic() - begin:.0f} s"
            say(f"{done}: {spec.name} ({size:.1f} MB)", flush=True)
    return libraries


def link_driver(folder: Path) -> str:
    """Linker flags by which a library names the driver, from an empty one: there is none without a GPU."""
    source, stub = folder / "driver.c", folder / "libcuda.so"
    source.write_text("")
    subprocess.run(["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", stub, source], check=True)
    return f"-L{folder} -Wl,--no-as-needed -lcuda -Wl,--as-needed"


def build(args: argparse.Namespace) -> int:
    for tool in ("nvcc", "ninja", "cc"):
        if shutil.which(tool) is None:
            raise StartupError(f"{tool} is needed to build kernels, and is not on the PATH")
    for directory in args.models:
        if not (directory / "config.json").is_file():
            raise StartupError(f"--for {directory}: there is no config.json")
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLASHINFER_CUDA_ARCH_LIST"] = args.arch
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(args.work)
        os.environ["FLASHINFER_EXTRA_LDFLAGS"] = link_driver(Path(folder))
        os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
        os.environ.pop("FLASHINFER_DISABLE_JIT", None)
        os.environ.setdefault("CUDA_HOME", cuda_home())
        try:
            import flashinfer
        except ImportError as error:
            raise StartupError(f"flashinfer-python is needed to build kernels: {error}") from None
        from engine.executor.cuda_kit import Target, write_kit

        specs = kernels_for(args.models, args.kv_cache_dtype, args.arch)
        if args.list:
            print("\n".join(spec.name for spec in specs))
            return 0
        libraries = compile_all(specs, args.jobs)
        target = Target(args.arch, flashinfer.__version__, nvcc_version().split(".")[0])
        size = write_kit(args.out, target, libraries, [directory.name for directory in args.models])
    print(f"{args.out}: {len(libraries)} kernels for {args.arch}, {size / 1e6:.1f} MB")
    return 0


def cuda_home() -> str:
    """Where nvcc has its headers, also where what is on the PATH only calls it."""
    done = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    tops = [line.partition("TOP=")[2].strip() for line in done.stderr.splitlines() if "TOP=" in line]
    if not tops:
        raise StartupError("nvcc does not say where its headers are; set CUDA_HOME")
    return str(Path(tops[0]).resolve())


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return text.rpartition("release ")[2].partition(",")[0].strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine.kernels", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="compile a kit")
    command.add_argument("--arch", choices=("8.0", "8.6", "8.9", "9.0a"), default="9.0a", help="of the GPU")
    command.add_argument("--for", dest="models", type=Path, nargs="+", required=True, metavar="MODEL_DIR")
    command.add_argument("--kv-cache-dtype", nargs="+", choices=("auto", "fp8"), default=["auto"])
    command.add_argument("--out", type=Path, default=Path("build/kernels.kit"))
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    command.add_argument("--work", type=Path, default=Path("build/kernels"), help="where what is compiled stays")
    command.add_argument("--list", action="store_true", help="only say what would be compiled")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        return build(args)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
