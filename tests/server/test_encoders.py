"""Encoders and classifiers over HTTP on tiny random models, against transformers: pairs, prompts, labels, tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import ModelOptions, SchedulerOptions
from engine.executor.cpu import CPUExecutor
from engine.executor.start import encoder_limits
from engine.forward import Limits
from engine.models.abilities import read_abilities
from engine.models.loading.load import load_model
from engine.models.registry import read_spec
from engine.text.tokenizer import Tokenizer
from tests.models.support import edit_json
from tests.models.test_abilities import sentence_transformers
from tests.models.test_encoders import make
from tests.server.support import Live, live, served_model
from tests.server.test_errors import check_shape

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d the fox moon sea tree ##s q: query".split()  # noqa: SIM905
BERT = {
    "vocab_size": 24,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
}


def write_tokenizer(directory: Path) -> None:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    backend = tokenizers.Tokenizer(models.WordPiece({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(WORDS[:5])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.save(str(directory / "tokenizer.json"))


class Model:
    """A directory with a model of a class, and transformers' own."""

    def __init__(self, directory: Path, architecture: str, **sizes: Any) -> None:
        self.directory = directory
        self.reference = make(directory, architecture, {**BERT, **sizes})
        write_tokenizer(directory)
        self.tokenizer = Tokenizer.load(directory)

    @torch.inference_mode()
    def answer(self, ids: list[int], second: int = 0) -> Any:
        types = [int(bool(second) and place >= second) for place in range(len(ids))]
        return self.reference(torch.tensor([ids]), token_type_ids=torch.tensor([types]))

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[Live]:
        spec = read_spec(self.directory)
        abilities = read_abilities(self.directory, spec, ModelOptions(), self.tokenizer.token_to_id)
        # As at start.
        spec = dataclasses.replace(spec, projections=abilities.projections)
        model = load_model(spec, self.directory, dtype=torch.float32, device=torch.device("cpu"))
        limits = encoder_limits(SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=64), 32, spec.vocab_size)
        served = served_model(abilities=abilities, model_config=spec, max_model_len=32, chat_template=None)

        def device(_: Limits) -> CPUExecutor:
            return CPUExecutor(model, limits, dtype=torch.float32)

        async with live(make_device=device, model=served, words=self.tokenizer, max_num_seqs=8) as server:
            yield server


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("ranker"), "BertForSequenceClassification", num_labels=1)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("classifier")
    model = Model(directory, "BertForSequenceClassification", num_labels=3)
    edit_json(directory / "config.json", id2label={"0": "bad", "1": "so so", "2": "good"})
    return model


def close(ours: Any, theirs: Any) -> bool:
    theirs = np.array(theirs)
    return bool(np.abs(np.array(ours) - theirs).max() <= 1e-4 * max(1e-3, np.abs(theirs).max()))


async def test_pairs_have_types_and_scores(ranker: Model) -> None:
    query, documents = "the fox", ["the moon a", "sea", "fox trees b c d"]
    expected = []
    for document in documents:
        ids, second = ranker.tokenizer.encode_pair(query, document)
        assert ids[second - 1] == 3 and ids[0] == 2 and ids[-1] == 3
        expected.append(float(ranker.answer(ids, second).logits[0, 0]))
    shares = (1 / (1 + np.exp(-np.array(expected)))).tolist()
    order = sorted(range(3), key=lambda at: -expected[at])
    async with ranker.served() as server:
        status, body = await server.post("/rerank", {"query": query, "documents": documents})
        assert status == 200 and [result["index"] for result in body["results"]] == order
        assert close([result["relevance_score"] for result in body["results"]], sorted(shares)[::-1])
        status, body = await server.post("/score", {"text_1": query, "text_2": documents, "use_activation": False})
        assert status == 200 and close([item["score"] for item in body["data"]], expected)
        for bad in ({"query": query, "texts": []}, {"query": 5, "texts": documents}, {"texts": documents}):
            status, body = await server.post("/rerank", bad)
            assert status == 400 and body["error_type"] == "Validation", body
        assert "`documents`" in check_shape(*await server.post("/rerank", {"query": query, "documents": []}))["message"]
        status, body = await server.post("/rerank", {"query": query, "texts": documents, "return_text": True})
        assert status == 200 and [result["index"] for result in body] == order
        assert [result["text"] for result in body] == [documents[at] for at in order]
        assert close([result["score"] for result in body], sorted(shares)[::-1])
        long = "fox " * 60
        error = check_shape(*await server.post("/score", {"text_1": query, "text_2": long}))
        assert error["code"] == "context_length_exceeded"
        status, body = await server.post("/score", {"text_1": query, "text_2": long, "truncate_prompt_tokens": -1})
        assert status == 200 and body["usage"]["prompt_tokens"] == 32
        status, body = await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
        assert status == 400 and "does not generate text" in body["error"]["message"]
        status, body = await server.post("/v1/embeddings", {"input": "x"})
        assert status == 400 and "does not support embeddings" in body["error"]["message"]


