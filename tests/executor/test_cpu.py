"""engine/executor/cpu.py and cpu_start.py: a real model through real steps, and what is decided before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import CacheOptions, StartupError
from engine.executor import cpu_start
from engine.executor.cpu import CPUExecutor, Model
from engine.executor.cpu_start import choose_threads, pick_dtype, plan_memory
from engine.forward import ForwardError, Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops import native
from engine.ops.attention.base import AttentionBackend, AttentionSpec
from engine.request import SamplingParams
from tests.executor.driver import GREEDY, Driver, decode, prefill
from tests.models.support import make_checkpoint

PROMPT = [(7 * i + 3) % 200 for i in range(45)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    directory = tmp_path_factory.mktemp("llama")
    return directory, make_checkpoint(directory, "Llama")


@pytest.fixture(scope="module")
def model(checkpoint: tuple[Path, object]) -> CausalLM:
    directory, _ = checkpoint
    config = read_spec(directory)
    return load_model(config, directory, dtype=torch.float32, device=torch.device("cpu"))


MakeDriver = Callable[..., Driver]


@pytest.fixture
def make() -> Iterator[MakeDriver]:
    torch.set_num_threads(1)
    made: list[CPUExecutor] = []

    def factory(model: Model, page_size: int = 4) -> Driver:
        executor = CPUExecutor(model, Limits(4, 64, 128, page_size, 128 // page_size * 4, 211), dtype=torch.float32)
        made.append(executor)
        return Driver(executor)

    yield factory
    for executor in made:
        executor.close()


def continuation(reference: object, prompt: list[int], count: int) -> list[int]:
    """Greedy, by transformers, one full forward a token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))  # type: ignore[operator]
    return ids[len(prompt) :]


async def test_tokens_are_transformers_tokens(
    make: MakeDriver, model: CausalLM, checkpoint: tuple[Path, object]
) -> None:
    """A prefill, a chunked one beside it, and decode rows with two steps in flight."""
    driver = make(model)
    first, second = continuation(checkpoint[1], PROMPT, 6), continuation(checkpoint[1], PROMPT[5:], 6)
    tokens = {1: await driver.run([prefill(1, PROMPT)], {1: list(range(20, 34))}, {1: GREEDY})}
    rows = [decode(1, 45), prefill(2, PROMPT[5:30], samples=False)]
    assert (await driver.run(rows, {2: list(range(40, 54))}, {2: GREEDY}))[1] == -1
    out = await driver.run([decode(1, 46), prefill(2, PROMPT[30:], start=25)])
    # The token of step two went to the relay alone; the transformers' continuation must hold it all the same.
    assert tokens[1] == first[:1] and out == [first[2], second[0]]
    waiting = [driver.launch([decode(2, 40), decode(1, 47)])]
    for step in range(1, 3):
        waiting.append(driver.launch([decode(2, 40 + step), decode(1, 47 + step)]))
        assert await driver.wait(waiting.pop(0)) == [second[step], first[2 + step]]
    assert await driver.wait(waiting.pop(0)) == [second[3], first[5]]


async def test_chunks_are_the_whole_bit_for_bit(make: MakeDriver, model: CausalLM) -> None:
    """Hidden states of the prompt's end, however it was cut (own kernels promise equal bits)."""
    if native.library() is None:
        pytest.skip(native.status())
    seen: list[Tensor] = []

    class Watched:
        attention_spec = model.attention_spec

        def forward(self, ids: Tensor, positions: Tensor, attention: AttentionBackend, *types: Tensor | None) -> Tensor:
            return model.forward(ids, positions, attention, *types)

        def logits(self, hidden: Tensor) -> Tensor:
            seen.append(model.logits(hidden).clone())
            return seen[-1]

    for chunk in (45, 1, 7, 16, 31):
        driver, at = make(Watched()), 0
        driver.launch([], {1: list(range(1, 13))}, {1: GREEDY})
        while at < 45:
            part = PROMPT[at : at + chunk]
            await driver.run([prefill(1, part, start=at, samples=at + len(part) == 45)])
            at += len(part)
    assert len(seen) == 5
    assert all(torch.equal(seen[0], other) for other in seen[1:])


async def test_prefix_pages_are_shared(make: MakeDriver, model: CausalLM) -> None:
    driver = make(model)
    alone = await driver.run([prefill(1, PROMPT)], {1: list(range(1, 13))}, {1: GREEDY})
    shared = await driver.run([prefill(2, PROMPT[40:], start=40)], {2: [*range(1, 11), 30, 31]}, {2: GREEDY})
    assert shared == alone


