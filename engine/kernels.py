"""`python -m engine.kernels build`: compiles what the named models need of FlashInfer into one file for `--kernels`;
`check` reads such a file and says whether it will do.

No GPU is needed, but nvcc, ninja and flashinfer-python to build. What is compiled stays in a folder: a build that was
stopped goes on where it was, and the next kit takes only what is new.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.config import StartupError
from engine.executor.cuda_kit import KIT_OF_BUILD, Target, open_kit, read_manifest, write_kit
from engine.executor.kernel_library import read_library

PAGE_SIZE = 16
# What is called of a kernel, by how its name begins.
ENTRY_POINTS = {
    "batch_prefill_": ("plan", "paged_run"),
    "batch_decode_": ("plan", "run"),
    "xqa_": ("xqa_wrapper",),
    "batch_mla_attention_": ("plan", "run"),
}
# Architectures that XQA has no code for.
WITHOUT_XQA = ("8.0", "8.6", "8.9")
# At least what one compiler may take of the memory.
COMPILER_BYTES = 3 * 2**30


def kernels_of(spec: Any, dtype: Any, kv_dtype: Any, arch: str = "9.0a", page_size: int = PAGE_SIZE) -> list[Any]:
    """FlashInfer's build specs that a model's attention asks for, as ops/attention/flashinfer.py does, or
    flashinfer_latent.py."""
    import torch
    from flashinfer.jit.attention import modules
    from flashinfer.jit.xqa import gen_xqa_module

    from engine.ops.attention.flashinfer import CUDA_CORE_GROUPS, DTYPES, HEAD_DIMS, XQA_GROUPS, XQA_PAGE_SIZES

    if spec.latent is not None:
        return latent_kernels_of(spec.latent, dtype, kv_dtype, arch)
    shape = spec.common
    if shape is None or dtype not in DTYPES or shape.head_dim not in HEAD_DIMS:
        return []
    found: list[Any] = []
    group = shape.num_heads // shape.num_kv_heads
    capped = shape.softcap is not None
    for window in dict.fromkeys(layer.window for layer in spec.attending.values()):
        windowed = window is not None
        types = (dtype, kv_dtype, dtype, torch.int32)
        rest = (shape.head_dim, shape.head_dim, 0, windowed, capped)
        if kv_dtype == dtype and arch == "9.0a":
            found.append(modules.gen_batch_prefill_module("fa3", *types, *rest, False))
        # Beside fa3 for decode rows that XQA has not, and what they decode by on tensor cores.
        found.append(modules._gen_batch_prefill_primary_module("fa2", *types, *rest, False))
        if group in CUDA_CORE_GROUPS and kv_dtype == dtype:
            found.append(modules.gen_batch_decode_module(*types, *rest))
        has_xqa = group in XQA_GROUPS and page_size in XQA_PAGE_SIZES and not capped
        if has_xqa and arch not in WITHOUT_XQA:
            found.append(gen_xqa_module(dtype, kv_dtype, page_size, shape.head_dim, group, windowed, dtype))
    return list({each.name: each for each in found}.values())


def latent_kernels_of(shape: Any, dtype: Any, kv_dtype: Any, arch: str) -> list[Any]:
    """The same where layers keep latents."""
    import torch
    from flashinfer.jit.attention.modules import gen_batch_mla_module

    from engine.ops.attention.flashinfer_latent import has_kernel

    if not has_kernel(shape, dtype, kv_dtype, hopper=arch == "9.0a"):
        return []
    sizes = shape.value_dim, shape.head_dim - shape.value_dim
    way = "fa3" if arch == "9.0a" else "fa2"
    return [gen_batch_mla_module(way, dtype, kv_dtype, dtype, torch.int32, *sizes, False)]


def kernels_for(directories: Iterable[Path], kv_cache_dtypes: Sequence[str], arch: str) -> list[Any]:
    """Build specs for models by their config.json alone."""
    import torch

    from engine.executor.cuda_start import pick_kv_dtype
    from engine.models.loading.weights import ShapeRecorder
    from engine.models.parts.decoder import Decoder
    from engine.models.registry import read_spec

    found: dict[str, Any] = {}
    for directory in directories:
        spec = Decoder(read_spec(directory), ShapeRecorder(torch.bfloat16), 2048).attention_spec
        for name in kv_cache_dtypes:
            for each in kernels_of(spec, torch.bfloat16, pick_kv_dtype(name, torch.bfloat16), arch):
                found[each.name] = each
    return list(found.values())


def entry_points(name: str) -> tuple[str, ...]:
    """The functions that a kernel of this name must have; none for one that is not ours to ask for."""
    return next((functions for begin, functions in ENTRY_POINTS.items() if name.startswith(begin)), ())


def compile_all(specs: Sequence[Any], jobs: int, work: Path, say: Any = print) -> dict[str, Path]:
    """Libraries by name; raises StartupError for the first that does not compile.

    One ninja has the files of all kernels, so that `jobs` compilers run to the end; it knows what is done already.
    """
    for spec in specs:
        spec.write_ninja()
    plan = work / "kit.ninja"
    plan.write_text("".join(f"subninja {spec.ninja_path}\n" for spec in specs))
    command = ["ninja", "-f", str(plan.resolve()), "-j", str(jobs)]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t %e] "}
    failed: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=work,  # where ninja keeps what it knows
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            step = re.match(r"\[(\d+)/(\d+) ([\d.]+)\] .* -o (\S+)", line)
            if step is not None:
                number, count, seconds, out = step.groups()
                if not failed:
                    say(f"{number} of {count}, {float(seconds):.0f} s: {_short(Path(out))}", flush=True)
            elif failed or line.startswith(("FAILED:", "ninja: error", "ninja: fatal")):
                failed.append(line.strip())
    if process.returncode != 0:
        raise StartupError(_cause(failed))
    return {spec.name: Path(spec.jit_library_path) for spec in specs}


def _short(out: Path) -> str:
    """What was made: a kernel's library, or a part of it, whose name mostly repeats the kernel's."""
    if out.suffix == ".so":
        return f"{out.stem} ({out.stat().st_size / 1e6:.1f} MB)"
    return f"{out.parent.name}, {out.name.partition('.')[0].removeprefix(out.parent.name + '_')}"


def _cause(lines: list[str]) -> str:
    """One line of what ninja has said."""
    place = re.match(r"FAILED: (?:\[code=\d+\] )?(\S+)", lines[0]) if lines else None
    what = f"{Path(place[1]).parent.name} does not compile" if place else "ninja fails"
    # The line behind the first is the command, whose flags may hold the word.
    said = [line for line in lines[2 if place else 0 :] if not line.startswith("ninja: build stopped")]
    cause = next((line for line in said if "error" in line.lower()), said[-1] if said else "it does not say why")
    return f"{what}: {cause}"


def default_jobs() -> int:
    """One compiler for each processor, as far as there is memory for them."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // COMPILER_BYTES))