async def test_labels(classifier: Model) -> None:
    texts = ["the fox", "moon sea trees", "a"]
    expected = [classifier.answer(classifier.tokenizer.encode(text)).logits[0].softmax(-1).tolist() for text in texts]
    labels = ["bad", "so so", "good"]
    async with classifier.served() as server:
        status, body = await server.post("/classify", {"input": texts})
        assert status == 200 and close([item["probs"] for item in body["data"]], expected)
        assert [item["label"] for item in body["data"]] == [labels[int(np.argmax(each))] for each in expected]
        status, body = await server.post("/predict", {"inputs": [[text] for text in texts]})
        assert status == 200
        for answer, shares in zip(body, expected, strict=True):
            assert close([each["score"] for each in answer], sorted(shares)[::-1])
            assert {each["label"]: each["score"] for each in answer}.keys() == set(labels)
        ids, second = classifier.tokenizer.encode_pair("the fox", "moon")
        pair = classifier.answer(ids, second).logits[0].tolist()
        status, body = await server.post("/predict", {"inputs": ["the fox", "moon"], "raw_scores": True})
        assert status == 200 and close([each["score"] for each in body], sorted(pair)[::-1])
        status, body = await server.post("/pooling", {"input": texts[0]})
        assert status == 200 and close(body["data"][0]["data"], expected[0])
        error = check_shape(*await server.post("/score", {"text_1": "a", "text_2": "b"}))
        assert error["param"] == "model"
        async with server.http.get(server.url + "/info") as response:
            told = await response.json()
        assert told["model_type"] == {
            "classifier": {
                "id2label": dict(zip("012", labels, strict=True)),
                "label2id": {"bad": 0, "so so": 1, "good": 2},
            }
        }
        status, body = await server.post("/predict", {"inputs": [[]]})
        assert status == 400 and body["error_type"] == "Validation" and "`inputs`" in body["error"]


async def test_every_token_has_a_label(tmp_path: Path) -> None:
    model = Model(tmp_path, "BertForTokenClassification", num_labels=3)
    ids = model.tokenizer.encode("the fox moon")
    async with model.served() as server:
        status, body = await server.post("/pooling", {"input": "the fox moon", "use_activation": False})
        assert status == 200 and close(body["data"][0]["data"], model.answer(ids).logits[0].tolist())
        assert (await server.post("/classify", {"input": "a"}))[0] == 400


async def test_a_sentence_transformers_directory(tmp_path: Path) -> None:
    """The first token's vector through a Dense module, behind the default prompt, at length 1."""
    from safetensors.torch import save_file

    model = Model(tmp_path, "BertModel")
    sentence_transformers(tmp_path, "Pooling", "Dense", "Normalize", pooling={"pooling_mode_cls_token": True})
    folder = tmp_path / "2_Dense"
    folder.mkdir(exist_ok=True)
    fields = {"in_features": 24, "out_features": 7, "bias": True, "activation_function": "torch.nn.Tanh"}
    (folder / "config.json").write_text(json.dumps(fields))
    weight, bias = torch.randn(7, 24, generator=torch.Generator().manual_seed(5)), torch.linspace(-1, 1, 7)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    prompts = {"prompts": {"query": "q: ", "document": "the "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    edit_json(tmp_path / "config.json", matryoshka_dimensions=[4])

    def expected(text: str, width: int = 7) -> list[float]:
        hidden = model.answer(model.tokenizer.encode(text)).last_hidden_state[0, 0]
        vector = torch.tanh(weight @ hidden + bias)[:width]
        found: list[float] = (vector / vector.norm()).tolist()
        return found

    async with model.served() as server:
        for body, text in (
            ({}, "q: fox"),
            ({"prompt_name": "document"}, "the fox"),
            ({"input_type": "document"}, "the fox"),
            ({"input_type": "query"}, "q: fox"),
        ):
            status, answer = await server.post("/v1/embeddings", {"input": ["fox"], **body})
            assert status == 200, answer
            assert close(answer["data"][0]["embedding"], expected(text))
        status, answer = await server.post("/v1/embeddings", {"input": ["fox"], "dimensions": 4})
        assert status == 200 and close(answer["data"][0]["embedding"], expected("q: fox", 4))
        error = check_shape(*await server.post("/v1/embeddings", {"input": ["fox"], "prompt_name": "x"}))
        assert error["param"] == "prompt_name"
        error = check_shape(*await server.post("/v1/embeddings", {"input": [[5]], "input_type": "query"}))
        assert error["param"] == "input_type"
        status, answer = await server.post("/embed", {"inputs": ["fox", "moon"], "prompt_name": "document"})
        assert status == 200 and close(answer, [expected("the fox"), expected("the moon")])
        status, answer = await server.post("/embed_all", {"inputs": "fox"})
        hidden = model.answer(model.tokenizer.encode("q: fox")).last_hidden_state[0].tolist()
        assert status == 200 and close(answer[0], hidden)
        inputs = {"source_sentence": "fox", "sentences": ["fox", "sea"]}
        status, answer = await server.post("/similarity", {"inputs": inputs})
        near = float(np.dot(expected("q: fox"), expected("q: sea")))
        assert status == 200 and close(answer, [1.0, near])
        status, answer = await server.post("/embed", {"inputs": "fox " * 40})
        assert status == 400 and answer["error_type"] == "Validation"
        status, answer = await server.post("/embed", {"inputs": "fox " * 40, "truncate": True})
        assert status == 200


async def test_texts_are_whole_in_a_step(ranker: Model) -> None:
    """Many texts, of which two fit a step: the same numbers as alone."""
    texts = ["fox " * count for count in (1, 29, 30, 17, 3, 30, 28, 9, 22, 14)]
    expected = [float(ranker.answer(ranker.tokenizer.encode(text)).logits[0, 0]) for text in texts]
    async with ranker.served() as server:
        status, body = await server.post("/classify", {"input": texts, "activation": False})
        assert status == 200 and close([item["probs"][0] for item in body["data"]], expected)
        alone = [(await server.post("/classify", {"input": text, "activation": False}))[1] for text in texts[:4]]
        assert [each["data"][0]["probs"] for each in alone] == [item["probs"] for item in body["data"][:4]]
