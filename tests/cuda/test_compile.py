"""Every Triton kernel compiles for the GPUs this is made for; what they compute is in test_triton.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_kernel_compiles_for_sm_90(tmp_path: Path) -> None:
    kernels = {
        name
        for path in (ROOT / "engine/ops/triton").glob("*.py")
        for name in re.findall(r"^def (\w+)\([^)]*\btl\.constexpr", path.read_text(), re.MULTILINE)
        if re.search(rf"\b{name}\[", path.read_text())
    }
    assert len(kernels) >= 7
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.compile_kernels"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == kernels
