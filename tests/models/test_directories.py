"""Directories that can be read in two ways: which files count, and what the checkpoint says of its output layer.

transformers is asked each time: what it loads is what is expected.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import StartupError
from tests.models.support import Runner, compare, edit_json, load, make_checkpoint, prompts_of

Tensors = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def theirs(directory: Path) -> Any:
    """The model as transformers loads it."""
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


def same(directory: Path) -> None:
    compare(theirs(directory), directory, lengths=(21,), new_tokens=16)


def change(directory: Path, edit: Callable[[Tensors], object], name: str = "model.safetensors") -> None:
    tensors = load_file(directory / name)
    edit(tensors)
    save_file(tensors, directory / name, {"format": "pt"})


def other(tensors: Tensors) -> None:
    """Another output layer beside the embedding."""
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(7)) * 0.2


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma3", "Phi3"])
def test_an_output_layer_that_differs_is_used(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"head_dim": 16} if family == "Gemma3" else {}
    make_checkpoint(tmp_path, family, tie_word_embeddings=True, **extra)
    change(tmp_path, other)
    same(tmp_path)
    [told] = {record.getMessage() for record in caplog.records if record.name == "oneloop.start"}
    assert told.startswith(f"{tmp_path}: tie_word_embeddings in config.json is true, but lm_head.weight differs")


def test_one_value_is_a_difference(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", tie_word_embeddings=True)

    def nudge(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1.0

    change(tmp_path, nudge)
    assert not load(tmp_path).config.tie_word_embeddings
    same(tmp_path)


def test_an_untied_model_that_is_said_to_be_tied(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama")
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    same(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_equal_output_layer_is_the_embedding(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No second copy in memory, and nothing is said."""
    make_checkpoint(tmp_path, "Llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    change(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].to(dtype).clone()}))
    model: Any = load(tmp_path)
    assert model.config.tie_word_embeddings and model._embedding is model._lm_head
    assert not [record for record in caplog.records if record.name == "oneloop.start"]
    same(tmp_path)


def test_the_difference_lies_in_a_later_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.models.loading.finding.CHUNK_BYTES", 800)
    test_one_value_is_a_difference(tmp_path)


def test_the_embedding_under_the_name_of_the_output_layer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", tie_word_embeddings=True)
    change(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    same(tmp_path)


def test_an_output_layer_of_another_shape(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", tie_word_embeddings=True)
    change(tmp_path, lambda tensors: tensors.update({HEAD: torch.zeros(210, 48)}))
    with pytest.raises(StartupError, match=r"tensor lm_head.weight has shape \[210, 48\], config.json asks for"):
        load(tmp_path)


@pytest.mark.parametrize("told", [False, ...])
def test_no_output_layer_in_an_untied_model(told: Any, tmp_path: Path) -> None:
    """transformers fills it with random numbers and warns."""
    make_checkpoint(tmp_path, "Llama", tie_word_embeddings=True)
    edit_json(tmp_path / "config.json", tie_word_embeddings=told)
    with pytest.raises(StartupError, match="is missing, and tie_word_embeddings in config"):
        load(tmp_path)


def test_the_flag_is_absent_where_the_class_ties(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Gemma2", head_dim=16)
    edit_json(tmp_path / "config.json", **{"tie_word_embeddings": ...} if told_tied(tmp_path) else {})
    same(tmp_path)


def told_tied(directory: Path) -> bool:
    return "tie_word_embeddings" in json.loads((directory / "config.json").read_text())


def test_an_output_layer_in_the_index_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", tie_word_embeddings=True, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {HEAD: weight_map[EMBEDDING]})
    same(tmp_path)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A whole file, and shards of other values."""
    single, shards = tmp_path / "single", tmp_path / "shards"
    make_checkpoint(single, "Llama")
    make_checkpoint(shards, "Llama", seed=1, max_shard_size="40KB")
    return single, shards


def test_a_whole_file_beside_whole_shards(two: tuple[Path, Path]) -> None:
    single, shards = two
    shutil.copytree(shards, single, dirs_exist_ok=True)
    same(single)


def test_a_whole_file_beside_a_stale_index(two: tuple[Path, Path]) -> None:
    single, shards = two
    shutil.copy(shards / "model.safetensors.index.json", single)
    same(single)


def test_shards_then_whole_saved_into_one_directory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", seed=1, max_shard_size="40KB")
    make_checkpoint(tmp_path, "Llama", seed=2)
    same(tmp_path)


def test_a_broken_index_is_not_read_beside_a_whole_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama")
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff")
    same(tmp_path)


def test_whole_shards_beside_other_files(two: tuple[Path, Path]) -> None:
    """Of other formats, tools and variants."""
    single, shards = two
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"):
        shutil.copy(single / "model.safetensors", shards / name)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (shards / name).write_bytes(b"no pickle")
    same(shards)


def test_an_adapter_beside_the_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, "Llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    load(tmp_path)
    [told] = [record.getMessage() for record in caplog.records]
    assert told == f"{tmp_path}: the adapter beside the model (adapter_config.json) is not applied"


def test_an_index_that_is_wrong_about_which_file(two: tuple[Path, Path]) -> None:
    _, shards = two
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    turned = dict(zip(files, files[1:] + files[:1], strict=True))
    edit_json(index, weight_map={name: turned[file] for name, file in weight_map.items()})
    same(shards)


def test_a_file_that_the_config_names(two: tuple[Path, Path]) -> None:
    single, shards = two
    shutil.copy(shards / "config.json", single)
    (single / "model.safetensors").rename(single / "mine.safetensors")
    edit_json(single / "config.json", transformers_weights="mine.safetensors")
    same(single)
    edit_json(single / "config.json", transformers_weights="../mine.safetensors")
    with pytest.raises(StartupError, match="transformers_weights must be the name of a safetensors file"):
        load(single)


def test_whole_shards_without_an_index(tmp_path: Path) -> None:
    """transformers finds nothing there; the numbers say that it is all there, and `check` that it is the model."""
    reference = make_checkpoint(tmp_path, "Llama", max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    compare(reference, tmp_path, lengths=(21,), new_tokens=16)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(StartupError, match=r"of \d+ shards 1 are not there \(\d+\); is the download complete\?"):
        load(tmp_path)


def test_a_tensor_in_two_shards_without_an_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(StartupError, match="is in several files"):
        load(tmp_path)


PREFIXES: dict[str, Callable[[str], str]] = {
    "twice": lambda name: f"model.{name}" if name.startswith("model.") else name,
    "wrapped": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "adapter": lambda name: f"base_model.model.{name}",
    "none": lambda name: name.removeprefix("model."),
    "text": lambda name: f"language_model.{name}",
    "text-inside": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("tied", [False, True])
def test_names_with_another_prefix(name: str, tied: bool, tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "Llama", tie_word_embeddings=tied)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({PREFIXES[name](key): tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


EXTRAS: dict[str, torch.Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    "model.rotary_emb.inv_freq": torch.zeros(4),
    "model.layers.1.self_attn.rotary_emb.cos_cached": torch.zeros(4, 4),
    "model.layers.1.self_attn.masked_bias": torch.zeros(()),
    "v_head.summary.weight": torch.zeros(1, 48),
    "score.weight": torch.zeros(1, 48),
    "model.nothing": torch.zeros(0, 48),
}


def test_tensors_that_do_not_count(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama")
    change(tmp_path, lambda tensors: tensors.update(EXTRAS))
    same(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama")
    change(tmp_path, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    same(tmp_path)


def test_json_as_other_editors_write_it(tmp_path: Path) -> None:
    """A byte order mark, and lines that end as on Windows."""
    reference = make_checkpoint(tmp_path, "Llama")
    path = tmp_path / "config.json"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(json.loads(path.read_text()), indent=2).replace("\n", "\r\n").encode()
    )
    compare(reference, tmp_path, lengths=(21,), new_tokens=8)


def test_no_second_copy_of_the_embedding_is_compared_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The dtype of the run decides: what differs in float64 alone is equal in bfloat16."""
    make_checkpoint(tmp_path, "Llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    change(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].double() * (1 + 1e-9)}))
    with caplog.at_level(logging.WARNING, "oneloop.start"):
        assert load(tmp_path, torch.bfloat16).config.tie_word_embeddings
        assert not caplog.records
    prompt = prompts_of([5])[0]
    assert Runner(load(tmp_path, torch.bfloat16), dtype=torch.bfloat16).logits(prompt, 5).shape == (5, 211)
