"""The safetensors files of a model directory: which tensors they hold, checked before a byte of them is used.

Used by weights.py at start, on the loading thread. Headers come from strangers: every length, offset, dtype and
shape is checked against the file. Imports no torch.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from engine.config import StartupError
from engine.models.fields import Fields
from engine.models.gguf.dequantise import DEQUANTISED
from engine.models.gguf.names import Undo

if TYPE_CHECKING:
    from engine.models.loading.schemes.base import Quantised

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# safetensors' own limit for a header, 100 MB.
MAX_HEADER_BYTES = 100_000_000
MAX_SHOWN_PROBLEMS = 3
MAX_DIMENSIONS = 8

# Bytes of an element, by safetensors' names. Only the float types of FLOATS can become weights.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
# e2m1, two to a byte, which the shape counts and torch's does not: read as the bytes that quantisers store as U8.
PAIRS = "F4"
FLOATS = ("F64", "F32", "F16", "BF16")
READ = FLOATS + DEQUANTISED
# Of matrices that stay in four bits: blocks of numbers, and their scales.
FOUR_BITS, BYTES = ("_blocks", "_scales"), ("U8",)
# In place of a dtype, of a weight that several tensors stand for.
QUANTISED = "quantised"
# Of tensors that are read while it is still found out what they are.
MAX_SMALL = 1 << 20

# Tensors that are saved although they are computed from config.json, or always the same (xIELU's beta and eps).
# The heads of a trainer's value and reward model say nothing of the next token, nor does a head that drafts several.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|act_fn\.(beta|eps))$|^(v_head|score|mtp)\."
)
# What quantised checkpoints hold in place of a weight, or beside it.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|weight_scale|weight_scale_inv|weight_scale_2|weight_packed|weight_shape|input_scale|"
    r"absmax|quant_map|quant_state\..*|SCB|blocks)$|_(blocks|scales)$"
)
_SHARD = re.compile(r"model-(\d{1,9})-of-(\d{1,9})\.safetensors")
# More are a typing error.
MAX_SHARDS = 100_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: absolute byte offsets [begin, end) in `file`. transposed: columns by rows, a matrix's.

    dtype: one of ITEM_BYTES, or a block type of GGUF. shift: was added to it and must be taken away.
    undo: what its numbers, as float32, are turned into. quantised: the tensors that it is made of, where dtype is
    QUANTISED; begin is 0 then, and end is how many bytes they have. members: the matrices of which it is a stack.
    stride: bytes from one row to the next, where rows are parts of wider ones in the file; 0 where they are whole.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    transposed: bool = False
    shift: float = 0.0
    undo: Undo | None = None
    quantised: Quantised | None = None
    members: tuple[StoredTensor, ...] = ()
    stride: int = 0


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory. Raises StartupError.

    The order is transformers': the file that config.json names in `transformers_weights`, model.safetensors, the index
    of shards. A whole set of shards without an index is read, too.
    """
    named = _named_file(directory)
    if named is not None:
        return _find_sharded(named) if named.name.endswith(".index.json") else read_header(named)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return read_header(single)
    if index.exists():
        return _find_sharded(index)
    for path in (single, index):
        if path.is_symlink():
            raise StartupError(f"{path}: is a link to a file that is not there; is the download complete?")
    shards = _numbered_shards(directory)
    if shards:
        return _merged(directory, [read_header(path) for path in shards])
    raise StartupError(f"{directory}: holds neither {SINGLE} nor {INDEX}{_other_files(directory)}")


