"""A whole engine over two processes: its answers are those of one, through everything that an engine can do."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import StartupError
from engine.distributed.leader import RankedExecutor
from engine.executor.cpu import CPUExecutor
from engine.flags import DEMO_MODEL
from engine.forward import DeviceLostError
from engine.llm import LLM, RequestOutput, SamplingParams
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers
from engine.models.loading.load import load_model
from engine.models.registry import read_spec
from tests.lora.handmade import PREFIX, factors, write
from tests.models.support import make_checkpoint

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    # Eight sequences of a hundred tokens do not fit: some are retracted.
    "num_gpu_blocks_override": 32,
}
PROMPTS = [[5, 6, 7, 8, 9], list(range(40, 75)), [11, 12, 13] * 11]
BRIEF = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    with LLM(str(DEMO_MODEL), **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def two() -> Iterator[LLM]:
    with LLM(str(DEMO_MODEL), tensor_parallel_size=2, **OPTIONS) as llm:
        yield llm


def executor_of(llm: LLM) -> RankedExecutor:
    executor = llm._built.engine.executor
    assert isinstance(executor, RankedExecutor)
    return executor


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def numbers(outputs: list[RequestOutput]) -> list[float]:
    """Every log-probability there is, of the texts and their prompts."""
    found = []
    for output in outputs:
        assert output.outputs[0].logprobs is not None and output.prompt_logprobs is not None
        found += [one.logprob for one in (*output.prompt_logprobs, *output.outputs[0].logprobs) if one is not None]
    return found


def test_tokens_and_log_probabilities(alone: LLM, two: LLM) -> None:
    first, second = alone.generate(PROMPTS, GREEDY), two.generate(PROMPTS, GREEDY)
    assert tokens(first) == tokens(second)
    assert numbers(first) == pytest.approx(numbers(second), abs=1e-4)
    sampled = SamplingParams(max_tokens=24, seed=7, ignore_eos=True, presence_penalty=0.5, min_p=0.02)
    assert tokens(alone.generate(PROMPTS, sampled)) == tokens(two.generate(PROMPTS, sampled))
    attention = executor_of(two)._attention
    assert attention is not None and attention.recordings is not None
    assert len(attention.recordings) and attention.recordings.refused is None, "steps were not recorded"


def test_a_schema(alone: LLM, two: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["fox", "owl"]}}, "required": ["a"]}
    params = SamplingParams(max_tokens=60, seed=1)
    [first], [second] = (llm.generate("Say", params, structure=schema) for llm in (alone, two))
    assert first.outputs[0].text == second.outputs[0].text
    assert json.loads(second.outputs[0].text)["a"] in ("fox", "owl")


def test_the_same_bits_in_any_company(two: LLM) -> None:
    by_itself = two.generate(PROMPTS[1:2], GREEDY)
    long = dataclasses.replace(GREEDY, max_tokens=100, prompt_logprobs=None)
    counters = two._built.engine.scheduler.counters
    before = counters.num_preemptions
    params = [long, GREEDY, *[long] * 6]
    among = two.generate([PROMPTS[0], PROMPTS[1], *([20 + number] * 30 for number in range(6))], params)[1:2]
    assert counters.num_preemptions > before, "nobody was retracted"
    assert tokens(by_itself) == tokens(among) and numbers(by_itself) == numbers(among)


@pytest.mark.parametrize("level", [1, 2])
def test_sleep(two: LLM, level: int) -> None:
    engine, before = two._built.engine, tokens(two.generate(PROMPTS, GREEDY))
    two._wait(engine.sleep(level))
    two._wait(engine.wake_up())
    assert tokens(two.generate(PROMPTS, GREEDY)) == before


def test_other_weights_are_those_of_all_ranks_or_of_none(two: LLM, tmp_path: Path) -> None:
    engine, before = two._built.engine, tokens(two.generate(PROMPTS, GREEDY))
    other = tmp_path / "other"
    shutil.copytree(DEMO_MODEL, other, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] * -1
    save_file(weights, other / "model.safetensors")
    two._wait(engine.load_weights(other))
    changed = tokens(two.generate(PROMPTS, GREEDY))
    assert changed != before
    broken = tmp_path / "broken"
    shutil.copytree(other, broken)
    save_file({name: weights[name]}, broken / "model.safetensors")
    with pytest.raises(StartupError, match="is missing"):
        two._wait(engine.load_weights(broken))
    assert tokens(two.generate(PROMPTS, GREEDY)) == changed
    two._wait(engine.load_weights(DEMO_MODEL))
    assert tokens(two.generate(PROMPTS, GREEDY)) == before


def test_a_rank_has_its_part_of_the_memory(two: LLM) -> None:
    own = sum(linear._weight.nbytes for linear in executor_of(two)._model.linears)  # type: ignore[union-attr]
    whole = sum(tensor.nbytes for tensor in load_file(DEMO_MODEL / "model.safetensors").values() if tensor.dim() > 1)
    assert own <= 0.6 * 2 * whole  # float32, and bfloat16 in the file


def test_ranks_do_not_mind_what_a_terminal_sends(two: LLM) -> None:
    [pid] = executor_of(two).rank_pids
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert len(tokens(two.generate(PROMPTS, GREEDY))) == 3


def test_a_rank_that_dies_while_nothing_runs_ends_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(str(DEMO_MODEL), tensor_parallel_size=2, **OPTIONS) as llm:
        engine, [pid] = llm._built.engine, executor_of(llm).rank_pids
        os.kill(pid, signal.SIGKILL)

        async def failed() -> bool:
            assert engine._task is not None
            await asyncio.wait({engine._task}, timeout=30)
            return engine.failed

        assert llm._wait(failed())
        leader, what = executor_of(llm)._leader, rf"rank 1 \(process {pid}\) was killed by signal 9"
        with pytest.raises(DeviceLostError, match=f"^{what}$"), leader.lost():
            leader.command(do="adapters", loads=[], gone=[])
        assert not any(record.exc_info for record in caplog.records if record.name == "oneloop.ranks")


def test_a_step_for_which_a_rank_has_no_memory_ends_the_group() -> None:
    """It says so itself; the others have what it has not."""
    with LLM(str(DEMO_MODEL), tensor_parallel_size=2, **OPTIONS) as llm:
        leader = executor_of(llm)._leader
        with pytest.raises(DeviceLostError, match=r"^no memory for it$"), leader.lost():
            raise StartupError("no memory for it")
        with pytest.raises(DeviceLostError, match=r"^the ranks have ended$|^rank 1 "), leader.lost():
            leader.meet()


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_drafts(alone: LLM, method: str) -> None:
    speculation = json.dumps({"method": method, "num_speculative_tokens": 3})
    with LLM(str(DEMO_MODEL), tensor_parallel_size=2, speculative_config=speculation, **OPTIONS) as llm:
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        assert tokens(llm.generate(PROMPTS, params)) == tokens(alone.generate(PROMPTS, params))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float16"}, "--tensor-parallel-size 2 needs --dtype float32 or bfloat16"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel: LlamaForCausalLM has no experts"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 1}, "--enable-expert-parallel needs"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3: does not divide the 4 attention heads"),
        ({"tensor_parallel_size": 65}, "--tensor-parallel-size 65 is more than 64"),
    ],
)
def test_what_does_not_go_with_ranks_is_one_line(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(StartupError) as caught:
        LLM(str(DEMO_MODEL), **{**OPTIONS, "tensor_parallel_size": 2, **options})
    assert str(caught.value).startswith(expected)


def test_drafts_of_a_head_that_reads_the_models_embedding(alone: LLM, tmp_path: Path) -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], 64, config["num_attention_heads"]
    own = {
        **{name: config[name] for name in ("hidden_size", "num_attention_heads", "vocab_size", "rms_norm_eps")},
        **{"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "num_key_value_heads": heads},
        **{"head_dim": hidden // heads, "intermediate_size": inner, "max_position_embeddings": 512},
        **{"draft_vocab_size": config["vocab_size"], "hidden_act": "silu"},
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    }
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "fc": (hidden, 3 * hidden),
        **{f"midlayer.self_attn.{name}_proj": (hidden, 2 * hidden) for name in "qkv"},
        "midlayer.self_attn.o_proj": (hidden, hidden),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (config["vocab_size"], hidden),
    }
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = torch.ones(hidden)
    (tmp_path / "config.json").write_text(json.dumps(own))
    save_file(tensors, tmp_path / "model.safetensors")
    speculation = json.dumps(
        {"method": "eagle3", "model": str(tmp_path), "num_speculative_tokens": 2, "adaptive": False}
    )
    with LLM(str(DEMO_MODEL), tensor_parallel_size=2, speculative_config=speculation, **OPTIONS) as llm:
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        assert tokens(llm.generate(PROMPTS, params)) == tokens(alone.generate(PROMPTS, params))
        drafts = llm._built.engine.scheduler.speculation
        assert drafts is not None and drafts.num_draft_tokens > 0


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_a_cache_of_fewer_bits(dtype: str) -> None:
    found: list[Any] = []
    for size in (1, 2):
        with LLM(str(DEMO_MODEL), tensor_parallel_size=size, kv_cache_dtype=dtype, **OPTIONS) as llm:
            found.append(llm.generate(PROMPTS, GREEDY))
            executor = llm._built.engine.executor
            assert isinstance(executor, CPUExecutor)
            found.append(executor.page_bytes)
    assert tokens(found[0]) == tokens(found[2])
    # Where a number lies between two codes, the last bit of a sum decides.
    assert numbers(found[0]) == pytest.approx(numbers(found[2]), abs=0.1)
    assert found[1] == found[3]


STATES: dict[str, Any] = {
    **{"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12},
    **{"linear_value_head_dim": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **{"hidden_size": 64, "intermediate_size": 96, "vocab_size": 2304, "max_position_embeddings": 256},
}


def test_drafts_for_a_model_with_recurrent_states(tmp_path: Path) -> None:
    """States follow the tokens that were right in all ranks."""
    make_checkpoint(tmp_path, "Qwen3_5", **STATES)
    options = {**OPTIONS, "tokenizer": str(DEMO_MODEL), "num_gpu_blocks_override": 64}
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "adaptive": False}
    params = dataclasses.replace(GREEDY, max_tokens=40, prompt_logprobs=None)
    hot = dataclasses.replace(params, temperature=1.1, seed=4, presence_penalty=0.5)
    with LLM(str(tmp_path), tensor_parallel_size=2, **options) as llm:
        expected = [llm.generate(PROMPTS, each) for each in (params, hot)]
        longer = [[*p, *o.outputs[0].token_ids] for p, o in zip(PROMPTS, expected[0], strict=True)]
        expected.append(llm.generate(longer, params))
    with LLM(str(tmp_path), tensor_parallel_size=2, speculative_config=json.dumps(drafting), **options) as llm:
        found = [llm.generate(prompts, each) for prompts, each in ((PROMPTS, params), (PROMPTS, hot), (longer, params))]
        speculation = llm._built.engine.scheduler.speculation
    assert list(map(tokens, found)) == list(map(tokens, expected))
    # To the bit: drafts change nothing in ranks, either.
    logprobs = [[output.outputs[0].logprobs for output in outputs] for outputs in (*found, *expected)]
    assert all(all(each) for each in logprobs) and logprobs[:3] == logprobs[3:]
    assert speculation is not None and speculation.num_draft_tokens > speculation.num_accepted_tokens > 0


def test_recurrent_states(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Qwen3_5", **STATES)
    options = {**OPTIONS, "tokenizer": str(DEMO_MODEL), "num_gpu_blocks_override": 64}
    with LLM(str(tmp_path), **options) as one, LLM(str(tmp_path), tensor_parallel_size=2, **options) as two:
        first, second = one.generate(PROMPTS, GREEDY), two.generate(PROMPTS, GREEDY)
        assert tokens(first) == tokens(second)
        assert numbers(first) == pytest.approx(numbers(second), abs=1e-4)
        # From snapshots, and by themselves.
        params = dataclasses.replace(GREEDY, prompt_logprobs=None)
        longer = [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(PROMPTS, first, strict=True)]
        again = two.generate(longer, params)
        assert tokens(one.generate(longer, params)) == tokens(again)
        assert any(output.num_cached_tokens for output in again)
        assert tokens(two.generate(longer[:1], params)) == tokens(again[:1])
        two._wait(two._built.engine.sleep(1))
        two._wait(two._built.engine.wake_up())
        assert tokens(two.generate(PROMPTS, GREEDY)) == tokens(second)


def an_adapter(folder: Path, rank: int) -> str:
    """Factors and magnitudes for all layers of the demo model."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "max_adapters": 1}
    layers = load_model(read_spec(DEMO_MODEL), DEMO_MODEL, **options).adapted
    assert isinstance(layers, AdaptedLayers)
    tensors = factors(layers, rank, rank)
    for name, place in layers.places.items():
        if not place.is_table and ".layers." in name:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.rand(place.count) + 0.5
    config = {"r": rank, "lora_alpha": 2 * rank, "use_dora": True}
    tensors = {name: value for name, value in tensors.items() if ".layers." in name}
    return str(write(folder / f"a{rank}", tensors, **config))