def link_driver(folder: Path) -> str:
    """Linker flags by which a library names the driver, from an empty one: there is none without a GPU."""
    source, stub = folder / "driver.c", folder / "libcuda.so"
    source.write_text("")
    subprocess.run(["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", stub, source], check=True)
    # And without names for a debugger, which are a fifth of it.
    return f"-L{folder.resolve()} -Wl,--no-as-needed -lcuda -Wl,--as-needed -Wl,-s"


def headers(names: Sequence[str]) -> str:
    """Compiler flags by which kernels find cuRAND's headers, beside what is asked for by the environment.

    FlashInfer's kernels for Hopper include them, by way of CUTLASS, and draw nothing; a toolkit may be without them,
    while torch with CUDA brings a wheel that has them. Raises StartupError where they are wanted and nowhere.
    """
    given, header = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS", ""), "curand_kernel.h"
    toolkit = Path(os.environ["CUDA_HOME"])
    if not any(name.endswith("_sm90") for name in names) or any(toolkit.glob(f"**/include/{header}")):
        return given
    found = next((path for place in sys.path for path in sorted(Path(place).glob(f"nvidia/*/include/{header}"))), None)
    if found is not None:
        return f"{given} -isystem {shlex.quote(str(found.parent))}".strip()
    if "-isystem" in given or "-I" in given:
        return given
    raise StartupError(
        f"kernels for Hopper need {header}, which this CUDA toolkit is without: pip install nvidia-curand"
    )