def _named_file(directory: Path) -> Path | None:
    """The file of `transformers_weights` in config.json."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    name = Fields.read(path).raw("transformers_weights")
    if name is None:
        return None
    ends = (".safetensors", ".safetensors.index.json")
    if not isinstance(name, str) or name != Path(name).name or not name.endswith(ends):
        raise StartupError(f"{path}: transformers_weights must be the name of a safetensors file, not {name!r:.80}")
    return directory / name


def _numbered_shards(directory: Path) -> list[Path]:
    """model-00001-of-00002.safetensors and so on, all of them, or none where there is no such file."""
    found: dict[int, Path] = {}
    total = 0
    for path in directory.glob("model-*-of-*.safetensors"):
        if match := _SHARD.fullmatch(path.name):
            found[int(match[1])] = path
            total = max(total, int(match[2]))
    missing = [number for number in range(1, min(total, MAX_SHARDS) + 1) if number not in found]
    if missing:
        shown = ", ".join(f"{number:05d}" for number in missing[:MAX_SHOWN_PROBLEMS])
        raise StartupError(
            f"{directory}: of {total} shards {len(missing)} are not there ({shown}); is the download complete?"
        )
    return [found[number] for number in sorted(found)]


def _merged(directory: Path, parts: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    twice = []
    for part in parts:
        twice += [f"tensor {name} is in several files" for name in part if name in found]
        found |= part
    raise_all(directory, twice)
    return found


def _other_files(directory: Path) -> str:
    """What stands in place of the weights, for the error."""
    names = sorted(path.name for path in directory.glob("*") if path.is_file() or path.is_symlink())
    for name in names:
        if name.startswith("adapter_model."):
            return f"; {name} is an adapter, which must be merged into its base model"
        if name.startswith("consolidated."):
            return f"; {name} is in a layout that is not read; the same model is published for transformers, too"
        if re.fullmatch(r"model\..+\.safetensors", name):
            return f"; {name} is a variant: to serve it, call it {SINGLE}"
        if name.endswith(".safetensors"):
            return f"; {name} has another name"
    formats = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt"))]
    formats.sort(key=lambda name: not name.startswith("pytorch_model"))
    return f"; {formats[0]} is not a format that is read" if formats else ""


def _find_sharded(index: Path) -> dict[str, StoredTensor]:
    try:
        text = index.read_bytes()
    except OSError as error:
        raise StartupError(f"{index}: {error.strerror}") from None
    weight_map = _read_json(index, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f"{index}: weight_map must be an object that names the file of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise StartupError(f"{index}: tensor {name}: {file!r} is not the name of a safetensors file")
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if not path.exists():
            raise StartupError(f"{path}: is named by {index.name} but does not exist; is the download complete?")
        # Whatever the files hold counts, as in transformers; where a name is in two of them, the index decides.
        for name, tensor in read_header(path).items():
            if name not in found or weight_map.get(name) == file:
                found[name] = tensor
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against its size. Raises StartupError.

    Format: 8 bytes little endian header length, a JSON object name -> {dtype, shape, data_offsets}, the data.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length == int.from_bytes(b"version ", "little"):
                raise StartupError(f"{path}: is a pointer of Git LFS; `git lfs pull` fetches the file itself")
            if size < 8 or length > size - 8:
                problem = f"header of {length} bytes in a file of {size}: truncated or not safetensors"
                raise StartupError(f"{path}: {problem}")
            if length > MAX_HEADER_BYTES:
                raise StartupError(f"{path}: header of {length} bytes is longer than {MAX_HEADER_BYTES}")
            header = _read_json(path, file.read(length))
    except OSError as error:
        raise StartupError(f"{path}: cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = _read_entry(path, entry, data, size)
        except ValueError as problem:
            raise StartupError(f"{path}: tensor {name}: {problem}") from None
    end, before = data, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin < end and tensor.end > tensor.begin:
            raise StartupError(f"{path}: tensor {name}: its data overlaps that of {before}")
        end, before = max(end, tensor.end), name
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file, whose header was read before, says beside its tensors. Raises StartupError."""
    try:
        with path.open("rb") as file:
            found = _read_json(path, file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    except OSError as error:
        raise StartupError(f"{path}: cannot be read: {error.strerror}") from None
    found = found if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def read_bytes(tensor: StoredTensor) -> bytes:
    """Of a small tensor. Raises StartupError."""
    if tensor.end - tensor.begin > MAX_SMALL:
        raise StartupError(f"{tensor.file}: a tensor of {tensor.end - tensor.begin} bytes is not a few numbers")
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            return file.read(tensor.end - tensor.begin)
    except OSError as error:
        raise StartupError(f"{tensor.file}: cannot be read: {error.strerror}") from None


def read_integers(tensor: StoredTensor) -> list[int]:
    """Of a small tensor of integers. Raises StartupError."""
    size, data = ITEM_BYTES[tensor.dtype], read_bytes(tensor)
    parts = (data[at : at + size] for at in range(0, len(data), size))
    return [int.from_bytes(part, "little", signed=tensor.dtype.startswith("I")) for part in parts]


def _read_entry(path: Path, entry: Any, data: int, size: int) -> StoredTensor:
    """One header entry; ValueError says what is wrong with it. data: offset of the data. size: of the file."""
    if not isinstance(entry, dict):
        raise ValueError("its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or (dtype not in ITEM_BYTES and dtype != PAIRS):
        raise ValueError(f"unknown dtype {dtype!r:.40}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"impossible shape {shape!r:.60}")
    if dtype == PAIRS:
        if not shape or shape[-1] % 2:
            raise ValueError(f"{dtype} of shape {shape!r:.60} has no whole bytes in a row")
        dtype, shape = "U8", [*shape[:-1], shape[-1] // 2]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"impossible data_offsets {offsets!r:.60}")
    begin, end = offsets
    if data + end > size:
        raise ValueError(f"its data ends at byte {data + end} of a file of {size}: truncated")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise ValueError(f"{dtype} {shape} takes {expected} bytes but data_offsets span {end - begin}")
    return StoredTensor(path, dtype, tuple(shape), data + begin, data + end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _read_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name stands twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path}: header is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise StartupError(f"{path}: header is not a JSON object")
    return values


def check(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Collection[str] = (),
    assumed: Collection[str] = (),
) -> None:
    """Compare what a model needs (name -> shape) with what is there; one StartupError names the first problems.

    assumed: sizes that config.json does not name.
    """
    problems, quantized = [], [name for name in tensors if _QUANTIZED.search(name) and name not in expected]
    if quantized:
        problems.append(
            f"tensor {quantized[0]} is of a quantized checkpoint, but no quantization_config tells how to read it"
        )
    hint = ""
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"tensor {name} {list(shape)} is missing")
        elif tensor.shape != shape:
            problems.append(
                f"{tensor.file.name}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
            sizes = ", ".join(name for name in assumed if name != "tie_word_embeddings")
            hint = f"; config.json has no {sizes}: the defaults of the class count" if sizes else ""
        elif tensor.dtype not in (wanted := BYTES if name.endswith(FOUR_BITS) else READ) and tensor.quantised is None:
            problems.append(f"{tensor.file.name}: tensor {name} has dtype {tensor.dtype}, only {wanted} are read")
    problems += [
        f"{tensor.file.name}: tensor {name} is not part of the model"
        for name, tensor in tensors.items()
        if name not in expected and name not in ignored and not _HARMLESS.search(name) and 0 not in tensor.shape
    ]
    raise_all(directory, problems, hint)


def raise_all(directory: Path, problems: list[str], hint: str = "") -> None:
    """Raise one line with the first few problems and the number of the others; nothing without problems."""
    if not problems:
        return
    more = len(problems) - MAX_SHOWN_PROBLEMS
    shown = "; ".join(problems[:MAX_SHOWN_PROBLEMS])
    raise StartupError(f"{directory}: {shown}" + (f"; and {more} more such problems" if more > 0 else "") + hint)


class MappedFiles:
    """Read-only maps of the files, so that bytes go from the page cache to their final place without a copy of
    the file in memory. `release` gives mapped pages back: they count as resident until then.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def get(self, path: Path, minimum_size: int) -> mmap.mmap:
        """The map of a file that must still be `minimum_size` bytes long. Raises StartupError."""
        mapped = self._maps.get(path)
        if mapped is None:
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise StartupError(f"{path}: cannot be mapped: {error}") from None
            self._maps[path] = mapped
            if hasattr(mmap, "MADV_SEQUENTIAL"):
                mapped.madvise(mmap.MADV_SEQUENTIAL)
        if len(mapped) < minimum_size:
            raise StartupError(f"{path}: has shrunk to {len(mapped)} bytes while it was loaded")
        return mapped

    def release(self, path: Path, begin: int, end: int) -> None:
        """Let go of the pages that hold [begin, end). Data that shares a page with them is simply read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin -= begin % mmap.PAGESIZE
            self._maps[path].madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        # The maps go when the last tensor that looks into them goes; closing under a view would raise.
        self._maps.clear()
