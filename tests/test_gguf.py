"""A GGUF file from one end to the other: the demo model in that format answers as the demo model does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from engine.build import build_engine
from engine.config import EngineConfig, ModelOptions, StartupError
from engine.flags import DEMO_MODEL
from engine.llm import LLM
from engine.models.hub import resolve
from engine.request import SamplingParams
from engine.serve import main
from tests.models.gguf.export import export

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
CHATS: Any = [[{"role": "user", "content": text}] for text in ("Tell me a story about a fox.", "Where is Berlin? 12")]
CONTROL = 3


def vocabulary() -> dict[str, Any]:
    """The demo model's tokenizer as metadata. Its pattern splits English as that of smollm does."""
    saved = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    tokens: dict[str, int] = {
        **saved["model"]["vocab"],
        **{each["content"]: each["id"] for each in saved["added_tokens"]},
    }
    texts = sorted(tokens, key=tokens.__getitem__)
    special = {each["content"] for each in saved["added_tokens"] if each["special"]}
    merges = [each if isinstance(each, str) else " ".join(each) for each in saved["model"]["merges"]]
    return {
        "general.name": "Demo",
        "general.sampling.temp": 0.7,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [CONTROL if text in special else 1 for text in texts],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (DEMO_MODEL / "chat_template.jinja").read_text(),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    return export(DEMO_MODEL, directory / "Demo-8M.gguf", "llama", {}, more=vocabulary())


@pytest.fixture(scope="module")
def models(file: Path) -> Iterator[tuple[LLM, LLM]]:
    with LLM(str(DEMO_MODEL), dtype="float32") as demo, LLM(str(file), dtype="float32") as model:
        yield demo, model


def test_answers_are_those_of_the_directory(models: tuple[LLM, LLM]) -> None:
    theirs, ours = (llm.chat(CHATS, GREEDY) for llm in models)
    for expected, given in zip(theirs, ours, strict=True):
        assert given.prompt == expected.prompt and given.prompt_token_ids == expected.prompt_token_ids
        assert given.outputs[0].token_ids == expected.outputs[0].token_ids
        assert given.outputs[0].text == expected.outputs[0].text
        assert given.outputs[0].finish_reason == expected.outputs[0].finish_reason
    assert models[1].default_sampling_params.temperature == 0.7


def test_names_and_ends(file: Path) -> None:
    """The file's name without its ending, unless another is given; the end that is named and the one that is known."""
    built = build_engine(EngineConfig(model=ModelOptions(path=str(file), load_format="dummy")))
    assert built.names == ("Demo-8M",) and built.directory == file
    assert set(built.engine.eos_token_ids) == {0, 2}
    assert built.model_config.architecture == "LlamaForCausalLM" and built.model_config.tie_word_embeddings
    built.engine.executor.close()


def test_a_directory_that_holds_one(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "Other.gguf"
    link.symlink_to(file)
    assert resolve(str(tmp_path)) == link and resolve(str(link)) == link
    # Beside safetensors it is left alone.
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(StartupError, match=r"none.gguf: no such file"):
        resolve(str(tmp_path / "none.gguf"))


def test_weights_that_are_read_later(models: tuple[LLM, LLM], file: Path, tmp_path: Path) -> None:
    """The same file again, and one of another model."""
    executor = models[1]._built.engine.executor
    executor.load_weights(file)
    other = export(DEMO_MODEL, tmp_path / "other.gguf", "llama", {"rope.freq_base": 5000.0}, more=vocabulary())
    with pytest.raises(StartupError, match="is of another model: rope_parameters differs"):
        executor.load_weights(other)


BAD: dict[str, tuple[Any, str]] = {
    "cut": (lambda data: data[: len(data) // 2], "truncated"),
    "header": (lambda data: data[:100], "more than a file of 100 bytes has room for"),
    "other": (lambda data: b"PK\x03\x04" + data[4:], "is no GGUF file"),
    "architecture": (lambda data: data.replace(b"\0\0\0llama", b"\0\0\0lxama", 1), "is not supported; supported are"),
    "pattern": (lambda data: data.replace(b"smollm", b"unhurd", 1), "'unhurd' is not supported"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_ends_the_start_with_one_line(
    name: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(file.read_bytes()))
    assert main(["--model", str(path), "--port", "0"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and expected in line


def test_a_scale_that_is_no_number(file: Path, tmp_path: Path) -> None:
    path = export(DEMO_MODEL, tmp_path / "a.gguf", "llama", {}, "Q8_0", more=vocabulary())
    reader = gguf.GGUFReader(path)
    [tensor] = [each for each in reader.tensors if each.name == "blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = b"\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(StartupError, match=r"layers.1.mlp.up_proj.weight: row 0 has a scale that is not a finite"):
        LLM(str(path))


def test_inputs_of_eight_bits_need_packed_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(DEMO_MODEL), "--packed-input-bits", "8", "--device", "cpu", "--port", "0"]) == 1
    assert "no matrix of this model stays packed" in capsys.readouterr().err
