"""Every Triton kernel compiles for the GPUs this is made for; what they compute is in test_triton.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# Registers of a thread, where more than 64 are meant.
BUDGETS = {
    "_skinny": 240,
    "_draw": 120,
    "_choose": 80,
    "_recur": 200,
    "_causal_conv": 96,
    "_shrink": 80,
    "_expand": 168,
    "_replace": 168,
    "_look_up": 120,
    "_codes": 255,
    "_multiply_codes": 168,
    "_attend": 255,
    "_attend_prompts": 255,
    "_combine": 128,
}
# Read weights before they wait for the kernel ahead.
AHEAD = ("_skinny", "_rms_norm", "_gated_norm", "_recur")
# On tensor cores, or one block a row: no second block need live on a multiprocessor.
ALONE = ("_multiply", "_gated", "_draw", "_codes", "_multiply_codes", "_attend", "_attend_prompts", "_combine")


def test_every_kernel_compiles_for_sm_90_within_its_budget(tmp_path: Path) -> None:
    kernels = {
        name
        for path in (ROOT / "engine/ops/triton").glob("*.py")
        for name in re.findall(r"^def (\w+)\([^)]*\btl\.constexpr", path.read_text(), re.MULTILINE)
        if re.search(rf"\b{name}\[", path.read_text())
    }
    assert len(kernels) >= 7
    lines = compiled_kernels(tmp_path)
    assert {line["name"] for line in lines} == kernels
    for line in lines:
        # A multiprocessor has 65,536 registers: all kernels but those on tensor cores let two blocks live on it.
        budget = 255 if line["name"] in ("_multiply", "_gated") else BUDGETS.get(line["name"], 64)
        assert line["registers"] <= budget, line
        # Products of four rows hold what two blocks would have.
        alone = line["name"] in ALONE or (line["name"] == "_skinny" and line["ROWS"] >= 4)
        assert line["registers"] * 32 * line["warps"] * 2 <= 65536 or alone, line
        # In float32, which no GPU is served in but for comparison, tiles of 64 numbers may not fit.
        assert not line["stack"] or "torch.float32" in line["types"], f"spilled registers: {line}"
    apart = [line for line in lines if "waits" in line]
    assert {line["name"] for line in apart} == kernels
    for line in apart:
        if line["name"] == "_skinny" and line["types"][2] == "torch.bfloat16":
            assert line["wide_loads"] >= 2, f"weights are not read in 16 bytes at a time: {line}"
        if line["name"] in ("_gate_and_mul", "_segments", "_choose", "_weigh"):
            assert line["wide_loads"] >= (1 if line["types"][0] == "torch.bfloat16" else 2), line
    for line in apart:
        # Every program lets the next kernel begin, then waits for those before; only weights are read ahead of that.
        assert line["waits"] and line["lets_next_begin"] and not line["too_early"], line
        assert not line["loads_ahead"] or line["name"] in AHEAD, line
        if line["name"] == "_skinny" and line["types"][2] == "torch.bfloat16":
            assert line["wide_loads_ahead"] >= (2 if line["GATED"] else 1), line


def compiled_kernels(cache: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.compile_kernels"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