async def test_draws_do_not_depend_on_the_batch(make: MakeDriver, model: CausalLM) -> None:
    sampling = SamplingParams(temperature=1.2, top_p=0.95, seed=99)
    alone = make(model)
    expected = await alone.run([prefill(1, PROMPT)], {1: list(range(1, 13))}, {1: sampling})
    for step in range(5):
        expected += await alone.run([decode(1, 45 + step)])
    beside = make(model)
    await beside.run([prefill(2, PROMPT[:9])], {2: list(range(60, 70))}, {2: GREEDY})
    out = await beside.run([decode(2, 9), prefill(3, PROMPT)], {3: list(range(1, 13))}, {3: sampling})
    tokens = out[1:]
    for step in range(5):
        tokens += (await beside.run([decode(2, 10 + step), decode(3, 45 + step)]))[1:]
    assert tokens == expected


class Failing:
    """A model whose forward fails at chosen calls."""

    def __init__(self, model: CausalLM, calls: set[int], error: Exception) -> None:
        self.attention_spec = model.attention_spec
        self._model, self._calls, self._error, self._count = model, calls, error, -1
        self.logits = model.logits

    def forward(self, ids: Tensor, positions: Tensor, attention: AttentionBackend, *types: Tensor | None) -> Tensor:
        self._count += 1
        if self._count in self._calls:
            raise self._error
        return self._model.forward(ids, positions, attention, *types)


async def test_an_error_is_the_steps_own(
    make: MakeDriver, model: CausalLM, checkpoint: tuple[Path, object], caplog: pytest.LogCaptureFixture
) -> None:
    driver = make(Failing(model, {1}, RuntimeError("out of something")))
    first = driver.launch([prefill(1, PROMPT)], {1: list(range(1, 13))}, {1: GREEDY})
    failing = driver.launch([prefill(2, PROMPT[:4])], {2: [20], 3: [21]}, {2: GREEDY, 3: GREEDY})
    expected = continuation(checkpoint[1], PROMPT, 2)
    assert await driver.wait(first) == expected[:1]
    with pytest.raises(ForwardError, match="RuntimeError: out of something"):
        await driver.wait(failing)
    tokens = await driver.run([decode(1, 45), prefill(3, PROMPT[:4])])
    assert tokens == [expected[1], continuation(checkpoint[1], PROMPT[:4], 1)[0]]
    assert "step 1 failed" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=1, top_p=0.9, logprobs=2)])
async def test_rows_without_numbers_are_named_and_hurt_no_other(
    make: MakeDriver, model: CausalLM, checkpoint: tuple[Path, object], value: float, sampling: SamplingParams
) -> None:
    class Broken:
        """Its second row's logits hold one number that is none."""

        def __init__(self) -> None:
            self.attention_spec, self.forward = model.attention_spec, model.forward

        def logits(self, hidden: Tensor) -> Tensor:
            logits = model.logits(hidden).clone()
            logits[1, 7] = value
            return logits

    driver = make(Broken())
    pages = {1: list(range(1, 13)), 2: list(range(13, 25)), 3: list(range(25, 37))}
    handle = driver.launch(
        [prefill(1, PROMPT), prefill(2, PROMPT[:9]), prefill(3, PROMPT[:7])], pages, {1: GREEDY, 2: sampling, 3: GREEDY}
    )
    output = await driver.executor.wait(handle)
    assert output.broken == [1]
    expected = [continuation(checkpoint[1], PROMPT[:count], 1)[0] for count in (45, 7)]
    assert output.token_ids[[0, 2]].tolist() == expected


async def test_a_wait_may_be_cancelled_and_repeated(make: MakeDriver, model: CausalLM) -> None:
    release = threading.Event()

    class Slow:
        attention_spec = model.attention_spec
        logits = staticmethod(model.logits)

        def forward(self, ids: Tensor, positions: Tensor, attention: AttentionBackend, *types: Tensor | None) -> Tensor:
            # Where submit or wait blocked the loop this would come back before the timeout below.
            release.wait(60)
            return model.forward(ids, positions, attention, *types)

    driver = make(Slow())
    handle = driver.launch([prefill(1, PROMPT)], {1: list(range(1, 13))}, {1: GREEDY})
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(driver.executor.wait(handle), 0.05)
    release.set()
    both = await asyncio.gather(driver.wait(handle), driver.wait(handle))
    assert both[0] == both[1] and both[0][0] >= 0