def build(args: argparse.Namespace) -> int:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for tool in ("nvcc", "ninja", "cc"):
        if shutil.which(tool) is None:
            raise StartupError(f"{tool} is needed to build kernels, and is not on the PATH")
    for directory in args.models:
        if not (directory / "config.json").is_file():
            raise StartupError(f"--for {directory}: there is no config.json")
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = args.arch
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(args.work.resolve())
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = link_driver(args.work)
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    os.environ.pop("FLASHINFER_DISABLE_JIT", None)
    os.environ.setdefault("CUDA_HOME", cuda_home())
    try:
        import flashinfer
    except ImportError as error:
        raise StartupError(f"flashinfer-python is needed to build kernels: {error}") from None
    specs = kernels_for(args.models, args.kv_cache_dtype, args.arch)
    if not specs:
        raise StartupError(
            "FlashInfer has no kernels for these models: their attention is by ours, compiled at first use"
        )
    if args.list:
        print("\n".join(spec.name for spec in specs))
        return 0
    os.environ["FLASHINFER_EXTRA_CUDAFLAGS"] = headers([spec.name for spec in specs])
    libraries = compile_all(specs, args.jobs, args.work)
    target = Target(args.arch, flashinfer.__version__, nvcc_version().split(".")[0])
    size = write_kit(args.out, target, libraries, [directory.resolve().name for directory in args.models])
    print(f"{args.out}: {len(libraries)} kernels for {args.arch}, {size / 1e6:.1f} MB")
    return check(args.out)


def check(path: Path) -> int:
    """Say what a kit holds and what is wrong with it. Returns the exit code."""
    problems, manifest = problems_of(path), read_manifest(path)
    of = f"FlashInfer {manifest['flashinfer']}, CUDA {manifest['cuda']}, {manifest['arch']}"
    print(f"{path}: {len(manifest['kernels'])} kernels for {', '.join(map(str, manifest['models']))} ({of})")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def problems_of(path: Path) -> list[str]:
    """What would fail on a GPU, a line each. Raises StartupError for a file that is no whole kit."""
    manifest = read_manifest(path)
    target = Target(manifest["arch"], manifest["flashinfer"], manifest["cuda"])
    wanted = int(re.sub(r"\D", "", target.arch) or 0)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        unpacked, _ = open_kit(path, target, Path(folder))
        for name in manifest["kernels"]:
            try:
                library = read_library((unpacked / name / f"{name}.so").read_bytes())
            except ValueError as error:
                problems.append(f"{name}: {error}")
                continue
            missing = sorted(set(entry_points(name)) - library.functions)
            if not entry_points(name):
                problems.append(f"{name}: nothing here asks for such a kernel")
            if missing:
                problems.append(f"{name}: has no {', '.join(missing)}")
            if library.unresolved:
                problems.append(f"{name}: nothing brings {', '.join(library.unresolved[:3])}")
            if library.architectures != {wanted}:
                found = ", ".join(map(str, sorted(library.architectures))) or "no GPU"
                problems.append(f"{name}: its code is for {found}, not {wanted}")
            if not any(needed == f"libcudart.so.{target.cuda}" for needed in library.needed):
                problems.append(f"{name}: it is not linked to libcudart.so.{target.cuda}")
    return problems


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
    command.add_argument("--out", type=Path, default=KIT_OF_BUILD)
    command.add_argument("--jobs", type=int, default=default_jobs(), help="compilers that run at once")
    command.add_argument("--work", type=Path, default=Path("build/kernels"), help="where what is compiled stays")
    command.add_argument("--list", action="store_true", help="only say what would be compiled")
    command.set_defaults(run=build)
    command = commands.add_parser("check", help="say whether a kit will do")
    command.add_argument("file", type=Path)
    command.set_defaults(run=lambda args: check(args.file))
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the next build goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
