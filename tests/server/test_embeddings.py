"""/v1/embeddings, /score and /rerank: shapes and refusals on the fake device, numbers against transformers."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from engine.executor.cpu import CPUExecutor
from engine.executor.fake_oracle import FAKE_WIDTH, expected_vector
from engine.forward import ForwardError
from engine.models.abilities import Abilities
from engine.request import Pooling
from engine.text.chat_template import ChatTemplate
from server.scoring import INSTRUCTION, JUDGE
from tests.models.support import load, make_checkpoint
from tests.server.support import DEMO, NO, YES, Live, live, served_model, tokenizer, until
from tests.server.test_errors import check_shape

EMBEDDINGS = "/v1/embeddings"
VOCAB = tokenizer().vocab_size
EMBEDS = Abilities(generates=False, embedding="mean", width=FAKE_WIDTH)
SCORES = Abilities(generates=False, width=FAKE_WIDTH, score_tokens=(YES, NO))


@pytest_asyncio.fixture
async def embedder() -> AsyncIterator[Live]:
    async with live(model=served_model(abilities=EMBEDS)) as server:
        yield server


@pytest_asyncio.fixture
async def scorer() -> AsyncIterator[Live]:
    async with live(model=served_model(abilities=SCORES)) as server:
        yield server


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector.astype(np.float64))


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text)


def close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(np.array(ours) - theirs).max() <= tolerance * np.abs(theirs).max())


# ---- embeddings


async def test_the_four_forms_of_input(embedder: Live) -> None:
    texts = ["a fox", "the moon and the sea " * 20, "x"]
    ids = [ids_of(text) for text in texts]
    expected = [unit(expected_vector(tokens, Pooling("mean"))) for tokens in ids]
    for given, wanted in ((texts, expected), (ids, expected), (texts[0], expected[:1]), (ids[1], expected[1:2])):
        status, body = await embedder.post(EMBEDDINGS, {"input": given, "model": "demo", "user": "me"})
        assert status == 200 and set(body) == {"object", "data", "model", "usage"}, body
        assert body["object"] == "list" and body["model"] == "demo"
        assert [(item["object"], item["index"]) for item in body["data"]] == [
            ("embedding", index) for index in range(len(wanted))
        ]
        for item, vector in zip(body["data"], wanted, strict=True):
            assert len(item["embedding"]) == FAKE_WIDTH and close(item["embedding"], vector, 1e-6)
    count = sum(map(len, ids))
    _, body = await embedder.post(EMBEDDINGS, {"input": texts})
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
    await embedder.all_free()


async def test_base64_is_little_endian_float32(embedder: Live) -> None:
    _, plain = await embedder.post(EMBEDDINGS, {"input": ["a", "b"], "encoding_format": "float"})
    _, packed = await embedder.post(EMBEDDINGS, {"input": ["a", "b"], "encoding_format": "base64"})
    for one, other in zip(plain["data"], packed["data"], strict=True):
        unpacked = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert unpacked.tolist() == np.array(one["embedding"], np.float32).tolist()


async def test_length_and_dimensions() -> None:
    prompt = [5, 6, 7]
    whole = expected_vector(prompt, Pooling("last"))
    plain = dataclasses.replace(EMBEDS, embedding="last", normalize=False)
    async with live(model=served_model(abilities=plain)) as server:
        _, body = await server.post(EMBEDDINGS, {"input": prompt})
        assert body["data"][0]["embedding"] == whole.tolist()
        _, body = await server.post(EMBEDDINGS, {"input": prompt, "normalize": True})
        assert close(body["data"][0]["embedding"], unit(whole), 1e-6)
        error = check_shape(*await server.post(EMBEDDINGS, {"input": prompt, "dimensions": FAKE_WIDTH}))
        assert error["param"] == "dimensions" and "does not support matryoshka" in error["message"]
    for dimensions in ((), (2, 4)):
        nested = dataclasses.replace(EMBEDS, embedding="last", dimensions=dimensions)
        async with live(model=served_model(abilities=nested)) as server:
            _, body = await server.post(EMBEDDINGS, {"input": prompt, "dimensions": 2})
            # Shortened first: it is the short vector that has length 1.
            assert close(body["data"][0]["embedding"], unit(whole[:2]), 1e-6)
            error = check_shape(*await server.post(EMBEDDINGS, {"input": prompt, "dimensions": 5}))
            assert error["param"] == "dimensions"


async def test_truncation_keeps_what_the_tokenizer_adds(embedder: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two three four five six seven eight"
    bare = tokenizer().encode(text, add_special_tokens=False)

    async def sent(most: int, given: Any = text, **fields: Any) -> list[int]:
        """The ids whose vector the answer is."""
        body = {"input": given, "truncate_prompt_tokens": most, **fields}
        status, answer = await embedder.post(EMBEDDINGS, body)
        assert status == 200, answer
        count = answer["usage"]["prompt_tokens"]
        for ids in ([1, *bare[: count - 2], 2], bare[:count], [1, *bare[: count - 1]], [1, 2][:count]):
            if len(ids) == count and close(
                answer["data"][0]["embedding"], unit(expected_vector(ids, Pooling("mean"))), 1e-6
            ):
                return ids
        raise AssertionError("no truncation that was foreseen")

    assert await sent(4) == ids_of(text)[:4] == bare[:4], "the demo's tokenizer adds nothing"
    assert await sent(3, bare) == bare[:3]
    assert await sent(-1) == bare
    # One that puts a token before the text and one behind it.
    encode = tokenizer().encode

    def adding(text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = encode(text, add_special_tokens=False)
        return [1, *ids, 2] if add_special_tokens else ids

    monkeypatch.setattr(tokenizer(), "encode", adding)
    assert await sent(4) == [1, *bare[:2], 2]
    assert await sent(2) == [1, 2] and await sent(1) == [1]
    assert await sent(3, add_special_tokens=False) == bare[:3]
    assert await sent(500) == [1, *bare, 2]


async def test_unknown_models_and_prompts_that_do_not_fit(embedder: Live) -> None:
    error = check_shape(*await embedder.post(EMBEDDINGS, {"input": "x", "model": "other"}), expected=404)
    assert error["code"] == "model_not_found"
    for given in ([7] * 513, [[5], [7] * 513]):
        error = check_shape(*await embedder.post(EMBEDDINGS, {"input": given}))
        assert error["code"] == "context_length_exceeded" and error["param"] == "input"
        assert "maximum context length is 512 tokens" in error["message"]
    status, _ = await embedder.post(EMBEDDINGS, {"input": [[7] * 512] * 8, "dimensions": None, "endianness": "little"})
    assert status == 200
    await embedder.all_free()


async def test_models_that_cannot_say_what_to_do(embedder: Live) -> None:
    async with live(model=served_model(abilities=Abilities())) as server:
        error = check_shape(*await server.post(EMBEDDINGS, {"input": "x"}))
        assert "does not support embeddings" in error["message"] and "--pooling" in error["message"]
        for path, body in (
            ("/score", {"text_1": "a", "text_2": "b"}),
            ("/rerank", {"query": "a", "documents": ["b"]}),
        ):
            error = check_shape(*await server.post(path, body))
            assert "does not score" in error["message"] and "--score-tokens" in error["message"]
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        error = check_shape(*await embedder.post(path, body))
        assert "does not generate text" in error["message"] and "--runner generate" in error["message"]
    labels = {"query": "a", "items": ["b"], "label_token_ids": [5]}
    assert "no output layer" in check_shape(*await embedder.post("/v1/score", labels))["message"]


async def test_both_at_once() -> None:
    """A model that generates may embed beside that; neither changes the other."""
    both = Abilities(embedding="last", width=FAKE_WIDTH)
    async with live(model=served_model(abilities=both)) as server:
        alone = await server.complete([9] * 40, max_tokens=30, temperature=0)
        asking = [server.complete([9] * 40, max_tokens=30, temperature=0) for _ in range(4)]
        embedding = [server.post(EMBEDDINGS, {"input": [[n] * (5 * n) for n in range(3, 20)]}) for _ in range(4)]
        texts, vectors = await asyncio.gather(asyncio.gather(*asking), asyncio.gather(*embedding))
        assert {text["choices"][0]["text"] for text in texts} == {alone["choices"][0]["text"]}
        for _, body in vectors:
            for n, item in enumerate(body["data"], 3):
                assert close(item["embedding"], unit(expected_vector([n] * (5 * n), Pooling("last"))), 1e-6)
        await server.all_free()


async def test_many_inputs_and_a_small_queue() -> None:
    async with live(model=served_model(abilities=EMBEDS), max_queued_requests=3000) as server:
        status, body = await server.post(EMBEDDINGS, {"input": [[n % 500 + 3] * 3 for n in range(2048)]})
        assert status == 200 and len(body["data"]) == 2048
    async with live(model=served_model(abilities=EMBEDS), max_num_seqs=1, max_queued_requests=8) as server:
        error = check_shape(*await server.post(EMBEDDINGS, {"input": ["a"] * 9}))
        assert "more than the queue holds" in error["message"]
        server.device.gate.clear()
        waiting = asyncio.create_task(server.post(EMBEDDINGS, {"input": ["a"] * 8}))
        await until(lambda: server.engine.stats().num_running == 1)
        check_shape(*await server.post(EMBEDDINGS, {"input": ["a"] * 8}), expected=429)
        server.device.gate.set()
        assert (await waiting)[0] == 200
        await server.all_free()


async def test_failures_and_clients_that_leave() -> None:
    broken = True

    def fail_on(step: int) -> None:
        if broken:
            raise ForwardError("out of memory")

    async with live(model=served_model(abilities=EMBEDS), fail_on=fail_on) as server:
        check_shape(*await server.post(EMBEDDINGS, {"input": ["a", "b"]}), expected=500)
        broken = False
        assert (await server.post(EMBEDDINGS, {"input": ["a", "b"]}))[0] == 200
        server.device.gate.clear()
        waiting = asyncio.create_task(server.post(EMBEDDINGS, {"input": [[5] * 400] * 30}))
        await until(lambda: server.num_requests() == 30)
        waiting.cancel()
        await until(lambda: server.num_requests() == 0)
        server.device.gate.set()
        await server.all_free()


# ---- scores


def chat_ids(
    query: str, document: str, instruction: str = INSTRUCTION, template: ChatTemplate | None = None
) -> list[int]:
    """The default prompt, spelled out."""
    messages = [
        {"role": "system", "content": JUDGE},
        {"role": "user", "content": f"<Instruct>: {instruction}\n\n<Query>: {query}\n\n<Document>: {document}"},
    ]
    rendered = (template or ChatTemplate.load(DEMO)).render(messages, kwargs={"enable_thinking": False})  # type: ignore[union-attr]
    return tokenizer().encode(rendered, add_special_tokens=False)


def fake_score(ids: list[int]) -> float:
    yes, no = expected_vector(ids, Pooling("logprobs", (YES, NO))).astype(np.float64)
    return float(1 / (1 + np.exp(min(no - yes, 700))))


async def test_score_shapes(scorer: Live) -> None:
    for path in ("/score", "/v1/score"):
        for names in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
            body = {names[0]: "q", names[1]: ["one", "two", {"text": "three"}]}
            status, answer = await scorer.post(path, body)
            assert status == 200 and answer["object"] == "list" and answer["model"] == "demo", answer
            ids = [chat_ids("q", document) for document in ("one", "two", "three")]
            assert [item["index"] for item in answer["data"]] == [0, 1, 2]
            assert all(item["object"] == "score" for item in answer["data"])
            assert close([item["score"] for item in answer["data"]], [fake_score(prompt) for prompt in ids], 1e-6)
            count = sum(map(len, ids))
            assert answer["usage"] == {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
    _, answer = await scorer.post("/score", {"text_1": ["a", "b"], "text_2": ["c", "d"], "instruction": "Find it"})
    expected = [fake_score(chat_ids(*pair, "Find it")) for pair in (("a", "c"), ("b", "d"))]
    assert close([item["score"] for item in answer["data"]], expected, 1e-6)
    long = ["word " * 500 for _ in range(10)]
    check_shape(*await scorer.post("/score", {"text_1": "q", "text_2": long}))


async def test_rerank_sorts(scorer: Live) -> None:
    documents = [f"document {number}" for number in range(7)]
    scores = [fake_score(chat_ids("q", document)) for document in documents]
    order = sorted(range(7), key=lambda index: -scores[index])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        status, answer = await scorer.post(path, {"query": "q", "documents": documents})
        assert status == 200 and set(answer) == {"id", "model", "results", "usage"}
        assert [result["index"] for result in answer["results"]] == order
        assert [result["document"]["text"] for result in answer["results"]] == [documents[index] for index in order]
        assert close([result["relevance_score"] for result in answer["results"]], sorted(scores, reverse=True), 1e-6)
    mixed: list[Any] = [*documents[:3], *({"text": document} for document in documents[3:])]
    body = {"query": "q", "documents": mixed, "top_n": 2, "return_documents": False}
    _, answer = await scorer.post("/rerank", body)
    assert [set(result) for result in answer["results"]] == [{"index", "relevance_score"}] * 2
    assert [result["index"] for result in answer["results"]] == order[:2]
    for top_n, count in ((0, 7), (100, 7), (7, 7), (1, 1)):
        _, answer = await scorer.post("/rerank", {"query": "q", "documents": documents, "top_n": top_n})
        assert len(answer["results"]) == count


async def test_a_template_with_roles_of_its_own() -> None:
    source = (
        "{%- for m in messages if m['role'] == 'system' %}I:{{ m['content'] }}\n{% endfor -%}"
        "Q:{{ (messages | selectattr('role', 'eq', 'query') | first)['content'] }}\n"
        "D:{{ (messages | selectattr('role', 'eq', 'document') | first)['content'] }}\nA:"
    )
    template = ChatTemplate({"default": source}, {})
    async with live(model=served_model(abilities=SCORES, chat_template=template)) as server:
        for instruction, text in ((None, "Q:q\nD:d\nA:"), ("find", "I:find\nQ:q\nD:d\nA:")):
            _, body = await server.post("/score", {"text_1": "q", "text_2": "d", "instruction": instruction})
            assert close([body["data"][0]["score"]], [fake_score(ids_of(text))], 1e-6)


async def test_cosine_of_embeddings(embedder: Live) -> None:
    texts = ["one", "another", "a third"]
    one, another, third = (unit(expected_vector(ids_of(text), Pooling("mean"))) for text in texts)
    _, body = await embedder.post("/score", {"text_1": "one", "text_2": [*texts, "one"]})
    expected = [1.0, float(one @ another), float(one @ third), 1.0]
    assert close([item["score"] for item in body["data"]], expected, 1e-6)
    # Each text is read once.
    assert body["usage"]["prompt_tokens"] == sum(len(ids_of(text)) for text in texts)
    _, body = await embedder.post("/rerank", {"query": "one", "documents": texts, "top_n": 1})
    assert body["results"] == [
        {"index": 0, "document": {"text": "one"}, "relevance_score": body["results"][0]["relevance_score"]}
    ]
    assert body["results"][0]["relevance_score"] == pytest.approx(1.0)
    error = check_shape(*await embedder.post("/rerank", {"query": "q", "documents": ["d"], "instruction": "x"}))
    assert error["param"] == "instruction"


async def test_labels(server: Live) -> None:
    """SGLang's form, for every model that generates."""
    labels = [7, 9, 400]
    for relative in (False, True):
        body: dict[str, Any] = {"query": "q: ", "items": ["a", "b"], "label_token_ids": labels}
        status, answer = await server.post("/v1/score", {**body, "apply_softmax": relative})
        assert status == 200 and answer["object"] == "scoring", answer
        for item, found in zip("ab", answer["scores"], strict=True):
            logprobs = expected_vector(ids_of(f"q: {item}"), Pooling("logprobs", tuple(labels))).astype(np.float64)
            shares = np.exp(logprobs - logprobs.max()) if relative else np.exp(logprobs)
            assert found == pytest.approx((shares / shares.sum() if relative else shares).tolist())
    ids = {"query": [5, 6], "items": [[7], [8, 9]], "label_token_ids": labels, "apply_softmax": True}
    first = {**ids, "item_first": True}
    swapped = {**ids, "query": [], "items": [[7, 5, 6], [8, 9, 5, 6]]}
    one, other = [(await server.post("/score", body))[1]["scores"] for body in (first, swapped)]
    assert one == other


