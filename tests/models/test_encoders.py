"""Every encoder and every head against transformers in float32, through the real loading code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.executor.tables import PagedMetadata, SlotTables
from engine.forward import ForwardInput, Limits, Staging
from engine.models.parts.decoder import CausalLM
from engine.ops import native
from engine.ops.attention.base import create_backend
from tests.models.support import SIZES, Runner, edit_json, fill, load, prompts_of, relative_error

BERT = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "eos_token_id")}
# Of sixteen columns, as many as the widest registers have.
BERT["num_attention_heads"] = BERT["hidden_size"] // 16
ROBERTA = {**BERT, "max_position_embeddings": 130, "pad_token_id": 3, "type_vocab_size": 1}
DISTIL = {
    "vocab_size": 211,
    "dim": 48,
    "hidden_dim": 80,
    "n_layers": 3,
    "n_heads": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MODERN = {**BERT, "num_hidden_layers": 5, "local_attention": 10, "cls_token_id": 1, "sep_token_id": 2}
GEMMA = {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "bert-tanh": ("BertModel", {**BERT, "hidden_act": "gelu_new", "type_vocab_size": 1}),
    "roberta": ("RobertaModel", ROBERTA),
    "xlm-roberta": ("XLMRobertaModel", ROBERTA),
    "camembert": ("CamembertModel", ROBERTA),
    "distilbert": ("DistilBertModel", DISTIL),
    "nomic": ("NomicBertModel", BERT),
    "gte": ("GteModel", {**BERT, "type_vocab_size": 2}),
    "gte-no-types": ("GteModel", {**BERT, "type_vocab_size": 0, "pad_token_id": 0}),
    "modernbert": ("ModernBertModel", MODERN),
    "modernbert-bias": ("ModernBertModel", {**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    "eurobert": ("EuroBertModel", {**SIZES, "bos_token_id": 1}),
    "embeddinggemma": ("Gemma3TextModel", {**SIZES, **GEMMA, "use_bidirectional_attention": True}),
}
# Their layers are one call each where products are our own kernels.
WHOLE = {"bert", "bert-tanh", "roberta", "xlm-roberta", "camembert", "distilbert"}
LABELS = {"num_labels": 4}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**BERT, **LABELS}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {**ROBERTA, "num_labels": 1}),
    "distilbert": ("DistilBertForSequenceClassification", {**DISTIL, **LABELS}),
    "nomic": ("NomicBertForSequenceClassification", {**BERT, **LABELS}),
    "gte": ("GteForSequenceClassification", {**BERT, "num_labels": 1}),
    "modernbert": ("ModernBertForSequenceClassification", {**MODERN, **LABELS, "classifier_bias": True}),
    "modernbert-mean": ("ModernBertForSequenceClassification", {**MODERN, **LABELS, "classifier_pooling": "mean"}),
    "eurobert": ("EuroBertForSequenceClassification", {**SIZES, **LABELS}),
    "eurobert-bos": ("EuroBertForSequenceClassification", {**SIZES, **LABELS, "classifier_pooling": "bos"}),
    "llama": ("LlamaForSequenceClassification", {**SIZES, "num_labels": 1}),
    "qwen2": ("Qwen2ForSequenceClassification", {**SIZES, **LABELS}),
    "qwen3": ("Qwen3ForSequenceClassification", {**SIZES, **LABELS, "head_dim": 16}),
    "gemma2": ("Gemma2ForSequenceClassification", {**SIZES, **LABELS, "head_dim": 16}),
    "bert-tokens": ("BertForTokenClassification", {**BERT, **LABELS}),
    "roberta-tokens": ("RobertaForTokenClassification", {**ROBERTA, **LABELS}),
    "modernbert-tokens": ("ModernBertForTokenClassification", {**MODERN, **LABELS}),
    "qwen3-tokens": ("Qwen3ForTokenClassification", {**SIZES, **LABELS, "head_dim": 16}),
}


def make(directory: Path, name: str, sizes: dict[str, Any]) -> Any:
    """Save a model of that class with random weights; returns transformers' model."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_class = getattr(transformers, name)
        config = model_class.config_class(**sizes)
        config._attn_implementation = "eager"
        model = model_class(config)
        fill(model, offset=0.0 if name.startswith("Gemma") else 1.0)
        model.save_pretrained(directory)
    return model.eval()


