#!/usr/bin/env bash
# llguidance 1.9.1 (the grammar library of vLLM, SGLang and others) computes masks and parsers with the interpreter's lock
# given back, so that other threads run meanwhile. Its LLTokenizer does not: while it builds the trie of a vocabulary
# every other thread stands still, a second or more for the 150,000 and 250,000 tokens of today's models. A thread "in
# the background" that makes it therefore stalls a server's event loop for all of that time.
#
# Seen: 150,000 tokens take 0.64 s (50 ms of them a pause before), in 0.58 s of which another thread, which only sleeps for
# 1 ms at a time, does not come on once; while 20,000 masks are filled (0.32 s) it waits for 14 ms at the most.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet llguidance==1.9.1 numpy
"$dir/venv/bin/python" - <<'PY'
import random
import threading
import time

import llguidance
import llguidance.numpy
import numpy as np

SIZE = 150_000


class Words:
    """What the library reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = SIZE - 1
    special_token_ids = [SIZE - 1]

    def __init__(self):
        chance = random.Random(0)
        letters = "etaoinshrdlucmfwyp"
        words = {bytes([number]) for number in range(256)}
        while len(words) < SIZE - 1:
            words.add(("".join(chance.choices(letters, k=chance.randint(2, 9)))).encode())
        self.tokens = [*sorted(words), b"<end>"]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


def beside(work):
    """What `work` gives, its seconds, and the longest that this thread stood still beyond the millisecond it asked for."""
    result = []
    thread = threading.Thread(target=lambda: (time.sleep(0.05), result.append(work())))
    thread.start()
    longest, begin = 0.0, time.perf_counter()
    while thread.is_alive():
        before = time.perf_counter()
        time.sleep(0.001)
        longest = max(longest, time.perf_counter() - before)
    return result[0], time.perf_counter() - begin, longest


words = Words()
tokenizer, took, still = beside(lambda: llguidance.LLTokenizer(words))
print(f"LLTokenizer of {SIZE} tokens: {took:.2f} s; the other thread stood still for {still:.2f} s")

grammar = llguidance.LLMatcher.grammar_from_json_schema('{"type": "object", "properties": {"a": {"type": "string"}}}')
matcher = llguidance.LLMatcher(tokenizer, grammar)
matcher.consume_tokens([words.tokens.index(byte) for byte in (b"{", b'"', b"a", b'"', b":", b'"')])
mask = np.zeros((1, (SIZE + 31) // 32), np.int32)


def fill():
    for _ in range(20_000):
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)


_, took_masks, still_masks = beside(fill)
print(f"20,000 masks: {took_masks:.2f} s; the other thread stood still for {still_masks:.3f} s")
assert still > 0.7 * took and took > 0.1, "other threads run meanwhile"
assert still_masks < 0.5 * took_masks, "masks hold the lock, too"
PY