def test_adapters(tmp_path: Path) -> None:
    """Read by both ranks, in and out of their places, beside drafts, behind sleep and other weights."""
    paths = {f"a{rank}": an_adapter(tmp_path, rank) for rank in (1, 2, 3)}
    given = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "lora_modules": paths, **OPTIONS}
    drafting = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}}
    prompts = [*PROMPTS, *PROMPTS, PROMPTS[0]]
    names = ["a1", None, "a2", "a3", "a1", "a2", "a3"]
    with LLM(str(DEMO_MODEL), **given) as one, LLM(str(DEMO_MODEL), tensor_parallel_size=2, **given, **drafting) as two:
        first, second = (llm.generate(prompts, BRIEF, lora=names) for llm in (one, two))
        assert tokens(first) == tokens(second)
        assert numbers(first) == pytest.approx(numbers(second), abs=1e-4)
        plain = one.generate(prompts, BRIEF)
        assert sum(a != b for a, b in zip(tokens(first), tokens(plain), strict=True)) >= 5
        two._wait(two._built.engine.sleep(2))
        two._wait(two._built.engine.wake_up())
        assert tokens(two.generate(prompts, BRIEF, lora=names)) == tokens(first)
        two._wait(two._built.engine.load_weights(DEMO_MODEL))
        assert tokens(two.generate(prompts, BRIEF, lora=names)) == tokens(first)
        store = two._built.engine.adapters
        assert store is not None
        two._wait(store.unload("a2"))
        (Path(paths["a3"]) / "adapter_model.safetensors").write_bytes(b"broken")
        with pytest.raises(AdapterError, match="adapter a3"):
            executor_of(two).read_adapter(Path(paths["a3"]))
        assert tokens(two.generate(prompts[:2], BRIEF, lora=names[:2])) == tokens(first)[:2]