class Packed:
    """Runs texts, one behind the other in a step."""

    def __init__(self, model: CausalLM, *, num_texts: int = 4, most: int = 128) -> None:
        self.model = model
        self.limits = Limits(num_texts, 512, most, most + 1, num_texts, model.config.vocab_size)
        self.staging = Staging(self.limits)
        name = "packed" if model.attention_spec.bidirectional else "torch_paged"
        self.attention = create_backend(
            name, model.attention_spec, num_pages=num_texts, page_size=most + 1, dtype=torch.float32
        )

    def hidden(self, texts: list[list[int]], types: list[int] | None = None) -> list[Tensor]:
        """The hidden states of each text's tokens."""
        staging, at = self.staging, 0
        tables, metadata = SlotTables(self.limits), PagedMetadata(self.limits)
        for row, ids in enumerate(texts):
            staging.row_slot[row], staging.row_start[row], staging.row_len[row] = row + 1, 0, len(ids)
            staging.qo_indptr[row] = at
            staging.token_ids[at : at + len(ids)] = ids
            tables.page_table[row + 1, 0] = row + 1
            at += len(ids)
        staging.qo_indptr[len(texts)] = at
        metadata.build(ForwardInput(0, staging, len(texts), 0, at, 0, 0), tables)
        self.attention.plan(metadata)
        ids = torch.from_numpy(staging.token_ids[:at].copy())
        given = None if types is None else torch.tensor(types)
        with torch.inference_mode():
            hidden = self.model.forward(ids, torch.from_numpy(metadata.positions.copy()), self.attention, given)
        return list(hidden.split([len(text) for text in texts]))


@pytest.mark.parametrize("name", ENCODERS)
def test_matches_transformers(name: str, tmp_path: Path) -> None:
    architecture, sizes = ENCODERS[name]
    reference = make(tmp_path, architecture, sizes)
    model = load(tmp_path)
    assert (
        model.config.headless
        and model.config.bidirectional
        and model.config.architecture in (architecture, "Gemma3Model")
    )
    matrices = (each for key, each in reference.named_parameters() if each.dim() > 1 and "pooler" not in key)
    assert model.config.num_parameters == sum(each.numel() for each in matrices)
    texts = prompts_of([21, 1, 60, 34], seed=3)
    # Not RoBERTa's padding token, whose position is another one.
    texts = [[token if token != 3 else 4 for token in text] for text in texts]
    for text, ours in zip(texts, Packed(model).hidden(texts), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([text])).last_hidden_state[0]
        error = relative_error(ours, expected)
        assert error <= 1e-4, f"hidden states differ by {error:.1e}"
    assert {layer.whole is not None for layer in model._layers} == {name in WHOLE and native.library() is not None}


