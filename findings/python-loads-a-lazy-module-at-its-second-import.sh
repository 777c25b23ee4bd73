#!/usr/bin/env bash
# importlib.util.LazyLoader (Python 3.11 and 3.12), around a large package (here tokenizers 0.22.1, Apache-2.0):
# a module that is lazy is to be loaded when one of its attributes is asked for. It is loaded by a second `import NAME` of
# anybody, too, although that asks for nothing of it: the import statement looks at __spec__ of what stands in sys.modules,
# to see whether it is still being imported, and that counts as asking. A program that makes a slow package lazy gains
# nothing as soon as two of its modules have the import at their top. `importlib.import_module` does the same. One would
# expect the second import to hand out the lazy module, as the first does.
#
# Seen: what is in sys.modules behind the first and the second import. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --no-deps tokenizers==0.22.1
"$dir/venv/bin/python" - <<'PY'
import importlib.util
import sys

spec = importlib.util.find_spec("tokenizers")
spec.loader = importlib.util.LazyLoader(spec.loader)
module = importlib.util.module_from_spec(spec)
sys.modules["tokenizers"] = module
spec.loader.exec_module(module)
assert "tokenizers.tokenizers" not in sys.modules and type(module).__name__ == "_LazyModule"
print("made lazy: its library is not loaded")

import tokenizers  # noqa: E402

assert tokenizers is module
loaded = "tokenizers.tokenizers" in sys.modules
print("behind one import statement, with no attribute asked for: loaded" if loaded else "still lazy")
assert loaded and type(module).__name__ == "module"
PY