async def test_an_unknown_model_scores_nothing(scorer: Live) -> None:
    check_shape(*await scorer.post("/rerank", {"query": "a", "documents": ["a"], "model": "x"}), expected=404)
    assert (await scorer.post("/rerank", {"query": "a", "documents": ["a"]}))[0] == 200
    await scorer.all_free()


# ---- numbers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("tiny")
    return make_checkpoint(directory, "Qwen3", head_dim=16, vocab_size=VOCAB, max_position_embeddings=512), directory


async def test_the_openai_client_gets_what_transformers_says(tiny: tuple[Any, Path]) -> None:
    reference, directory = tiny
    texts = ["The fox and the moon.", "Grüße, 🦜! " * 12, "a"]
    for kind in ("last", "mean"):
        found = Abilities(embedding=kind, width=48)  # type: ignore[arg-type]
        model = load(directory)

        def make_device(limits: Any, model: Any = model) -> CPUExecutor:
            return CPUExecutor(model, limits, dtype=torch.float32)

        async with (
            live(model=served_model(abilities=found), make_device=make_device) as server,
            server.openai() as client,
        ):
            # Its default is base64, which it unpacks.
            packed = await client.embeddings.create(model="demo", input=texts)
            plain = await client.embeddings.create(model="demo", input=texts, encoding_format="float")
        assert packed.usage.prompt_tokens == packed.usage.total_tokens == sum(len(ids_of(text)) for text in texts)
        for text, one, other in zip(texts, packed.data, plain.data, strict=True):
            with torch.inference_mode():
                hidden = reference.model(torch.tensor([ids_of(text)])).last_hidden_state[0]
            expected = unit((hidden[-1] if kind == "last" else hidden.mean(dim=0)).numpy())
            assert close(one.embedding, expected) and close(other.embedding, expected)


async def test_scores_are_those_of_transformers(tiny: tuple[Any, Path]) -> None:
    reference, directory = tiny
    model = load(directory)
    documents = ["Foxes live in forests.", "Paris is a city.", "The moon is far away.", "Paris is a city."]
    expected = []
    for document in documents:
        with torch.inference_mode():
            logits = reference(torch.tensor([chat_ids("Where do foxes live?", document)])).logits[0, -1]
        expected.append(float(torch.softmax(logits[[NO, YES]], -1)[1]))
    found = Abilities(score_tokens=(YES, NO), width=48)
    async with live(
        model=served_model(abilities=found),
        make_device=lambda limits: CPUExecutor(model, limits, dtype=torch.float32),
    ) as server:
        body = {"query": "Where do foxes live?", "documents": documents}
        for _ in range(2):  # the second time from the cache
            _, answer = await server.post("/rerank", body)
            scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
            assert [scores[index] for index in range(4)] == pytest.approx(expected, rel=1e-4)
            # Equal documents are equal, and keep their order.
            order = [result["index"] for result in answer["results"]]
            assert scores[1] == scores[3] and order.index(3) == order.index(1) + 1
