"""What config.json, or a file beside it, says of how a checkpoint is quantised. Which tensors that means is found out
by loading/schemes/. Imports no torch.
"""

from __future__ import annotations

from engine.config import StartupError
from engine.models.families.gpt_oss import is_mxfp4
from engine.models.fields import Fields, show
from engine.models.spec import Quantisation

# quant_method by the names that were given to it.
METHODS = {
    "auto-round": "auto-round",
    "auto_round": "auto-round",
    "autoround": "auto-round",
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "compressed_tensors": "compressed-tensors",
    "fbgemm_fp8": "fbgemm_fp8",
    "fp8": "fp8",
    "gptq": "gptq",
    "hqq": "hqq",
    "intel/auto-round": "auto-round",
    "modelopt": "modelopt",
    "modelopt_fp4": "modelopt",
    "modelopt_fp8": "modelopt",
    "modelopt_mixed": "modelopt",
    "torchao": "torchao",
}
KNOWN = ", ".join(dict.fromkeys(METHODS.values()))
# Files that older exports have in place of a field of config.json, and the method that each is of.
FILES = (
    ("hf_quant_config.json", "modelopt"),
    ("quantize_config.json", "gptq"),
    ("quant_config.json", "awq"),
    ("quantization_config.json", None),
)
# To what weights can be rounded as they are read.
ROUNDED = ("int8", "int4", "fp8")
FIELDS = ("quantization_config", "compression_config")


def quantisation_of(fields: Fields) -> Quantisation | None:
    """None where nothing is quantised, or the family reads it itself. Raises StartupError."""
    for name in FIELDS:
        if not fields.has(name) or (name == FIELDS[0] and is_mxfp4(fields)):
            continue
        scheme = fields.nested(name)
        assert scheme is not None
        return _made(scheme, _method(fields, name, scheme))
    if any(fields.has(name) for name in FIELDS) or fields.prefix or fields.path.name != "config.json":
        return None
    for file, method in FILES:
        path = fields.path.parent / file
        if path.is_file():
            scheme = Fields.read(path)
            given = scheme.raw("quant_method")
            found = METHODS.get(given) if isinstance(given, str) else method
            if found is None:
                scheme.fail("quant_method", f"({show(given)}) is not one of {KNOWN}")
            return _made(scheme, found)
    return None


def rounded_to(asked: str, own: Quantisation | None, *, given: str) -> str | None:
    """One of ROUNDED, or None where the checkpoint is taken as it is. asked: of --quantization. given: the model.

    Raises StartupError.
    """
    if asked == "auto":
        return None
    if asked in ROUNDED and (own is None or own.method != asked):
        if own is not None:
            raise StartupError(f"--quantization {asked}: {given} is quantised already, by {own.method}")
        return asked
    method = METHODS.get(asked)
    if method is None:
        known = ", ".join(dict.fromkeys(("auto", *ROUNDED, *METHODS.values())))
        raise StartupError(f"--quantization {asked[:40]!r} is none of {known}")
    if own is not None and own.method == method:
        return None
    if own is not None:
        raise StartupError(f"--quantization {asked}: {given} is quantised by {own.method}")
    could = f"{', '.join(ROUNDED[:-1])} or {ROUNDED[-1]}"
    raise StartupError(f"--quantization {asked}: {given} is not quantised; as it is read, it can become {could}")


def _method(fields: Fields, name: str, scheme: Fields) -> str:
    """Raises StartupError."""
    given = scheme.raw("quant_method")
    found = METHODS.get(given) if isinstance(given, str) else None
    if given is None and scheme.has("config_groups"):
        found = "compressed-tensors"
    if given is None and (scheme.raw("load_in_4bit") or scheme.raw("load_in_8bit")):
        found = "bitsandbytes"
    if found is None:
        parts = (given, scheme.raw("quant_algo"), scheme.raw("format"))
        told = ", ".join(str(part)[:40] for part in parts if part) or "unknown"
        fields.fail(name, f"({show(told)}) is not supported; supported are: {KNOWN}")
    return found


def _made(scheme: Fields, method: str) -> Quantisation:
    return Quantisation(method, scheme.as_json(), str(scheme.path), scheme.prefix)
