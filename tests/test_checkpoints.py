"""Model directories that are not quite as one would write them, from the files to the answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from engine.build import build_engine
from engine.config import EngineConfig, ModelOptions, StartupError
from engine.llm import LLM, SamplingParams
from engine.report import StartupReport
from engine.request import RequestError
from tests.models.support import edit_json, make_checkpoint
from tests.text import kinds

ROWS = 422  # tokens of the tokenizer
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(directory: Path, rows: int = ROWS, **sizes: Any) -> Path:
    make_checkpoint(directory, "Llama", vocab_size=rows, **sizes)
    kinds.write("byte_level", directory)
    return directory


def add(directory: Path, *texts: str, special: bool = True) -> None:
    """More tokens than the embedding has rows."""
    path = str(directory / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in texts])
    backend.save(path)


def start(directory: Path, **options: Any) -> LLM:
    return LLM(str(directory), dtype="float32", threads=1, num_gpu_blocks_override=64, **options)


def table(directory: Path, **options: Any) -> dict[str, str]:
    """The rows of the start-up table."""
    report = StartupReport()
    model = ModelOptions(path=str(directory), dtype="float32", **options)
    built = build_engine(EngineConfig(model=model, device="cpu", num_threads=1), report)
    built.engine.executor.close()
    return dict(report.rows)


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_with_one_token_more_than_the_embedding(
    special: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    with start(tmp_path) as llm:
        [expected] = llm.generate(["Hello world"], GREEDY)
    add(tmp_path, "<pad>", special=special)
    edit_json(tmp_path / "tokenizer_config.json", pad_token="<pad>")
    with caplog.at_level(logging.WARNING, "oneloop.start"), start(tmp_path) as llm:
        [told] = [record.getMessage() for record in caplog.records]
        assert told.endswith("a prompt with '<pad>' is refused") and f"has {ROWS + 1} tokens" in told
        [answer] = llm.generate(["Hello world"], GREEDY)
        assert answer.outputs[0].token_ids == expected.outputs[0].token_ids
        with pytest.raises(RequestError, match=rf"holds the token {ROWS} \('<pad>'\), which the model cannot read"):
            llm.generate(["Hello <pad> world"], GREEDY)
        with pytest.raises(RequestError, match=str(ROWS - 1)):
            llm.generate([[5, ROWS]], GREEDY)
        # The server goes on, and grammars have the model's width.
        [bound] = llm.generate(["Hello"], SamplingParams(max_tokens=40, temperature=0.0), structure={"enum": ["yes"]})
        assert bound.outputs[0].text == '"yes"'


def test_ids_of_eos_beyond_the_embedding(tmp_path: Path) -> None:
    write(tmp_path)
    add(tmp_path, "<end>")
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<end>")
    edit_json(tmp_path / "config.json", eos_token_id=[2, 5000])
    with start(tmp_path) as llm:
        assert llm._built.engine.eos_token_ids == (2,)
        assert len(llm.generate(["Hello"], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3


def test_many_added_tokens_are_served(tmp_path: Path) -> None:
    write(tmp_path)
    add(tmp_path, *(f"<extra {number}>" for number in range(500)))
    with start(tmp_path) as llm:
        assert llm.generate(["Hello"], GREEDY)[0].outputs[0].token_ids


def test_a_few_words_too_many_are_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ids of ordinary words: below the two added tokens at the end are two that are none."""
    write(tmp_path, ROWS - 4)
    with start(tmp_path) as llm:
        assert llm.generate(["Hello"], GREEDY)[0].outputs[0].token_ids
    assert "is refused" in caplog.text


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 300)
    with pytest.raises(StartupError, match="the vocabulary has 422 tokens, but the model's embedding only 300"):
        start(tmp_path)


EOS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], tuple[int, ...]]] = {
    "config": ({"eos_token_id": 7}, None, {"eos_token": ...}, (7,)),
    "list": ({"eos_token_id": [7, 8]}, None, {"eos_token": ...}, (7, 8)),
    "generation": ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, {"eos_token": ...}, (7, 8, 9)),
    "generation-null": ({"eos_token_id": 7}, {"eos_token_id": None, "temperature": None}, {"eos_token": ...}, (7,)),
    "tokenizer": ({"eos_token_id": ...}, None, {"eos_token": "</s>"}, (2,)),
    "all": ({"eos_token_id": 7}, {"eos_token_id": 8}, {"eos_token": "</s>"}, (7, 8, 2)),
    "class": ({"eos_token_id": ...}, None, {"eos_token": ...}, (2,)),
    "null": ({"eos_token_id": None}, None, {"eos_token": ...}, ()),
    "generation-without": ({"eos_token_id": ...}, {}, {"eos_token": ...}, ()),
}


@pytest.mark.parametrize("name", EOS)
def test_what_ends_an_answer(name: str, tmp_path: Path) -> None:
    config, generation, tokenizer, expected = EOS[name]
    write(tmp_path)
    edit_json(tmp_path / "config.json", **config)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    values.update(tokenizer)
    values = {key: value for key, value in values.items() if value is not ...}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with start(tmp_path) as llm:
        assert llm._built.engine.eos_token_ids == expected


def test_the_table_tells_of_another_output_layer(tmp_path: Path) -> None:
    write(tmp_path, tie_word_embeddings=True)
    assert "output layer" not in table(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert table(tmp_path)["output layer"].startswith("the checkpoint's own: it differs from the embedding")


def test_the_table_tells_what_the_cache_may_take(tmp_path: Path) -> None:
    write(tmp_path)
    rows = table(tmp_path)
    # 64 sequences of 256 tokens; 3 layers, 2 heads of 8 numbers, keys and values in 4 bytes.
    assert rows["KV cache"].startswith(f"{64 * 16} pages of 16 tokens")
    taken = (64 * 16 + 1) * 16 * 3 * 2 * 8 * 2 * 4 / 2**30
    assert rows["KV memory"].startswith(f"up to {taken:.2f} GiB, taken as the cache fills (at most 25%")


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "long": (LONGROPE, None, "longrope, long factors in every text, short ones too: the context is longer than 64"),
    "short": (LONGROPE, 64, "longrope, short factors in every text: the context is at most 64 tokens"),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, None, "dynamic, unscaled"),
}


@pytest.mark.parametrize("name", ROPES)
def test_the_table_tells_which_frequencies_are_used(name: str, tmp_path: Path) -> None:
    rope, context, expected = ROPES[name]
    write(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters=rope)
    assert table(tmp_path, max_model_len=context)["rope"].startswith(expected)
