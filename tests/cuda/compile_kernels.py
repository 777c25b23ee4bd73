"""Compiles every Triton kernel for an H100 / H200 (sm_90) as its wrapper would launch it; no GPU is needed for that.

`python -m tests.cuda.compile_kernels`: run by test_compile.py in a process of its own, for Triton decides once, when
it is imported, whether it interprets. Prints a line of JSON for each variant, with what its machine code needs; what
does not compile raises.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

warnings.simplefilter("ignore")  # of Triton's own defaults

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

# What a block may have on these GPUs, in bytes.
SHARED_MEMORY = 227 * 1024
# Kernels whose loads of 16 bytes are counted in every variant.
WIDE = {"_skinny", "_gate_and_mul", "_segments", "_choose", "_weigh"}
WIDE_LOAD = r"\bLDG\.E\S*\.128\b"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Of those launched so far: what is known, and machine code that is to be taken apart, or None.
COMPILED: list[tuple[dict[str, Any], bytes | None]] = []


def size_of(cubin: bytes) -> dict[str, int]:
    """registers of a thread and stack (bytes that did not fit there), by the tool that Triton has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _said_by("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text[:500]
    return {"registers": int(found[1]), "stack": int(found[2])}


def taken_apart(codes: list[bytes]) -> list[str]:
    """The instructions of each, in words. All at once: the tool takes longer to start than for a kernel."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        lines = _said_by("nvdisasm", "-b", "SM90", file.name).splitlines()
    ends = list(itertools.accumulate(map(len, codes)))
    found: list[list[str]] = [[] for _ in codes]
    for line in lines:
        if (match := re.match(r"\s*/\*([0-9a-f]+)\*/", line)) is not None:
            found[bisect.bisect(ends, int(match[1], 16))].append(line)
    assert all(found)
    return ["\n".join(each) for each in found]


def instructions_of(cubin: bytes) -> bytes:
    """The only section of code of an ELF file."""
    (sections,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", cubin, sections + number * size) for number in range(count)]
    codes = [
        cubin[begin : begin + length]
        for name, _, _, _, begin, length in found
        if cubin.startswith(b".text.", found[names][4] + name)
    ]
    assert len(codes) == 1
    return codes[0]


def what_is_in(text: str) -> dict[str, int]:
    """Of instructions: loads of 16 bytes, and of programmatic dependent launch: loads before the wait, stores and ends
    before it."""
    # What comes before the wait for the kernel ahead; all of it, where there is no wait.
    ahead, wait, _ = text.partition("ACQBULK")
    return {
        "wide_loads": len(re.findall(WIDE_LOAD, text)),
        "waits": bool(wait),
        "lets_next_begin": "PREEXIT" in ahead,
        "loads_ahead": len(re.findall(r"\bLD(?:G|\.E)\b", ahead)),
        "wide_loads_ahead": len(re.findall(WIDE_LOAD, ahead)),
        "too_early": len(re.findall(r"\b(?:STG|ST\.E|RED|ATOMG|EXIT)\b", ahead.replace("PREEXIT", ""))),
    }


def _said_by(tool: str, *words: str) -> str:
    return subprocess.run([TOOLS / tool, *words], capture_output=True, text=True, check=True, timeout=60).stdout


def compile_only() -> None:
    """From now on a launch compiles and does not run."""
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    triton.runtime.driver.set_active(driver)

    def getitem(kernel: Any, grid: Any) -> Callable[..., object]:
        def launch(*args: Any, **options: Any) -> object:
            assert all(1 <= size <= limit for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False)), grid
            found = kernel.run(*args, grid=grid, warmup=True, **options)
            assert found.metadata.shared <= SHARED_MEMORY, f"{kernel.__name__} needs {found.metadata.shared} bytes"
            cubin = found.asm["cubin"]
            assert len(cubin)
            tensors = [str(argument.dtype) for argument in args if isinstance(argument, Tensor)]
            line = {"name": kernel.__name__, "types": tensors, "warps": found.metadata.num_warps}
            constants = {name: value for name, value in options.items() if name.isupper()}
            is_first = all(each["name"] != kernel.__name__ for each, _ in COMPILED)
            code = instructions_of(cubin) if kernel.__name__ in WIDE or is_first else None
            COMPILED.append((line | constants | size_of(cubin), code))
            return found

        return launch

    JITFunction.__getitem__ = getitem


def tell() -> None:
    """The lines."""
    texts = iter(taken_apart([code for _, code in COMPILED if code is not None]))
    for line, code in COMPILED:
        print(json.dumps(line | (what_is_in(next(texts)) if code is not None else {})))


def calls(dtype: torch.dtype, rows: int) -> None:
    """Every wrapper once, on the shapes of Llama-3.2-1B with `rows` rows."""
    from engine.ops.gated import TILES
    from engine.ops.sampling.layout import WORDS
    from engine.ops.skinny import BLOCKS
    from engine.ops.triton import (
        activation,
        drafts,
        experts,
        extras,
        gated,
        norm,
        prepare,
        ranks,
        rope,
        sampling,
        skinny,
    )

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind)

    ints, longs = torch.int32, torch.int64
    x = empty(rows, 2048)
    norm.rms_norm(x, empty(2048), 1e-5)
    norm.rms_norm(empty(rows * 32, 64), empty(64, kind=torch.float32), 1e-6)
    norm.add_rms_norm(x, empty(rows, 2048), empty(2048), 1e-5)
    for size, bias in itertools.product((2, 4, 8), (None, empty(2048, kind=torch.float32))):
        ranks.add_up(empty(size, rows, 2048), bias)
    for gelu in (False, True):
        activation.gate_and_mul(empty(rows, 16384), gelu=gelu)
    # What no GPU is served in is compiled less often.
    is_served = dtype is not torch.float32
    for tile in TILES[: None if is_served else 1] if rows > 1 else ():
        gated.gated_product(empty(8 * rows, 2048), empty(16384, 2048), None, "silu", tile)
    for few, blocks in itertools.product((1, 2, 4), BLOCKS) if rows == 1 else ():
        square, norm = empty(2048, 2048), (empty(2048), 1e-5)
        skinny.skinny_product(empty(few, 2048), square, empty(2048), blocks, None, norm)
        if few == 2:
            continue  # between the others, and written as they are
        skinny.skinny_product(empty(few, 2048), square, None, blocks, None, None, empty(few, 2048))
        skinny.skinny_product(empty(few, 2048), empty(16384, 2048), None, blocks, "silu", norm)
    q, k, v = empty(rows, 48, 64).split([32, 8, 8], dim=1)
    for pool in (dtype, torch.float8_e4m3fn):
        pools = [empty(16, 16, 8, 64, kind=pool) for _ in range(2)]
        for table in (empty(4096, 64, kind=torch.float32), None):
            norms = (empty(64), empty(64), 1e-6) if table is not None else None
            rope.rope_and_write_kv(q, k, v, table, empty(rows, kind=ints), empty(rows, kind=ints), *pools, norms)
    latents = empty(rows, 1, 576)
    table = empty(4096, 64, kind=torch.float32)
    rope.rotate(empty(rows, 16, 576)[..., 512:], latents[..., 512:], table, empty(rows, kind=ints))
    for many in (rows, 64 * rows) if is_served else (rows,):  # the last of 64 rows: tiles of 64 and of 128
        gate_up, down = empty(16, 1536, 2048), empty(16, 2048, 768)
        tokens, ratings = empty(many, 2048), empty(many, 16)
        experts.mix_experts(tokens, ratings, gate_up, down, 4, "silu", normalize=True)
        # Of a rank that has half of them.
        experts.mix_experts(tokens, empty(many, 32), gate_up, down, 4, "silu", normalize=True, held=(16, 32))
    numbers = empty(rows, kind=ints)
    for given in (None, numbers):
        tables = empty(1, 9, 128, kind=ints)
        prepare.prepare(tables, empty(9, kind=ints), numbers, numbers, numbers, numbers, 64, 16, given)
    drafts.accept_drafts(numbers, numbers, numbers, empty(9, kind=ints))
    raw, logits = empty(rows, 128256), empty(rows, 128256, kind=torch.float32)
    slots = empty(rows, kind=longs)
    bias, counts = empty(9, 128256, kind=torch.float32), empty(9, 128256, kind=ints)
    tables = counts, empty(9, 128256, kind=torch.bool), empty(9, 3, kind=torch.float32)
    extras.adjust(logits, slots, bias, *tables)
    extras.adjust(logits, slots, bias, None, None, None)
    extras.adjust(logits, slots, bias, *tables, empty(rows, kind=ints))
    params, out = empty(9, WORDS, kind=ints), empty(rows, kind=ints)
    sampling.sample_rows(raw, params, numbers, numbers, numbers, out, None, filtered=True)
    if is_served:
        attention(dtype, rows)
        recurrent(dtype, rows)
        coded_weights(dtype, rows)
        coded_experts(dtype, rows)
        adapters(dtype, rows)
    if rows == 1:  # open steps, and those with prompts
        sampling.sample_rows(logits, params, numbers, numbers, numbers, out, numbers, filtered=True)


def attention(dtype: torch.dtype, rows: int) -> None:
    """Shapes of gpt-oss, Gemma 4, Llama 4, MiMo and Phi-2, caps, and pools of float8: of one row, split contexts and
    short prompts."""
    from engine.groups import Chunk
    from engine.ops.triton.attention import decode_attention
    from engine.ops.triton.prompts import prompt_attention

    ints, float8 = torch.int32, torch.float8_e4m3fn
    many: list[tuple[tuple[int, int], tuple[int, int], torch.dtype, dict[str, Any]]] = [
        ((64, 8), (64, 64), dtype, {"window": 128, "sinks": torch.empty(64)}),
        ((16, 8), (256, 256), dtype, {"softcap": 50.0}),
        ((40, 8), (128, 128), dtype, {"window": Chunk(8192)}),
        ((40, 8), (128, 128), float8, {}),
        ((64, 4), (192, 128), dtype, {}),
        ((32, 32), (80, 80), dtype, {}),
        ((8, 1), (256, 256), dtype, {}),
        ((8, 4), (256, 256), float8, {"softcap": 50.0, "window": 4096}),
    ]
    for (heads, kv_heads), dims, kind, more in many:
        pools = [torch.empty((16, 16, kv_heads, dim), dtype=kind) for dim in dims]
        each, starts = torch.empty(rows, dtype=ints), torch.empty(rows + 1, dtype=ints)
        q = torch.empty((rows, heads, dims[0]), dtype=dtype)
        # A single KV head in as many parts as there may be.
        width = 2048 if rows == kv_heads == 1 else 64
        decode_attention(q, *pools, torch.empty((rows, width), dtype=ints), each, 0.1, **more)
        length = 3 if rows == 1 else 128
        q = torch.empty((rows * length, heads, dims[0]), dtype=dtype)
        where = starts, starts, torch.empty(64, dtype=ints), each
        prompt_attention(q, *pools, *where, 0.1, max_len=length, **more)


def coded_weights(dtype: torch.dtype, rows: int) -> None:
    """Products with weights that stay codes, in every form; every tile of few rows by codes of eight bits, and of many
    by codes of four."""
    from engine.ops.device_coded import FORMS, FOUR_BITS, TILES, Codes, tile_rows
    from engine.ops.triton import coded

    for form in FORMS:
        codes = torch.empty((2048, 1024 if form in FOUR_BITS else 2048), dtype=torch.uint8)
        scale = torch.empty((64, 2048), dtype=torch.bfloat16 if form == "e2m1" else torch.float16)
        low = torch.empty((64, 2048), dtype=torch.float32) if form.endswith("low") else None
        weight = Codes(form, codes, scale, low, 2048, 32, torch.empty(16) if form == "table" else None)
        x, bias = torch.empty((rows, 2048), dtype=dtype), torch.empty(2048, dtype=dtype)
        for tile in TILES if form == ("e4m3" if rows == 1 else "int4") else TILES[:1]:
            coded.coded_product(x, weight, bias, (tile_rows(rows), *tile))
        if rows == 1:
            coded.widened(weight, dtype)
            if form == "int4":
                coded.widened(weight, dtype, torch.empty(9, dtype=torch.int32))


def coded_experts(dtype: torch.dtype, rows: int) -> None:
    """Experts that stay codes, in every form; of gpt-oss' every tile, each height of them, and what else it adds."""
    from engine.ops.activation import Clamped
    from engine.ops.device_coded import FORMS, FOUR_BITS, Codes
    from engine.ops.experts import CODED_ROWS, CODED_TILES
    from engine.ops.triton import experts

    def codes_of(form: str, matrix_rows: int, columns: int) -> Codes:
        codes = torch.empty((16 * matrix_rows, columns // 2 if form in FOUR_BITS else columns), dtype=torch.uint8)
        dtype = torch.bfloat16 if form == "e2m1" else torch.float16
        scale = torch.empty((columns // 32, 16 * matrix_rows), dtype=dtype)
        low = torch.empty(scale.shape, dtype=torch.float32) if form.endswith("low") else None
        return Codes(form, codes, scale, low, columns, 32, torch.empty(16) if form == "table" else None)

    x, logits = torch.empty((rows, 2048), dtype=dtype), torch.empty((rows, 16), dtype=dtype)
    clamped = Clamped(7.0, 1.7), (torch.empty((16, 1536), dtype=dtype), torch.empty((16, 2048), dtype=dtype))
    for form in FORMS:
        given = (x, logits, codes_of(form, 1536, 2048), codes_of(form, 2048, 768), 4)
        activation, biases = clamped if form == "e2m1" else ("silu", (None, None))
        how: dict[str, Any] = {"normalize": True, "biases": biases}
        if rows == 1:
            experts.mix_experts(*given, activation, **how, coded=(16, CODED_TILES[0]))
        else:
            low, high = CODED_ROWS
            ways = [(high, CODED_TILES[0])] if form in ("e2m1", "e4m3", "int4") else []
            if form == "e2m1":
                ways += [(low, CODED_TILES[0]), (high, CODED_TILES[1]), (low, CODED_TILES[2])]
            for way in ways:
                experts.mix_experts(*given, activation, **how, coded=way)
            if form == "e2m1":
                experts.mix_experts(*given, activation, **how)


def recurrent(dtype: torch.dtype, rows: int) -> None:
    """Layers with a state, on shapes of Qwen3-Next and of Nemotron-H: decode steps of one row, else prompts."""
    from engine.ops.recurrence import Recurrence
    from engine.ops.state import RowsOnDevice
    from engine.ops.triton import recurrence

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind)

    wide, ints = torch.float32, torch.int32
    slots, indptr = empty(rows, kind=ints), None if rows == 1 else empty(rows + 1, kind=ints)
    where = RowsOnDevice(slots, indptr, rows)
    # With drafts, before and after it is known which are right.
    drafted = [RowsOnDevice(slots, indptr, max(rows, 9), 9, slots), RowsOnDevice(slots, None, 9, 9, slots, slots)]
    for delta, key_heads, heads, value_dim in ((True, 16, 32, 128), (False, 8, 128, 64)):
        keys, values = key_heads * 128, heads * value_dim
        x, weight = empty(rows, 2 * keys + values), empty(4, 2 * keys + values, kind=wide)
        bias, states = (None if delta else empty(len(weight[0]), kind=wide)), empty(9, 3, len(weight[0]))
        for there in (where, *drafted):
            recurrence.causal_conv(x, weight, bias, states, there, silu=True)
        each = empty(heads, kind=wide)
        sizes = {"key_heads": key_heads, "heads": heads, "key_dim": 128, "value_dim": value_dim}
        what = Recurrence(delta=delta, **sizes, rate=each, step_bias=each, skip=None if delta else each)
        q, k, v = x.split([keys, keys, values], 1)
        step, share = empty(rows, 2 * heads).split(heads, 1)
        state = empty(9, heads, 128, value_dim, kind=wide)
        for there in (where, *drafted):
            recurrence.recur(what, q, k, v, step, share if delta else None, state, there)
        parts = heads if delta else key_heads
        recurrence.gated_norm(v, v, empty(values // parts, kind=wide), 1e-6, parts, gate_first=not delta)
    recurrence.causal_conv(empty(rows, 2048), empty(3, 2048, kind=wide), None, empty(9, 2, 2048), where, silu=False)
    for silu in (False, True):
        recurrence.gate(v, v, silu=silu)


def adapters(dtype: torch.dtype, rows: int) -> None:
    """The fused layer of queries, keys and values, one whose outputs begin on no multiple of 16 and may be an adapter's
    own, and an embedding."""
    from engine.ops.lora_device import FIELDS, DeviceSite, Grouped, Shelf, SiteShape

    fused = SiteShape(2048, 3072, ((0, 2048), (2048, 2560), (2560, 3072)), 64)
    table = SiteShape(128256, 2048, ((0, 2048),), 64, is_table=True)
    shelf = Shelf([fused, SiteShape(8192, 2045, ((0, 2045),), 64, replaced=True), table], 8, dtype)
    shelf.memory = torch.empty((8, shelf.room), dtype=dtype)
    shelf.table = torch.empty((9, 3 * FIELDS), dtype=torch.int32)
    blocks = 8 if rows == 1 else 40
    given = Grouped(torch.empty(blocks * 32, dtype=torch.int32), torch.empty(blocks, dtype=torch.int32))
    for number, shape in enumerate(shelf.shapes):
        site, y = DeviceSite(shelf, number, torch.device("cpu")), torch.empty(rows, shape.out_features, dtype=dtype)
        if shape.is_table:
            site.look_up_by_kernel(torch.empty(rows, dtype=torch.int32), y, given)
        else:
            site.by_kernels(torch.empty(rows, shape.in_features, dtype=dtype), y, given)
    pairs = torch.empty(8 * rows, fused.out_features, dtype=dtype)
    first = DeviceSite(Shelf([fused] * 128, 8, dtype), 0, torch.device("cpu"))
    first.shelf.memory, first.shelf.table = shelf.memory, torch.empty((9, 128 * FIELDS), dtype=torch.int32)
    first.add_pairs(torch.empty(rows, fused.in_features, dtype=dtype), pairs, given, 128, 8)


def main() -> None:
    compile_only()
    for dtype, rows in ((torch.bfloat16, 1), (torch.bfloat16, 64), (torch.float32, 3)):
        calls(dtype, rows)
    tell()


if __name__ == "__main__":
    main()
