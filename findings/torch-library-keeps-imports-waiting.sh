#!/usr/bin/env bash
# torch 2.13.0 (BSD-3-Clause): mapping its largest library, libtorch_cpu.so, takes a quarter of a second and more, for
# relocation alone. ctypes lets go of Python's lock for a foreign call, so a program that wants to start sooner can map the
# library in a thread, and import what else it needs meanwhile. But the dynamic loader has one lock for the whole process,
# and holds it for as long as one library takes: importing any module with a library of its own, however small (here orjson
# 3.11.5; `resource` of the standard library as well), waits to the end of that mapping. Modules of Python
# alone are imported all the while. One would expect the imports of small extensions to go on: it is as if the thread were
# not there, unless all of them are imported before it begins.
#
# Seen: how long each takes meanwhile, in processes of their own. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 orjson==3.11.5
cat >"$dir/seen.py" <<'PY'
import ctypes
import importlib
import importlib.util
import os
import sys
import threading
import time

name, maps = sys.argv[1], sys.argv[2] == "yes"
library = os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "lib", "libtorch_cpu.so")
dlopen = ctypes.CDLL(None).dlopen
if maps:
    with open(library, "rb") as file:  # so that no disk is waited for
        while file.read(1 << 24):
            pass
mapped = 0.0


def work():
    global mapped
    begin = time.perf_counter()
    assert dlopen(os.fsencode(library), os.RTLD_NOW) is not None
    mapped = time.perf_counter() - begin


thread = threading.Thread(target=work)
if maps:
    thread.start()
    time.sleep(0.02)
begin = time.perf_counter()
module = importlib.import_module(name)
took = time.perf_counter() - begin
if maps:
    thread.join()
print(took, mapped)
PY
"$dir/venv/bin/python" - "$dir" <<'PY'
import subprocess
import sys


def seen(name, maps):
    """Median of five: (seconds of the import, seconds of the mapping)."""
    command = [sys.executable, f"{sys.argv[1]}/seen.py", name, maps]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(5)]
    return sorted(tuple(map(float, run)) for run in runs)[2]


for name, waits in (("orjson", True), ("resource", True), ("colorsys", False)):
    alone, _ = seen(name, "no")
    beside, mapped = seen(name, "yes")
    print(f"{name}: imported alone in {1000 * alone:.1f} ms, beside a mapping of {1000 * mapped:.0f} ms in {1000 * beside:.1f}")
    assert (beside - alone > 0.5 * mapped) == waits, name
PY