async def test_close_joins_the_worker(make: MakeDriver, model: CausalLM) -> None:
    before = set(threading.enumerate())
    driver = make(model)
    handle = driver.launch([prefill(1, PROMPT)], {1: list(range(1, 13))}, {1: GREEDY})
    driver.executor.close()
    assert not any(thread.name == "cpu-executor" for thread in set(threading.enumerate()) - before)
    assert (await driver.wait(handle))[0] >= 0, "what was launched is finished"
    driver.executor.close()
    with pytest.raises(AssertionError, match="after close"):
        driver.launch([])


def test_worker_without_a_loop(make: MakeDriver, model: CausalLM) -> None:
    """Submitted with no loop at all, waited for on one that is closed before the step ends."""
    driver = make(model)
    handle = driver.launch([prefill(1, PROMPT)], {1: list(range(1, 13))}, {1: GREEDY})
    assert asyncio.run(driver.wait(handle))[0] >= 0


SIZES = AttentionSpec.alike(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64, scale=1.0)
PER_PAGE = 2 * 2 * 2 * 64 * 2 * 16


def test_memory_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_start, "available_memory", lambda: 1000 * PER_PAGE)
    half = torch.bfloat16

    def pages(seqs: int = 64, context: int = 1 << 20, **options: float) -> int:
        return plan_memory(SIZES, half, CacheOptions(**options), seqs, context)

    assert pages(num_pages=7) == 7
    assert pages(kv_cache_bytes=10 * PER_PAGE + 5) == 9
    assert pages(memory_fraction=0.5) == 499
    assert pages() == 249
    assert pages(seqs=3, context=33) == 9, "no more than the sequences can use"
    assert pages(seqs=256, context=48) == 64 * 3, "nor than many of full context"
    assert plan_memory(SIZES, torch.float32, CacheOptions(), 64, 1 << 20) == 124
    with pytest.raises(StartupError, match="no page"):
        pages(kv_cache_bytes=100)
    with pytest.raises(StartupError, match="are available"):
        pages(num_pages=5000)


def test_what_the_cache_holds() -> None:
    assert cpu_start.pick_kv_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert cpu_start.pick_kv_dtype("int8", torch.bfloat16) == torch.int8
    assert plan_memory(SIZES, torch.int8, CacheOptions(kv_cache_bytes=100 * PER_PAGE), 64, 1 << 20) == 192
    assert cpu_start.pick_kv_dtype("bfloat16", torch.float32) == torch.bfloat16
    assert cpu_start.pick_kv_dtype("float16", torch.bfloat16) == torch.float16
    assert cpu_start.pick_kv_dtype("float32", torch.float32) == torch.float32
    for name, keeps, says in (
        ("fp8", True, "on a CPU one of auto, bfloat16, "),
        ("int8", False, "keeps no keys and values"),
        ("bfloat16", False, "keeps no keys and values"),
        ("float32", True, "is for --dtype float32"),
    ):
        with pytest.raises(StartupError, match=f"^--kv-cache-dtype {name}:? .*{says}"):
            cpu_start.pick_kv_dtype(name, torch.bfloat16, keeps=keeps)


def test_pages_of_other_numbers_are_not_taken_for_ones_own(model: CausalLM) -> None:
    """By what tiers and other servers know them."""
    limits, layouts = Limits(2, 16, 64, 4, 8, model.config.vocab_size), set()
    for kv_dtype in (None, torch.bfloat16, torch.float16, torch.int8):
        executor = CPUExecutor(model, limits, dtype=torch.float32, kv_dtype=kv_dtype)
        layouts.add(executor.page_memory().layout)
        executor.close()
    assert len(layouts) == 4


def test_available_memory_is_sane() -> None:
    assert 2**20 < cpu_start.available_memory() < 2**50
    assert 1 <= cpu_start.available_cores() <= 4096


def test_threads() -> None:
    assert choose_threads(15_000_000, cores=8) == 1, "a small model"
    assert choose_threads(150_000_000, cores=2) == 1, "the loop keeps its core"
    assert choose_threads(2_500_000_000, cores=2) == 2
    assert choose_threads(2_500_000_000, cores=16) == 15
    assert choose_threads(2_500_000_000, cores=1) == 1
    assert choose_threads(100_000_000, cores=64) == 6
    assert choose_threads(1) >= 1


def test_dtypes() -> None:
    assert pick_dtype("auto") in (torch.bfloat16, torch.float32)
    assert pick_dtype("float16") == torch.float16
    with pytest.raises(StartupError, match="int8"):
        pick_dtype("int8")
