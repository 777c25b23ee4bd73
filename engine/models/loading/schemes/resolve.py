"""From the tensors of a quantised checkpoint to one for every weight, by the way that config.json names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.config import StartupError
from engine.models.fields import Fields
from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.schemes.auto_round import AutoRound
from engine.models.loading.schemes.awq import Awq
from engine.models.loading.schemes.base import FLOATS, Mismatch, Scheme
from engine.models.loading.schemes.bitsandbytes import BitsAndBytes
from engine.models.loading.schemes.compressed_tensors import CompressedTensors
from engine.models.loading.schemes.float8 import Float8
from engine.models.loading.schemes.floats import EXPONENTS
from engine.models.loading.schemes.gptq import Gptq
from engine.models.loading.schemes.hqq import Hqq
from engine.models.loading.schemes.modelopt import Modelopt
from engine.models.loading.schemes.shaped import as_stored, float8_members
from engine.models.loading.schemes.torchao import Torchao
from engine.models.spec import Quantisation

# By quant_method, as registry.py has normalised it.
SCHEMES: dict[str, Callable[[Fields], Scheme]] = {
    "auto-round": AutoRound,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Float8,
    "fp8": Float8,
    "gptq": Gptq,
    "hqq": Hqq,
    "modelopt": Modelopt,
    "torchao": Torchao,
}

# How the scales of all experts of a layer are called, after the name of their tensor.
_STACKED_SCALES = ("_scale_inv", "_weight_scale", "_scale", "_weight_scale_inv")

# How activations were quantised, by a scale that does not change; here they never are.
_ACTIVATIONS = re.compile(
    r"[._](activation_scale|input_scale|input_zero_point|input_global_scale|input_scale_ub|input_amax|qscale_act|"
    r"output_scale|output_zero_point|weight_observer\..*|input_observer\..*)$"
)
# Of a cache of keys and values in eight bits.
_CACHE = re.compile(
    r"\.(k_scale|v_scale|q_scale|k_zero_point|v_zero_point|q_zero_point|kv_scale|k_bmm_quantizer\._amax|"
    r"v_bmm_quantizer\._amax)$|\.[kv]_proj\.output_scale$"
)


@dataclass(frozen=True, slots=True)
class Left:
    """How much of it is not used. activations: fixed scales of inputs. cache: scales of keys and values."""

    activations: int = 0
    cache: int = 0


def with_quantised(tensors: Mapping[str, StoredTensor], how: Quantisation) -> tuple[dict[str, StoredTensor], Left]:
    """The same with one tensor, `NAME.weight`, in place of all those that stand for it. Raises StartupError."""
    path = Path(how.path)
    scheme = SCHEMES[how.method](Fields(path, json.loads(how.config), how.prefix))
    found: dict[str, StoredTensor] = {}
    modules: dict[str, dict[str, StoredTensor]] = {}
    suffixes = sorted(scheme.suffixes, key=len, reverse=True)
    cache = activations = 0
    for name, tensor in tensors.items():
        suffix = next((each for each in suffixes if name.endswith(each)), None)
        if _CACHE.search(name):
            cache += 1
        elif _ACTIVATIONS.search(name):
            activations += 1
        elif suffix is not None:
            modules.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
        else:
            found[name] = tensor
    for module, parts in modules.items():
        file = next(iter(parts.values())).file
        try:
            matrix = scheme.matrix(module, parts)
        except Mismatch as problem:
            raise StartupError(f"{file}: tensor {module}.weight ({how.method}): {problem}") from None
        if matrix is None:
            found |= {module + suffix: tensor for suffix, tensor in parts.items()}
        else:
            found[f"{module}.weight"] = as_stored(matrix)
    _stack(found, scheme.block if isinstance(scheme, Float8) else None)
    return found, Left(activations, cache)


def _stack(found: dict[str, StoredTensor], block: tuple[int, int] | None) -> None:
    """Tensors of e4m3 that hold the matrices of all experts of a layer, with their scales; in place."""
    for name, tensor in list(found.items()):
        if tensor.dtype != "F8_E4M3" or len(tensor.shape) != 3 or 0 in tensor.shape:
            continue
        stem = name.removesuffix(".weight")
        names = [f"{each}{end}" for each in (name, stem, f"{stem}.weight") for end in _STACKED_SCALES]
        scale = next((each for each in names if each in found), None)
        if scale is None or found[scale].dtype not in (*FLOATS, *EXPONENTS):
            continue  # `check` says it
        try:
            members = float8_members(tensor, found[scale], block)
        except Mismatch as problem:
            raise StartupError(f"{tensor.file}: tensor {name}: {problem}") from None
        del found[scale]
        found[name] = dataclasses.replace(tensor, members=tuple(as_stored(each) for each in members))
