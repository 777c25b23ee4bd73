"""The offline API over the demo model: what a server would say, from any thread, also beside a running loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.llm import LLM, GrammarSpec, RequestError, SamplingParams, StartupError
from engine.request import QueueFullError, UnavailableError
from tests.lora.handmade import write
from tests.server.support import live
from tests.server.test_logprobs import device

ROOT = Path(__file__).parent.parent
GREEDY = SamplingParams(temperature=0, max_tokens=24)
STORY = "Once upon a time, in a big castle,"
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
# A long answer: the demo model would end it by itself.
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "num_gpu_blocks_override": 512, "max_num_seqs": 32, "seed": 1}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SMALL) as llm:
        yield llm


def idle(llm: LLM) -> bool:
    stats = llm._built.engine.stats()
    return not (stats.num_running or stats.num_waiting or stats.num_used_pages)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (it holds on another thread)
            await asyncio.sleep(0.002)


# ---- blocking


async def test_the_text_is_that_of_the_server(llm: LLM) -> None:
    prompts = [STORY, "Mia is a baker.", "The"]
    outputs = await llm.generate_async(prompts, GREEDY)
    chats = await llm.chat_async([QUESTION, [{"role": "user", "content": "List three fruits."}]], GREEDY)
    async with live(make_device=device, num_pages=512) as server:
        for prompt, output in zip(prompts, outputs, strict=True):
            body = await server.complete(prompt, temperature=0, max_tokens=24, return_token_ids=True)
            [choice] = body["choices"]
            [own] = output.outputs
            assert (own.text, own.token_ids) == (choice["text"], choice["token_ids"])
            assert own.finish_reason == choice["finish_reason"] and output.prompt == prompt
            assert output.prompt_token_ids == choice["prompt_token_ids"] and own.logprobs is None
    assert [output.outputs[0].text for output in chats] == ["17 + 25 = 42", "1. Apple\n2. Banana\n3. Pear"]
    assert all(output.outputs[0].finish_reason == "stop" for output in chats)


def test_one_prompt_many_prompts_and_token_ids(llm: LLM) -> None:
    # Longer than a page of the cache.
    prompt = STORY * 3
    [one] = llm.generate(prompt, GREEDY)
    [by_ids] = llm.generate(one.prompt_token_ids, GREEDY)
    assert by_ids.outputs == one.outputs and by_ids.prompt is None
    both = llm.generate([prompt, one.prompt_token_ids], GREEDY)
    assert [output.outputs for output in both] == [one.outputs] * 2
    assert both[1].num_cached_tokens > 0
    assert llm.generate([], GREEDY) == []


def test_each_prompt_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=size, temperature=0, ignore_eos=True) for size in (1, 7, 3)]
    outputs = llm.generate([STORY] * 3, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 7, 3]
    with pytest.raises(RequestError, match="3 prompts, but 2"):
        llm.generate([STORY] * 3, params[:2])


def test_defaults_are_the_models_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm.default_sampling_params.temperature == 0.7
    [output] = llm.chat(QUESTION)
    assert output.outputs[0].finish_reason == "stop"
    for most, reason in ((3, "length"), (10**6, "stop")):
        own = dataclasses.replace(llm._built.generation_defaults, max_new_tokens=most)
        monkeypatch.setattr(llm._built, "generation_defaults", own)
        [output] = llm.chat(QUESTION)
        assert output.outputs[0].finish_reason == reason, "a default counts where it fits"


def test_choices_and_seeds(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=16)
    [first], [second] = (llm.generate(STORY, params, n=3) for _ in range(2))
    texts = [output.text for output in first.outputs]
    assert [output.text for output in second.outputs] == texts and len(set(texts)) == 3
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert llm.generate(STORY, params)[0].outputs[0].text == texts[0]
    unseeded = SamplingParams(temperature=1.0, max_tokens=16)
    assert len({output.text for output in llm.generate(STORY, unseeded, n=4)[0].outputs}) > 1


def test_stop_strings_and_special_forms(llm: LLM) -> None:
    [output] = llm.generate(STORY, SamplingParams(temperature=0, stop="lived", top_k=-1))  # type: ignore[arg-type]
    [own] = output.outputs
    assert own.stop_reason == "lived" and own.finish_reason == "stop" and "lived" not in own.text


def test_logprobs(llm: LLM) -> None:
    [output] = llm.generate(STORY, SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=0))
    [own] = output.outputs
    assert own.logprobs is not None and [entry.token_id for entry in own.logprobs] == own.token_ids
    for entry in own.logprobs:
        assert len(entry.top) == 3 and entry.rank == 1 and entry.logprob == entry.top[0][1] <= 0
        assert math.fsum(math.exp(logprob) for _, logprob in entry.top) <= 1.000001
    assert output.prompt_logprobs is not None
    assert [entry.token_id for entry in output.prompt_logprobs] == output.prompt_token_ids[1:]


def test_structures(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["age"],
        "additionalProperties": False,
    }
    params = SamplingParams(temperature=1.2, max_tokens=200)
    outputs = llm.chat([QUESTION] * 4, params, structure=schema)
    assert all(list(json.loads(output.outputs[0].text)) == ["age"] for output in outputs)
    [output] = llm.generate("Is it so? ", params, structure=GrammarSpec("choice", '["yes", "no"]'), n=4)
    assert {own.text for own in output.outputs} <= {"yes", "no"}
    with pytest.raises(RequestError, match="cannot be used"):
        llm.generate("x", params, structure=GrammarSpec("grammar", "start: nothing"))
    with pytest.raises(RequestError, match="min_tokens"):
        llm.generate("x", SamplingParams(min_tokens=2), structure=schema)


def test_chat_templates_arguments(llm: LLM) -> None:
    [example] = [item for item in json.loads((ROOT / "engine/demo/prompts.json").read_text()) if item["name"] == "tool"]
    [output] = llm.chat(example["messages"], SamplingParams(temperature=0), tools=example["tools"])
    assert '"city": "Paris"' in output.outputs[0].text and output.prompt is not None and "get_weather" in output.prompt
    partial = [*QUESTION, {"role": "assistant", "content": "17 + 25"}]
    [output] = llm.chat(partial, GREEDY, continue_final_message=True)
    assert output.outputs[0].text == " = 42"


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([STORY, "", STORY], GREEDY, "Prompt 1: The prompt is empty"),
        ([[5], [5, 10**6]], GREEDY, "Prompt 1: A prompt must be a string, or token ids from 0 to "),
        ([STORY, [5] * 10_000], GREEDY, "Prompt 1: This model's maximum context length"),
        (STORY, SamplingParams(max_tokens=100_000), "^This model's maximum context length"),
        ([STORY, STORY], [GREEDY, SamplingParams(temperature=3)], "Prompt 1: `temperature` must be a number from 0"),
        (STORY, SamplingParams(top_p=0), "`top_p` must be a number above 0 and at most 1"),
        (STORY, SamplingParams(min_tokens=9, max_tokens=8), "`min_tokens` must be an integer from 0 to 8"),
        (STORY, SamplingParams(max_tokens=0), "`max_tokens` must be an integer of at least 1"),
        (STORY, SamplingParams(logprobs=21), "`logprobs` must be an integer from 0 to 20"),
        (STORY, SamplingParams(stop=("",)), "`stop` must be"),
        (STORY, SamplingParams(stop_token_ids=(-1,)), "`stop_token_ids` must have token ids"),
        (STORY, SamplingParams(allowed_token_ids=()), "`allowed_token_ids` must not be empty"),
        (STORY, SamplingParams(logit_bias=((5, 101.0),)), "`logit_bias` must have numbers from -100 to 100"),
        (STORY, SamplingParams(repetition_penalty=math.nan), "`repetition_penalty` must be"),
    ],
)
def test_a_bad_prompt_among_good_ones_is_named_and_nothing_runs(
    llm: LLM, prompts: Any, params: Any, message: str
) -> None:
    steps = llm._built.engine.metrics.prompt_tokens
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)
    assert llm._built.engine.metrics.prompt_tokens == steps
    with pytest.raises(RequestError, match="`n` must be"):
        llm.generate(STORY, GREEDY, n=0)


def test_a_template_that_refuses_is_a_request_error(llm: LLM) -> None:
    with pytest.raises(RequestError, match="Prompt 1: "):
        llm.chat([QUESTION, []], GREEDY)


def test_more_prompts_than_the_queue_holds() -> None:
    with LLM(**SMALL, max_queued_requests=4) as llm:
        outputs = llm.generate([f"{index} and" for index in range(40)], SamplingParams(max_tokens=2, temperature=0))
        assert len(outputs) == 40 and all(output.outputs[0].text for output in outputs)
        assert [output.prompt for output in outputs] == [f"{index} and" for index in range(40)]


def test_a_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([STORY] * 3, GREEDY, use_tqdm=True)
    assert "3/3" in capsys.readouterr().err
    llm.generate([STORY] * 3, GREEDY)
    assert not capsys.readouterr().err


# ---- threads and loops


async def test_inside_a_running_loop(llm: LLM) -> None:
    """A notebook's cell blocks its loop, and nothing else."""
    [output] = llm.chat(QUESTION, GREEDY)
    assert output.outputs[0].text == "17 + 25 = 42"


