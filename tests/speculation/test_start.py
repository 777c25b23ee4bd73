"""How drafting comes to be at start: what is read, what is said, and one line for what cannot be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from engine.build import Built, build_engine
from engine.config import (
    CacheOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
    SpeculationOptions,
    StartupError,
    StreamOptions,
)
from engine.request import Request, SamplingParams
from tests.models.support import make_checkpoint
from tests.speculation.test_eagle3 import write_head


def write_tokenizer(directory: Path, vocabulary: dict[str, int]) -> None:
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafting")
    target, draft, head = folder / "target", folder / "draft", folder / "head"
    make_checkpoint(target, "Llama")
    make_checkpoint(draft, "Qwen3", seed=1, hidden_size=32, num_hidden_layers=1, head_dim=8)
    write_head(head, "speculators")
    make_checkpoint(folder / "other", "Llama", vocab_size=199)
    make_checkpoint(folder / "bare", "Llama", vocab_size=199)
    for directory in (target, draft):
        write_tokenizer(directory, {f"t{index}": index for index in range(211)})
    write_tokenizer(folder / "other", {f"t{198 - index}": index for index in range(199)})
    return {"target": target, "draft": draft, "head": head, "other": folder / "other", "bare": folder / "bare"}


def build(target: Path, ranks: int = 1, **options: Any) -> Built:
    return build_engine(
        EngineConfig(
            model=ModelOptions(path=str(target), dtype="float32", max_model_len=128),
            cache=CacheOptions(num_pages=64),
            scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=64),
            stream=StreamOptions(flush_interval_ms=0.0),
            device="cpu",
            num_threads=1,
            tensor_parallel_size=ranks,
            speculation=SpeculationOptions(**options) if options else SpeculationOptions(),
        )
    )


async def answers(built: Built) -> list[list[int]]:
    """Twice the same prompts, so that the second ones find their pages."""
    task = asyncio.create_task(built.engine.run())

    async def one(number: int) -> list[int]:
        prompt = [(7 * index + number) % 200 + 3 for index in range(45)]
        params = SamplingParams(max_tokens=20, temperature=0.0 if number % 2 else 1.0, seed=number, ignore_eos=True)
        request = Request(f"r{number}-{asyncio.get_running_loop().time()}", prompt, params)
        async with built.engine.submit(request) as stream:
            return (await stream.collect()).token_ids

    try:
        return [answer for _ in range(2) for answer in await asyncio.gather(*map(one, range(5)))]
    finally:
        task.cancel()
        await asyncio.wait({task})
        built.engine.executor.close()


async def test_models_that_draft(directories: dict[str, Path]) -> None:
    expected = await answers(build(directories["target"]))
    cases: list[dict[str, Any]] = [
        {"method": "draft_model", "model": str(directories["draft"])},
        {"method": "draft_model", "model": str(directories["target"]), "draft_sample_method": "probabilistic"},
        {"method": "draft_model", "model": str(directories["other"]), "use_vocabulary_map": True},
        {"method": "eagle3", "model": str(directories["head"])},
    ]
    for case in cases:
        built = build(directories["target"], num_draft_tokens=3, adaptive=False, **case)
        rows = dict(built.report.rows)
        assert case["model"] in rows["draft model"] and "draft model" in built.report.phases
        assert rows["drafts"] == f"{case['method']}, up to 3 a row and step, always"
        assert await answers(built) == expected, case
        speculation = built.engine.scheduler.speculation
        assert speculation is not None and speculation.num_draft_tokens > 0
        if case["model"] == str(directories["target"]):
            # It says what it says; but for answers that were cut, everything was right.
            assert speculation.num_accepted_tokens == speculation.num_draft_tokens


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_what_needs_no_model_tells_of_none(method: str, directories: dict[str, Path]) -> None:
    built = build(directories["target"], method=method, num_draft_tokens=3)
    built.engine.executor.close()
    assert dict(built.report.rows)["drafts"] == f"{method}, up to 3 a row and step, as many as pay"
    assert "draft model" not in built.report.table()


def test_what_cannot_be(directories: dict[str, Path], tmp_path: Path) -> None:
    def refused(pattern: str, **options: Any) -> None:
        with pytest.raises(StartupError, match=pattern) as caught:
            build(directories["target"], num_draft_tokens=3, **options)
        assert "\n" not in str(caught.value)

    def of(name: str) -> dict[str, Any]:
        return {"method": "draft_model", "model": str(directories[name])}

    refused("another vocabulary: token 't0' is 0 in the model's tokenizer, 198 in the draft's", **of("other"))
    refused("has another vocabulary: 199 tokens in config.json, not 211", **of("bare"))
    refused("bare: a vocabulary map needs its tokenizer.json", **of("bare"), use_vocabulary_map=True)
    refused("'draft_model' needs a model", method="draft_model")
    refused(r"\(eagle3\) needs a model", method="eagle3")
    refused("architecture 'Qwen3ForCausalLM' is not EAGLE-3's", method="eagle3", model=str(directories["draft"]))
    refused("no such directory", method="draft_model", model=str(tmp_path / "nowhere"))


DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


async def test_models_with_a_recurrent_state(directories: dict[str, Path], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Qwen3_5", **DELTA)
    write_tokenizer(tmp_path, {f"t{index}": index for index in range(211)})
    built = build(tmp_path)
    assert "states of drafts" not in dict(built.report.rows)
    expected = await answers(built)
    draft = str(directories["draft"])
    cases: list[dict[str, Any]] = [{"method": "ngram"}, {"method": "suffix"}, {"method": "draft_model", "model": draft}]
    for case in cases:
        built = build(tmp_path, num_draft_tokens=3, adaptive=False, **case)
        # Of two layers: what goes into the convolution, and two numbers a head; of 4 rows with 3 drafts.
        each = 2 * (2 * 2 * 12 + 4 * 20 + 2 * 4) * 4
        assert dict(built.report.rows)["states of drafts"].startswith(f"{each / 1024:.3g} KiB a token: up to 17 KiB")
        assert await answers(built) == expected, case
        speculation = built.engine.scheduler.speculation
        assert speculation is not None and speculation.num_draft_tokens > 0
    for target in (directories["target"], tmp_path):
        with pytest.raises(StartupError, match=r"the draft model .* has a recurrent state, which does not go back"):
            build(target, method="draft_model", model=str(tmp_path), num_draft_tokens=3)
