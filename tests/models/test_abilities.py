"""What a directory and the flags say a model can be asked for, and models that have no output layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelOptions, StartupError
from engine.flags import parse
from engine.models.abilities import Abilities, read_abilities
from engine.models.registry import read_spec
from engine.models.spec import Projection
from tests.models.support import SIZES, Runner, edit_json, load, make_checkpoint, prompts_of, relative_error

WIDTH = SIZES["hidden_size"]
TOKENS = {"yes": 17, "no": 23}


def sentence_transformers(directory: Path, *modules: str, pooling: dict[str, Any] | None = None) -> None:
    """Write modules.json, and the config of its Pooling module."""
    names = ("Transformer", *modules)
    entries = [
        {"idx": index, "name": str(index), "path": f"{index}_{name}" if index else "", "type": f"st.models.{name}"}
        for index, name in enumerate(names)
    ]
    (directory / "modules.json").write_text(json.dumps(entries))
    if pooling is not None:
        folder = directory / "1_Pooling"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(pooling))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fields = {**SIZES, "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def abilities(directory: Path, **options: Any) -> Abilities:
    return read_abilities(directory, read_spec(directory), ModelOptions(**options), TOKENS.get)


LAST = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False, "include_prompt": True}


def test_a_causal_model_generates_and_nothing_else(directory: Path) -> None:
    found = abilities(directory)
    assert found == Abilities(width=WIDTH)
    assert found.generates and found.embedding is None and found.score_tokens is None and found.dimensions is None


@pytest.mark.parametrize(
    ("pooling", "modules", "kind", "normalize"),
    [
        (LAST, ("Pooling", "Normalize"), "last", True),
        (MEAN, ("Pooling",), "mean", False),
        ({"pooling_mode": "lasttoken"}, ("Pooling", "Normalize"), "last", True),
        ({"pooling_mode": ["mean"]}, ("Pooling", "Normalize"), "mean", True),
    ],
)
def test_sentence_transformers_say_how(
    directory: Path, pooling: dict[str, Any], modules: tuple[str, ...], kind: str, normalize: bool
) -> None:
    sentence_transformers(directory, *modules, pooling=pooling)
    found = abilities(directory)
    assert (found.embedding, found.normalize, found.generates, found.needs_head) == (kind, normalize, False, False)
    # Both at once, the other pooling, and as if the files were not there.
    assert abilities(directory, runner="generate") == Abilities(width=WIDTH)
    other = "mean" if kind == "last" else "last"
    assert abilities(directory, pooling=other).embedding == other
    both = abilities(directory, runner="generate", pooling=other)
    assert both.generates and both.embedding == other


def test_flags_make_an_embedding_model_of_any(directory: Path) -> None:
    found = abilities(directory, runner="pooling")
    assert (found.embedding, found.normalize, found.generates) == ("last", True, False)
    found = abilities(directory, pooling="mean")
    assert (found.embedding, found.normalize, found.generates) == ("mean", True, True)


def test_scores(directory: Path) -> None:
    by_flag = abilities(directory, score_tokens=("yes", "no"))
    assert by_flag.score_tokens == (17, 23) and by_flag.generates and by_flag.embedding is None
    alone = abilities(directory, score_tokens=("yes", "no"), runner="pooling")
    assert not alone.generates and alone.embedding is None and alone.needs_head
    with pytest.raises(StartupError, match=r"^--score-tokens: 'maybe' is no token"):
        abilities(directory, score_tokens=("yes", "maybe"))
    edit_json(directory / "config.json", classifier_from_token=["no", "yes"])
    assert abilities(directory).score_tokens == (17, 23)
    edit_json(directory / "config.json", classifier_from_token=["no"])
    with pytest.raises(StartupError, match=r"classifier_from_token must be a list of two tokens"):
        abilities(directory)
    edit_json(directory / "config.json", classifier_from_token=...)
    sentence_transformers(directory, "LogitScore")
    (directory / "1_LogitScore").mkdir()
    (directory / "1_LogitScore" / "config.json").write_text('{"true_token_id": 9, "false_token_id": 8}')
    assert abilities(directory).score_tokens == (9, 8) and abilities(directory).generates
    (directory / "1_LogitScore" / "config.json").write_text('{"true_token_id": 9, "false_token_id": null}')
    with pytest.raises(StartupError, match=r"false_token_id is missing.*--score-tokens"):
        abilities(directory)
    (directory / "1_LogitScore" / "config.json").write_text('{"true_token_id": 9, "false_token_id": 100000}')
    with pytest.raises(StartupError, match=r"false_token_id"):
        abilities(directory)


def test_matryoshka(directory: Path) -> None:
    edit_json(directory / "config.json", is_matryoshka=True)
    assert abilities(directory).dimensions == ()
    edit_json(directory / "config.json", matryoshka_dimensions=[8, 16])
    assert abilities(directory).dimensions == (8, 16)


@pytest.mark.parametrize(
    ("pooling", "modules", "told"),
    [
        ({"pooling_mode": "x"}, ("Pooling",), r"pooling by x is not supported, only by one of cls, lasttoken"),
        ({**MEAN, "include_prompt": False}, ("Pooling",), r"include_prompt is false, which is not supported"),
        ({**MEAN, "pooling_mode_cls_token": True}, ("Pooling",), r"pooling by cls and mean is not supported"),
        ({}, ("Pooling",), r"pooling by no mode"),
        ({"pooling_mode": 5}, ("Pooling",), r"pooling by 5"),
        ({"pooling_mode": [["x"]]}, ("Pooling",), r"pooling by \['x'\]"),
        ({"pooling_mode_lasttoken": "yes"}, ("Pooling",), r"pooling_mode_lasttoken must be true or false"),
        (LAST, ("Pooling", "LayerNorm"), r"the module LayerNorm is not supported; --runner generate"),
        (LAST, ("Pooling", "Normalize", "Dense"), r"the module Normalize is not supported in this place"),
        (None, ("Pooling",), r"no such file"),
    ],
)
def test_what_is_not_supported_ends_the_start(
    directory: Path, pooling: dict[str, Any] | None, modules: tuple[str, ...], told: str
) -> None:
    sentence_transformers(directory, *modules, pooling=pooling)
    with pytest.raises(StartupError, match=told):
        abilities(directory)
    assert abilities(directory, runner="generate").generates


def dense(directory: Path, **fields: Any) -> None:
    folder = directory / "2_Dense"
    folder.mkdir(exist_ok=True)
    given = {"in_features": WIDTH, "out_features": 7, "bias": False, "activation_function": "torch.nn.modules.Tanh"}
    (folder / "config.json").write_text(json.dumps(given | fields))


def test_dense_modules_prompts_and_lengths(directory: Path) -> None:
    sentence_transformers(directory, "Pooling", "Dense", "Normalize", pooling=MEAN)
    dense(directory)
    prompts = {"prompts": {"query": "q: ", "document": None}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 77}))
    found = abilities(directory)
    assert found.projections == (Projection("2_Dense.linear", 7, False, "tanh"),) and found.width == 7
    assert (found.prompts, found.default_prompt, found.max_length) == ({"query": "q: ", "document": ""}, "query", 77)
    for fields, told in (
        ({"in_features": 5}, r"in_features must be 48"),
        ({"activation_function": "x.Mish"}, r"activation_function \(\"x.Mish\"\) must be one of GELU"),
    ):
        dense(directory, **fields)
        with pytest.raises(StartupError, match=told):
            abilities(directory)
    dense(directory)
    (directory / "config_sentence_transformers.json").write_text('{"prompts": {"a": 5}}')
    with pytest.raises(StartupError, match=r"prompts must be an object of short texts"):
        abilities(directory)
    (directory / "config_sentence_transformers.json").write_text('{"default_prompt_name": "a"}')
    with pytest.raises(StartupError, match=r"default_prompt_name \(\"a\"\) is not one of the prompts"):
        abilities(directory)


@pytest.mark.parametrize("text", ["{", "5", "[5]", '[{"path": ""}]', '[{"type": "Pooling", "path": "../.."}]'])
def test_broken_modules(directory: Path, text: str) -> None:
    (directory / "modules.json").write_text(text)
    with pytest.raises(StartupError, match=r"modules\.json"):
        abilities(directory)


def test_flag_spellings() -> None:
    def options(*argv: str) -> tuple[str, str, tuple[str, str] | None]:
        model = parse(argv)[0].model
        return model.runner, model.pooling, model.score_tokens

    assert options() == ("auto", "auto", None)
    for argv in (("--is-embedding",), ("--runner", "pooling"), ("--task", "embed")):
        assert options(*argv) == ("pooling", "auto", None)
    assert options("--task", "generate", "--pooling", "mean") == ("generate", "mean", None)
    assert options("--score-tokens", "yes", "no") == ("auto", "auto", ("yes", "no"))
    with pytest.raises(StartupError, match=r"contradict"):
        options("--task", "generate", "--is-embedding")


# ---- without an output layer


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3", "Gemma2"])
def test_bare_models_load(family: str, tmp_path: Path) -> None:
    """Saved by transformers as {family}Model: no `model.` before the names, no output layer."""
    reference = make_checkpoint(tmp_path / "whole", family, **({} if family != "Gemma2" else {"head_dim": 16}))
    reference.model.save_pretrained(tmp_path / "bare")
    model = load(tmp_path / "bare")
    assert model.config.architecture == f"{family}Model" and model.config.headless
    matrices = sum(parameter.numel() for parameter in reference.model.parameters() if parameter.dim() > 1)
    assert model.config.num_parameters == matrices
    prompt = prompts_of([30])[0]
    hidden = Runner(model).step({0: prompt})
    with torch.inference_mode():
        expected = reference.model(torch.tensor([prompt])).last_hidden_state[0]
    assert relative_error(hidden, expected) <= 1e-4
    with pytest.raises(StartupError, match=r"--runner generate: .*Model .* has no output layer"):
        abilities(tmp_path / "bare", runner="generate")
    with pytest.raises(StartupError, match=r"scores need the output layer"):
        abilities(tmp_path / "bare", score_tokens=("yes", "no"))
    assert abilities(tmp_path / "bare").embedding == "last"


def test_causal_models_saved_without_their_prefix_load(tmp_path: Path) -> None:
    """As Qwen3-Embedding is: it calls itself Qwen3ForCausalLM, and its names are those of a bare model."""
    reference = make_checkpoint(tmp_path / "whole", "Qwen3", tie_word_embeddings=True, head_dim=16)
    reference.model.save_pretrained(tmp_path / "bare")
    edit_json(tmp_path / "bare" / "config.json", architectures=["Qwen3ForCausalLM"])
    model = load(tmp_path / "bare")
    prompt = prompts_of([30])[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert relative_error(Runner(model).logits(prompt, 30), expected) <= 1e-4
