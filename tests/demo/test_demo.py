"""Tests of the bundled demo model: its corpus, template, tokenizer, architecture and exported weights."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.demo import evaluate, model
from engine.demo.corpus import HERE, examples, render, to_text
from engine.demo.data import CLOSE, END, TURN, Shard, encode, load_tokenizer
from engine.demo.train import PACK, ShardedOptimizer, drill, export, orthogonal, plan_step, schedule

LOSS_LIMIT = 0.35  # nats per answer token; an untrained model has 7.7

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo() -> evaluate.Model:
    return evaluate.Model(HERE)


def digest(seed: int, held_out: bool = False, count: int = 300) -> str:
    texts = (to_text(e) for e in itertools.islice(examples(seed, held_out), count))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def test_corpus_is_deterministic_and_seeded() -> None:
    assert digest(3) == digest(3)
    assert digest(3) != digest(4)
    assert digest(3) != digest(3, held_out=True)


def test_corpus_covers_every_task() -> None:
    tasks = {e.task for e in itertools.islice(examples(9), 3000)}
    assert {
        "story",
        "facts",
        "arithmetic",
        "list",
        "json",
        "tools",
        "translate",
        "emoji",
        "memory",
        "text",
    } <= tasks


def test_held_out_sums_are_never_trained_on() -> None:
    def questions(held_out: bool) -> set[str]:
        found = itertools.islice(evaluate.task_examples("arithmetic", 5, held_out), 1500)
        return {e.messages[-1]["content"].split(" = ")[0] for e in found}

    assert not questions(True) & questions(False)


def test_template_renders_all_roles() -> None:
    text = render(
        [
            {"role": "system", "content": "Be short."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Oslo?"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}},
                    {
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                    },
                ],
            },
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": "rainy"},
        ],
        [TOOL],
        add_generation_prompt=True,
    )
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
    assert text == (
        "<|im_start|>system\nBe short.\n\nYou can call these tools:\n<tools>\n"
        + json.dumps(TOOL)
        + "\n</tools>\nTo call a tool, answer with:\n<tool_call>\n"
        + '{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n'
        + "<|im_start|>user\nWeather in Oslo?<|im_end|>\n"
        + f"<|im_start|>assistant\n{call % 'Oslo'}\n{call % 'Rome'}<|im_end|>\n"
        + "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
        + "<tool_response>\nrainy\n</tool_response><|im_end|>\n"
        + "<|im_start|>assistant\n"
    )


def test_template_adds_no_system_prompt() -> None:
    assert render([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_template_matches_transformers(demo: evaluate.Model) -> None:
    for e in itertools.islice(examples(21), 60):
        if e.text is None:
            assert demo.tokenizer.apply_chat_template(e.messages, tools=e.tools, tokenize=False) == to_text(e)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "17 + 25 = 42",
        "你好，世界",
        "🦊❤️👩‍🚀",
        "café naïve Ω ß",
        "\t\n  x \r\n",
        "العربية",
        "\u0000\x7f",
    ],
)
def test_tokenizer_round_trips(text: str) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_splits_digits_and_knows_its_marks() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]
    assert [tokenizer.token_to_id(t) for t in (END, TURN, CLOSE)] == [0, 1, 2]
    assert len(tokenizer.encode("<tool_call>").ids) == 1
    assert tokenizer.get_vocab_size() == model.Shape().vocab


def test_answers_carry_the_loss() -> None:
    tokenizer = load_tokenizer()
    for e in itertools.islice(examples(8), 50):
        (ids,), (weights,) = encode(tokenizer, [e])
        if e.text is None:
            full = [i for i, w in zip(ids, weights, strict=True) if w == 255]
            assert full.count(tokenizer.token_to_id(CLOSE)) == sum(m["role"] == "assistant" for m in e.messages)


def some_shard() -> Shard:
    starts = np.asarray([0, 3, 9, 30, 34])
    return Shard(np.arange(60, dtype=np.uint16), np.full(60, 255, np.uint8), starts)


def test_windows_begin_with_documents() -> None:
    shard = some_shard()
    assert shard.windows(10).tolist() == [0, 9, 30, 34]
    x, y, w = shard.rows(np.asarray([[9, 11]]))
    assert x[0].tolist() == list(range(9, 19)) and y[0].tolist() == list(range(10, 20)) and w.min() == 1.0


def test_batches_hold_every_document_once() -> None:
    shard = some_shard()
    batches = shard.batches(np.random.default_rng(0), unit=24)
    spans = np.concatenate(batches)
    assert sorted(map(tuple, spans.tolist())) == [(0, 3), (3, 6), (9, 21), (30, 4), (34, 26)]
    assert all(len(b) == 1 or len(b) * b[:, 1].max() <= 24 for b in batches)
    _, _, w = shard.rows(np.asarray([[0, 3], [3, 6]]))
    assert w.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_steps_hold_the_same_work() -> None:
    state = {"documents": 0, "packs": 0}
    for share in (0.0, 0.3, 0.9):
        for step in range(8):
            plan = plan_step(share, step, 4, state)
            assert sum(kind != PACK for _, kind in plan) == 4
    assert state["packs"] == 1
    x, y, w = drill(5)
    half = (x.shape[1] + 1) // 2
    assert torch.equal(x[:, :half], torch.cat((x, y[:, -1:]), dim=1)[:, half:]) and w.sum() > 0


def test_forward_equals_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model.Shape(vocab=160, hidden=128, layers=2, heads=2, kv_heads=1, inner=192)
    p = model.views(model.init_flat(shape, 1), shape)
    config = shape.config(None, 2, 0)
    for key in ("torch_dtype", "architectures", "model_type"):
        del config[key]
    reference = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    reference.load_state_dict({**p, "lm_head.weight": p["model.embed_tokens.weight"]})
    ids = torch.randint(0, shape.vocab, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = model.logits(p, shape, ids, model.rotations(shape, 90))
        torch.testing.assert_close(mine, reference(ids).logits, atol=2e-5, rtol=1e-4)


def test_sharded_optimizer_equals_one_worker() -> None:
    shape = model.Shape(vocab=64, hidden=64, layers=1, heads=1, kv_heads=1, inner=96)
    grads = model.views(torch.randn(shape.size(), generator=torch.Generator().manual_seed(1)), shape)
    results = []
    for world in (1, 3):
        flat = model.init_flat(shape, 1)
        first, second = torch.zeros_like(flat), torch.zeros_like(flat)
        workers = [ShardedOptimizer(shape, flat, first, second, r, world) for r in range(world)]
        assert sorted(n for w in workers for n in w.mine) == sorted(shape.parameters())
        for step in (1, 2):
            for worker in workers:
                worker.step(grads, step, 0.02, 0.004)
        results.append(flat)
    torch.testing.assert_close(results[0], results[1])


def test_orthogonal_and_schedule() -> None:
    singular = torch.linalg.svdvals(orthogonal(torch.randn(48, 32, generator=torch.Generator().manual_seed(2))))
    assert float(singular.min()) > 0.5 and float(singular.max()) < 1.5
    assert schedule(0.0, 0.5) < schedule(0.01, 0.5) < schedule(0.3, 0.5) == 1.0 > schedule(0.9, 0.5) > 0


def test_export_writes_a_loadable_model(tmp_path: Path) -> None:
    shape = model.Shape(layers=1)
    export(model.init_flat(shape, 1), shape, tmp_path)
    prompt = render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert len(evaluate.Model(tmp_path).answers([prompt], limit=3)) == 1


def test_weights_are_small_and_bf16() -> None:
    from safetensors import safe_open

    path = HERE / "model.safetensors"
    assert path.stat().st_size <= 16 * 2**20
    with safe_open(path, "pt") as f:
        assert set(f.keys()) == set(model.Shape().parameters())
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}  # noqa: SIM118


def test_held_out_loss(demo: evaluate.Model) -> None:
    answers, _, _ = demo.loss(60)
    assert answers < LOSS_LIMIT


def test_readme_prompts(demo: evaluate.Model) -> None:
    items = {item["name"]: item for item in evaluate.readme_prompts()}
    assert len(items) == 10
    prompts = [render(i["messages"], i.get("tools"), add_generation_prompt=True) for i in items.values()]
    got = dict(zip(items, demo.answers(prompts), strict=True))
    assert "Lena" in got["story"] and "fox" in got["story"] and len(got["story"]) > 150
    assert "Oslo" in got["facts"]
    assert "42" in got["arithmetic"]
    assert len(got["list"].split("\n")) == 3
    assert json.loads(got["json"]) == {"name": "Mia", "age": 31, "city": "Oslo"}
    assert got["tool"] == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert "谢谢" in got["translate"]
    assert "😊" in got["emoji"]
    assert "oneloop" in got["identity"]
    assert "Tom" in got["memory"]