@pytest.mark.parametrize("name", ["bert", "gte"])
def test_types_of_tokens(name: str, tmp_path: Path) -> None:
    architecture, sizes = ENCODERS[name]
    reference = make(tmp_path, architecture, sizes)
    texts = prompts_of([21, 13], seed=3)
    types = [0] * 9 + [1] * 12 + [0] * 13
    found = Packed(load(tmp_path)).hidden(texts, types)
    with torch.inference_mode():
        for text, own, ours in zip(texts, (types[:21], types[21:]), found, strict=True):
            expected = reference(torch.tensor([text]), token_type_ids=torch.tensor([own])).last_hidden_state[0]
            assert relative_error(ours, expected) <= 1e-4


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_decoders_that_are_not_causal(family: str, tmp_path: Path) -> None:
    reference = make(tmp_path, family + "Model", {**SIZES, "head_dim": 8})
    edit_json(tmp_path / "config.json", is_causal=False)
    model = load(tmp_path)
    assert model.config.bidirectional and model.config.headless
    texts = prompts_of([21, 34], seed=3)
    seen = torch.zeros(1, 1, 1, 1)
    for text, ours in zip(texts, Packed(model).hidden(texts), strict=True):
        everything = seen.expand(1, 1, len(text), len(text))
        with torch.inference_mode():
            expected = reference(torch.tensor([text]), attention_mask=everything).last_hidden_state[0]
        assert relative_error(ours, expected) <= 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_heads_match_transformers(name: str, tmp_path: Path) -> None:
    architecture, sizes = HEADS[name]
    reference = make(tmp_path, architecture, sizes)
    model = load(tmp_path)
    classifier = model.config.classifier
    assert classifier is not None and classifier.labels == tuple(f"LABEL_{at}" for at in range(sizes["num_labels"]))
    assert model.config.headless and model.config.architecture == architecture
    texts = [[token if token != 3 else 4 for token in text] for text in prompts_of([21, 40], seed=3)]
    for text, hidden in zip(texts, Packed(model).hidden(texts), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([text])).logits[0]
            read = {"cls": hidden[:1], "last": hidden[-1:], "mean": hidden.mean(dim=0)[None], "all": hidden}
            ours = model.classify(hidden if classifier.late else read[classifier.pooling])
            ours = ours.mean(dim=0) if classifier.late else ours
            assert relative_error(ours if classifier.pooling == "all" else ours.view(-1), expected) <= 1e-4


def test_the_reward_model_of_qwen2(tmp_path: Path) -> None:
    """Two layers over the last token; transformers has no such class."""
    from safetensors.torch import load_file, save_file

    reference = make(tmp_path, "Qwen2Model", SIZES)
    path, generator = tmp_path / "model.safetensors", torch.Generator().manual_seed(0)
    shapes = {"score.0.weight": (48, 48), "score.0.bias": (48,), "score.2.weight": (1, 48), "score.2.bias": (1,)}
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({f"model.{key}": each for key, each in load_file(path).items()} | head, path)
    edit_json(tmp_path / "config.json", architectures=["Qwen2ForRewardModel"])
    model = load(tmp_path)
    assert model.config.classifier is not None and model.config.classifier.labels == ("reward",)
    text = prompts_of([21], seed=3)[0]
    with torch.inference_mode():
        last = reference(torch.tensor([text])).last_hidden_state[0, -1]
        inner = torch.relu(head["score.0.weight"] @ last + head["score.0.bias"])
        expected = head["score.2.weight"] @ inner + head["score.2.bias"]
        [ours] = model.classify(Runner(model).step({0: text})[-1:])
    assert relative_error(ours, expected) <= 1e-4


def test_the_ntk_rope_of_gte(tmp_path: Path) -> None:
    """A longer base, and waves that are longer by factor^(2 / dimensions), as its own code has it."""
    rope = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2 ** (2 / 16)}
    reference = make(tmp_path, "GteModel", {**BERT, "rope_parameters": rope})
    edit_json(
        tmp_path / "config.json", rope_parameters=..., rope_theta=10000.0, rope_scaling={"type": "ntk", "factor": 2.0}
    )
    text = prompts_of([40], seed=3)[0]
    [ours] = Packed(load(tmp_path)).hidden([text])
    with torch.inference_mode():
        assert relative_error(ours, reference(torch.tensor([text])).last_hidden_state[0]) <= 1e-4


def test_names_of_old_files(tmp_path: Path) -> None:
    """gamma and beta of a LayerNorm, and everything inside of another object."""
    from safetensors.torch import load_file, save_file

    reference = make(tmp_path, "BertModel", BERT)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    renamed = {
        "bert." + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for key, each in tensors.items()
    }
    renamed["cls.predictions.bias"] = torch.zeros(211)
    renamed["bert.embeddings.position_ids"] = torch.arange(256)[None]
    save_file(renamed, path)
    edit_json(tmp_path / "config.json", architectures=["BertForMaskedLM"])
    text = prompts_of([30], seed=3)[0]
    [ours] = Packed(load(tmp_path)).hidden([text])
    with torch.inference_mode():
        assert relative_error(ours, reference(torch.tensor([text])).last_hidden_state[0]) <= 1e-4
