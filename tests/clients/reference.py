"""What transformers says: a program of test_lm_eval.py's, run in the server's environment.

stdin: a JSON list of [context, text]; stdout: the log-likelihood of what `text` has beyond the tokens of `context`,
one for each. A context that is null is the token that ends a text.
"""

from __future__ import annotations

import asyncio
import json
import sys

import torch

from bench.perplexity import DEMO, transformers_scorer
from engine.text.tokenizer import Tokenizer


async def main() -> None:
    torch.set_num_threads(1)
    score, tokenizer = transformers_scorer(DEMO, "float32"), Tokenizer.load(DEMO)
    found: list[float] = []
    for context, text in json.load(sys.stdin):
        # lm-eval's own cut.
        before = [tokenizer.eos_token_ids[0]] if context is None else tokenizer.encode(context)
        whole = [*before, *tokenizer.encode(text)] if context is None else tokenizer.encode(text)
        found.append(sum((await score(whole))[len(before) - 1 :]))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