def test_many_threads(llm: LLM) -> None:
    expected = [output.outputs[0].text for output in llm.generate([STORY, "The", "Mia"], GREEDY)]
    found: list[list[str]] = [[] for _ in range(4)]

    def work(place: int) -> None:
        for _ in range(3):
            found[place] += [output.outputs[0].text for output in llm.generate([STORY, "The", "Mia"], GREEDY)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected * 3] * 4


async def test_a_stream_adds_up(llm: LLM) -> None:
    [whole] = await llm.generate_async(STORY, GREEDY)
    deltas = [delta async for delta in llm.stream(STORY, GREEDY)]
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [token for delta in deltas for token in delta.token_ids] == whole.outputs[0].token_ids
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert len(deltas) > 1
    answer = "".join([delta.text async for delta in llm.stream_chat(QUESTION, GREEDY)])
    assert answer == "17 + 25 = 42"
    choice = [delta.text async for delta in llm.stream("x", structure=GrammarSpec("choice", '["a", "b"]'))]
    assert "".join(choice) in ("a", "b")
    with pytest.raises(RequestError, match="empty"):
        async for _ in llm.stream(""):
            pass


async def test_leaving_a_stream_aborts(llm: LLM) -> None:
    async with contextlib.aclosing(llm.stream(STORY, LONG)) as stream:
        async for delta in stream:
            assert delta.finish_reason is None
            break
    await until(lambda: idle(llm))
    async for _ in llm.stream(STORY, LONG):
        break
    await until(lambda: idle(llm))


