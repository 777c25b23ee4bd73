"""lm-eval's `local-completions` against the server: its log-likelihoods of five lines are those of transformers.

lm-eval runs as its users run it, in a process of its own and without the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.common import MODEL, cell
from tests.clients.conftest import PYTHON, ROOT

CLIENT = "lm-eval"
HERE = Path(__file__).parent


def evaluate(
    url: str, task: str, out: Path, batch_size: int = 1, **options: object
) -> tuple[Any, list[dict[str, Any]]]:
    """Results and samples of one task."""
    arguments = {
        "model": MODEL,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(ROOT / "engine" / "demo"),
        "max_length": 512,
        "max_retries": 1,
        **options,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", task),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--batch_size", str(batch_size), "--include_path", "tasks", "--output_path", str(out), "--log_samples"),
        ],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    [results] = out.rglob("results_*.json")
    [samples] = out.rglob("samples_*.jsonl")
    lines = samples.read_text().splitlines()
    return json.loads(results.read_text())["results"][task], [json.loads(line) for line in lines]


def reference(pairs: list[tuple[str | None, str]]) -> list[float]:
    """Log-likelihoods by transformers; see reference.py."""
    done = subprocess.run(
        [PYTHON, "-m", "tests.clients.reference"],
        cwd=ROOT,
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@cell(CLIENT, "logprobs")
@pytest.mark.parametrize("options", [{"num_concurrent": 4, "batch_size": 3}, {"tokenized_requests": False}], ids=str)
def test_multiple_choice(url: str, tmp_path: Path, options: dict[str, Any]) -> None:
    results, samples = evaluate(url, "oneloop_choices", tmp_path, **options)
    assert len(samples) == 5
    docs = [sample["doc"] for sample in samples]
    expected = iter(
        reference([(doc["question"], doc["question"] + choice) for doc in docs for choice in doc["choices"]])
    )
    right = 0
    for sample, doc in zip(samples, docs, strict=True):
        ours = [next(expected) for _ in doc["choices"]]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(ours, rel=1e-4, abs=1e-3)
        right += ours.index(max(ours)) == doc["answer"]
    assert results["acc,none"] == pytest.approx(right / 5)


@cell(CLIENT, "logprobs")
def test_rolling_perplexity(url: str, tmp_path: Path) -> None:
    results, samples = evaluate(url, "oneloop_rolling", tmp_path)
    expected = reference([(None, sample["doc"]["question"]) for sample in samples])
    assert [float(sample["resps"][0][0]) for sample in samples] == pytest.approx(expected, rel=1e-4)
    assert results["bits_per_byte,none"] > 0
