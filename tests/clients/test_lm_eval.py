"""lm-eval's `local-completions` against the server: its log-likelihoods of five lines are those of transformers.

lm-eval runs as its users run it, in a process of its own and without the network.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.perplexity import Scorer, transformers_scorer
from tests.server.support import DEMO, live, tokenizer
from tests.server.test_logprobs import device

HERE = Path(__file__).parent
pytestmark = pytest.mark.clients


async def evaluate(
    url: str, task: str, out: Path, batch_size: int = 1, **options: object
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and samples of one task."""
    arguments = {
        "model": "demo",
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(DEMO),
        "max_length": 512,
        "max_retries": 1,
        **options,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", task),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--batch_size", str(batch_size), "--include_path", "tasks", "--output_path", str(out), "--log_samples"),
        cwd=HERE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()[-4000:]
    return read(out, task)


def read(out: Path, task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    [results] = out.rglob("results_*.json")
    [samples] = out.rglob("samples_*.jsonl")
    lines = samples.read_text().splitlines()
    return json.loads(results.read_text())["results"][task], [json.loads(line) for line in lines]


@functools.cache
def scorer() -> Scorer:
    return transformers_scorer(DEMO, "float32")


async def loglikelihood(context: list[int], continuation: list[int]) -> float:
    values = await scorer()(context + continuation)
    return sum(values[len(context) - 1 :])


@pytest.mark.parametrize("options", [{"num_concurrent": 4, "batch_size": 3}, {"tokenized_requests": False}], ids=str)
async def test_multiple_choice(tmp_path: Path, options: dict[str, object]) -> None:
    torch.set_num_threads(1)
    async with live(make_device=device, num_pages=256) as server:
        results, samples = await evaluate(server.url, "oneloop_choices", tmp_path, **options)
    assert len(samples) == 5
    right = 0
    encode = tokenizer().encode
    for sample in samples:
        doc = sample["doc"]
        expected = []
        for choice in doc["choices"]:
            # lm-eval's own cut: the continuation is what the whole has beyond the context's tokens.
            context, whole = encode(doc["question"]), encode(doc["question"] + choice)
            expected.append(await loglikelihood(context, whole[len(context) :]))
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)
        right += expected.index(max(expected)) == doc["answer"]
    assert results["acc,none"] == pytest.approx(right / 5)


async def test_rolling_perplexity(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    async with live(make_device=device, num_pages=256) as server:
        results, samples = await evaluate(server.url, "oneloop_rolling", tmp_path)
    eos = tokenizer().eos_token_ids[0]
    for sample in samples:
        expected = await loglikelihood([eos], tokenizer().encode(sample["doc"]["question"]))
        assert float(sample["resps"][0][0]) == pytest.approx(expected, rel=1e-4)
    assert results["bits_per_byte,none"] > 0
