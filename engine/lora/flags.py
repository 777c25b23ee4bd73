"""The flags of LoRA adapters, in vLLM's and SGLang's spelling, and the options that they make. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from engine.config import LoraModule, LoraOptions, StartupError, shortened

MAX_LORAS = 1024
_NAME_KEYS, _PATH_KEYS = ("name", "lora_name"), ("path", "lora_path")
_KNOWN = {*_NAME_KEYS, *_PATH_KEYS, "base_model_name", "pinned"}
# Where vLLM's resolver looks for adapters whose name nobody has loaded.
_ROOT_VARIABLE = "VLLM_LORA_RESOLVER_CACHE_DIR"


def _module(text: str) -> LoraModule:
    """NAME=PATH, a PATH whose last part is the name, or JSON as vLLM or SGLang write it."""
    if not text.lstrip().startswith("{"):
        name, equals, path = text.partition("=")
        path = path if equals else text
        name = name if equals else Path(path).name
        if not name or not path:
            raise argparse.ArgumentTypeError(f"'{shortened(text)}' is not NAME=PATH")
        return LoraModule(name, path)
    try:
        given: Any = json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{shortened(text)}' is no JSON object") from None
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        names = ", ".join(sorted(_KNOWN))
        raise argparse.ArgumentTypeError(f"an adapter has no '{shortened(unknown[0])}'; it has {names}")
    own_name = next((given[key] for key in _NAME_KEYS if key in given), None)
    own_path = next((given[key] for key in _PATH_KEYS if key in given), None)
    base, pinned = given.get("base_model_name"), given.get("pinned", False)
    if not (isinstance(own_name, str) and own_name and isinstance(own_path, str) and own_path):
        raise argparse.ArgumentTypeError("an adapter needs a name and a path, both texts")
    if not isinstance(pinned, bool) or not (base is None or isinstance(base, str)):
        raise argparse.ArgumentTypeError("`pinned` is true or false, and `base_model_name` a text")
    return LoraModule(own_name, own_path, pinned, base)


def _between(low: int, high: int) -> Any:
    def read(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"'{text}' must be an integer from {low} to {high}")
        return number

    return read


def add_flags(parser: argparse.ArgumentParser) -> None:
    lora = parser.add_argument_group("LoRA adapters")
    lora.add_argument(
        "--enable-lora",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="serve LoRA adapters (default: where another of these flags names some)",
    )
    lora.add_argument(
        "--lora-modules",
        "--lora-paths",
        dest="lora_modules",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        type=_module,
        help="adapters to load at start; a PATH alone is named by its last part; or JSON, with base_model_name, pinned",
    )
    lora.add_argument(
        "--max-loras",
        type=_between(1, MAX_LORAS),
        metavar="N",
        help="adapters that may take part in one step (default: 8)",
    )
    lora.add_argument(
        "--max-loras-per-batch",
        type=_between(2, MAX_LORAS + 1),
        metavar="N",
        help="SGLang's word for it, which counts requests without an adapter as one",
    )
    lora.add_argument(
        "--max-lora-rank", type=_between(1, 4096), metavar="N", help="highest rank of an adapter (default: 64)"
    )
    lora.add_argument(
        "--max-lora-mib",
        type=_between(1, 1_000_000),
        metavar="N",
        help="on a GPU: memory of each adapter of --max-loras, in MiB, where whole matrices or experts need more than "
        "the default, or small adapters less (default: what factors of --max-lora-rank take, without experts)",
    )
    lora.add_argument(
        "--max-cpu-loras",
        type=_between(1, 1_000_000),
        metavar="N",
        help="adapters kept in host memory; others are read again (default: 32, or --max-loras if that is more)",
    )
    lora.add_argument(
        "--max-loaded-loras",
        type=_between(1, 1_000_000),
        metavar="N",
        help="names of adapters that are known at once (default: 10000)",
    )
    lora.add_argument(
        "--lora-root",
        metavar="DIR",
        help="the only directory that clients may load adapters from; a name that is not known is looked for there "
        f"(default: the environment's {_ROOT_VARIABLE}, or none)",
    )
    lora.add_argument(
        "--lora-unload",
        choices=("wait", "refuse"),
        default="wait",
        help="an adapter in use: unload it when its requests have ended, or answer 409 (default: wait)",
    )
    lora.add_argument("--lora-eviction-policy", choices=("lru",), default="lru", help=argparse.SUPPRESS)


def options_from(args: argparse.Namespace) -> LoraOptions:
    """Raises StartupError for flags that contradict each other."""
    modules = tuple(args.lora_modules or ())
    if args.max_loras is not None and args.max_loras_per_batch is not None:
        raise StartupError("--max-loras and --max-loras-per-batch are two words for one number (N and N + 1)")
    per_batch = args.max_loras_per_batch
    max_loras = args.max_loras or (8 if per_batch is None else per_batch - 1)
    enable = args.enable_lora
    if enable is None:
        enable = bool(modules) or args.lora_root is not None
    if not enable and (modules or args.lora_root is not None):
        raise StartupError("--no-enable-lora and adapters (--lora-modules, --lora-root) exclude each other")
    if not enable and args.max_lora_mib is not None:
        raise StartupError("--max-lora-mib is the memory of adapters, and none are served (--enable-lora)")
    root = args.lora_root
    if root is None and enable:
        root = os.environ.get(_ROOT_VARIABLE) or None
    if root is not None and not Path(root).expanduser().is_dir():
        raise StartupError(f"--lora-root {root}: no such directory")
    if args.max_cpu_loras is not None and args.max_cpu_loras < max_loras:
        raise StartupError(f"--max-cpu-loras {args.max_cpu_loras} is less than the {max_loras} adapters of one step")
    if sum(module.pinned for module in modules) >= max_loras:
        raise StartupError(f"at most {max_loras - 1} adapters can be pinned where {max_loras} take part in a step")
    return LoraOptions(
        enable=enable,
        max_loras=max_loras,
        max_lora_rank=args.max_lora_rank or 64,
        max_lora_mib=args.max_lora_mib,
        max_cpu_loras=args.max_cpu_loras,
        max_loaded=args.max_loaded_loras or 10_000,
        modules=modules,
        root=root,
        unload=args.lora_unload,
    )