async def test_cancelling_aborts(llm: LLM) -> None:
    task = asyncio.create_task(llm.generate_async([STORY] * 8, LONG))
    await until(lambda: llm._built.engine.stats().num_running == 8)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: idle(llm))

    async def read() -> None:
        async for _ in llm.stream(STORY, LONG):
            pass

    task = asyncio.create_task(read())
    await until(lambda: llm._built.engine.stats().num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: idle(llm))


async def test_a_failing_request_takes_its_companions_along(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._built.engine
    submit, taken = engine.submit, []

    def refuse_the_third(request: Any) -> Any:
        if len(taken) == 2:
            raise QueueFullError("full")
        taken.append(request)
        return submit(request)

    monkeypatch.setattr(engine, "submit", refuse_the_third)
    with pytest.raises(QueueFullError, match="full"):
        llm.generate([STORY] * 3, LONG)
    await until(lambda: idle(llm))


# ---- the end


async def test_close_is_idempotent_and_ends_what_runs() -> None:
    llm = LLM(**SMALL)
    task = asyncio.create_task(llm.generate_async(STORY, LONG))
    stream = llm.stream(STORY, LONG)
    await anext(stream)
    await until(lambda: llm._built.engine.stats().num_running == 2)
    blocked = asyncio.create_task(asyncio.to_thread(llm.generate, STORY, LONG))
    await until(lambda: llm._built.engine.stats().num_running == 3)
    await asyncio.to_thread(llm.close)
    llm.close()
    for waiting in (task, blocked):
        with pytest.raises(UnavailableError, match="closed"):
            await waiting
    with pytest.raises(UnavailableError, match="closed"):
        async for _ in stream:
            pass
    with pytest.raises(UnavailableError, match="closed"):
        llm.generate(STORY, GREEDY)
    with pytest.raises(UnavailableError, match="closed"):
        await llm.generate_async(STORY, GREEDY)
    assert not llm._runner._thread.is_alive()


def test_one_that_is_forgotten_is_closed() -> None:
    llm = LLM(**SMALL)
    thread = llm._runner._thread
    llm.generate(STORY, GREEDY)
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_an_engine_that_fails_is_an_error_and_no_hang(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(**SMALL) as llm:

        def broken() -> None:
            raise ZeroDivisionError

        llm._built.engine.scheduler.schedule = broken  # type: ignore[method-assign,assignment]
        for _ in range(2):
            with pytest.raises(UnavailableError, match="engine"):
                llm.generate(STORY, GREEDY)
    assert "the engine failed" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere"),
        ({"nonsense": 1}, "--nonsense"),
        ({"max_num_seq": 1}, r"--max-num-seq=1 \(did you mean --max-num-seqs\?\)$"),
        ({"max_model_len": 0}, "max-model-len"),
        ({"port": 8001}, "no server"),
        ({"log_level": "debug"}, "no server"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_bad_options_are_startup_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        LLM(**options)


def test_options_are_the_flags() -> None:
    with LLM(**SMALL, enable_prefix_caching=False, max_model_len="256") as llm:
        config = llm._built.engine.config
        assert not config.cache.enable_prefix_caching and llm._built.engine.limits.max_model_len == 256


def test_torchs_compiler_is_never_imported() -> None:
    """Nor what it brings: that would take a second or two amid the first answer, where steps are recorded."""
    code = (
        "import sys\nfrom engine.llm import LLM, SamplingParams\n"
        "with LLM() as llm:\n"
        "    assert llm.generate('The cat', SamplingParams(max_tokens=12, temperature=0))\n"
        "assert 'torch' in sys.modules and not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_a_script_that_does_not_close_ends() -> None:
    code = (
        "from engine.llm import LLM, SamplingParams\n"
        "llm = LLM(num_gpu_blocks_override=256)\n"
        "print(llm.generate('The', SamplingParams(max_tokens=2))[0].outputs[0].finish_reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "length\n" and not done.stderr


def test_a_model_that_gives_no_text() -> None:
    with pytest.raises(StartupError, match=r"^oneloop-demo is for embeddings or scores; it does not generate text$"):
        LLM(runner="pooling", pooling="last")


# ---- LoRA adapters


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """As vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str


def adapter(path: Path, seed: int) -> Path:
    """Random factors for the demo model's first layers, strong enough to change what it says."""
    layer, sizes = "model.layers.0.mlp", json.loads((ROOT / "engine/demo/config.json").read_text())
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rows, columns in (("gate_proj", inner, hidden), ("down_proj", hidden, inner)):
        for end, shape in (("A", (4, columns)), ("B", (rows, 4))):
            tensors[f"base_model.model.{layer}.{name}.lora_{end}.weight"] = torch.randn(shape, generator=generator)
    return write(path, tensors, lora_alpha=1)


async def test_adapters(tmp_path: Path) -> None:
    one, two, three = (str(adapter(tmp_path / name, seed)) for seed, name in enumerate(("one", "two", "three")))
    with LLM(**SMALL, lora_modules={"one": one, "two": two}, max_loras=2) as llm:
        base, first, second = (llm.generate(STORY, GREEDY, lora=name)[0].outputs[0] for name in (None, "one", "two"))
        assert len({base.text, first.text, second.text}) == 3
        outputs = llm.generate([STORY] * 3, GREEDY, lora=["two", None, "one"])
        assert [output.outputs[0] for output in outputs] == [second, base, first]
        request = LoRARequest("three", 3, three)
        third, *others = await llm.generate_async([STORY] * 2, GREEDY, lora_request=request)
        assert third.outputs[0].text not in {base.text, first.text, second.text} and others == [third]
        assert llm.generate(STORY, GREEDY, lora="three")[0].outputs == third.outputs
        deltas = [delta.text async for delta in llm.stream(STORY, GREEDY, lora="one")]
        assert "".join(deltas) == first.text
        chats = [llm.chat(QUESTION, GREEDY, lora=name)[0].outputs[0].text for name in (None, "one")]
        assert chats[0] != chats[1]
        for given, message in (
            ("nope", "no LoRA adapter `nope`"),
            (7, "`lora` must be a name"),
            (["one"] * 2, "1 prompts, but 2 LoRA adapters"),
            (LoRARequest("three", 3, one), "from another path"),
            (LoRARequest("four", 4, str(tmp_path / "four")), "`four` cannot be used"),
        ):
            with pytest.raises(RequestError, match=message):
                llm.generate(STORY, GREEDY, lora=given)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="two words"):
            llm.generate(STORY, GREEDY, lora="one", lora_request=request)
        with pytest.raises(RequestError, match=r"Prompt 1: .*no LoRA adapter"):
            llm.generate([STORY] * 2, GREEDY, lora=["one", "nope"])


def test_adapters_of_an_llm_that_takes_none(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="enable_lora=True"):
        llm.generate(STORY, GREEDY, lora="one")
    with pytest.raises(StartupError, match="--lora-modules one"):
        LLM(**SMALL, lora_modules=[{"name": "one", "path": str(tmp_path / "nothing")}])
