"""A start that cannot work ends with exit code 1 and one line on stderr that names the file and the field.

Through `engine.serve.main` with a real model directory of which one thing is wrong.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.serve import main
from tests.models.support import edit_json, make_checkpoint
from tests.text import kinds

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that would start."""
    directory = tmp_path_factory.mktemp("whole")
    make_checkpoint(directory, "Llama", vocab_size=512)
    kinds.write("byte_level", directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    return directory


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """main sets torch's threads and may set up logging."""
    threads, handlers, level = torch.get_num_threads(), logging.root.handlers[:], logging.root.level
    yield
    torch.set_num_threads(threads)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def start(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Damage a copy of the model, start, and return the one line without its prefix."""

    def run(damage: Damage | None = None, *flags: str) -> str:
        directory = tmp_path / "model"
        shutil.copytree(whole, directory)
        if damage is not None:
            damage(directory)
        argv = ["--model", str(directory), "--device", "cpu", "--threads", "1", "--port", "0"]
        assert main([*argv, *flags]) == 1
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0].removeprefix("error: ").replace(str(directory), "DIR")

    return run


def config(**changes: Any) -> Damage:
    return lambda directory: edit_json(directory / "config.json", **changes)


def text(name: str, content: str | bytes | None) -> Damage:
    """Overwrite a file, or remove it."""

    def write(directory: Path) -> None:
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def index(content: str | bytes) -> Damage:
    """An index in place of the file."""

    def write(directory: Path) -> None:
        text("model.safetensors", None)(directory)
        text("model.safetensors.index.json", content)(directory)

    return write


def renamed(old: str, new: str) -> Damage:
    return lambda directory: (directory / old).rename(directory / new)


def cut(name: str, size: int) -> Damage:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Let the header of the safetensors file tell something else."""

    def write(directory: Path) -> None:
        path = directory / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        values = json.loads(content[8 : 8 + length])
        change(values)
        told = json.dumps(values).encode()
        path.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])

    return write


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def write(directory: Path) -> None:
        values = load_file(directory / "model.safetensors")
        change(values)
        save_file(values, directory / "model.safetensors")

    return write


def tokenizer_config(**changes: Any) -> Damage:
    return lambda directory: edit_json(directory / "tokenizer_config.json", **changes)


def prefix(text: str) -> Damage:
    """Say that the right halves of the tokenizer's merges begin with a text that they do not begin with."""

    def write(directory: Path) -> None:
        path = directory / "tokenizer.json"
        values = json.loads(path.read_text())
        values["model"]["continuing_subword_prefix"] = text
        path.write_text(json.dumps(values))

    return write


NORM = "model.norm.weight"
NEITHER = "DIR: holds neither model.safetensors nor model.safetensors.index.json; "
ROPE = {"rope_parameters": ..., "rope_theta": 10000.0}
DAMAGES: dict[str, tuple[Damage, str]] = {
    "config-missing": (text("config.json", None), "DIR/config.json: no such file; is this a model directory?"),
    "config-cut": (cut("config.json", 40), "DIR/config.json: is not valid JSON: "),
    "config-list": (text("config.json", "[]"), "DIR/config.json: must hold a JSON object"),
    "field-missing": (
        config(hidden_size=...),
        "DIR: model.safetensors: tensor lm_head.weight has shape [512, 48], config.json asks for [512, 4096]; ",
    ),
    "field-type": (config(vocab_size="many"), "DIR/config.json: vocab_size must be an integer"),
    "field-negative": (config(num_hidden_layers=-1), "DIR/config.json: num_hidden_layers must be an integer"),
    "field-huge": (config(intermediate_size=10**30), "DIR/config.json: intermediate_size must be an integer"),
    "heads": (config(num_attention_heads=7, head_dim=...), "DIR/config.json: num_key_value_heads (2) must divide"),
    "heads-hidden": (
        config(num_attention_heads=10, head_dim=...),
        "DIR/config.json: num_attention_heads (10) must divide hidden_size (48)",
    ),
    "head-dim": (config(head_dim=5), "DIR/config.json: head_dim (5) leaves 5 rotary dimensions"),
    "rope": (
        config(**ROPE, rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        "DIR/config.json: rope_scaling.rope_type must be one of",
    ),
    "rope-field": (
        config(**ROPE, rope_scaling={"rope_type": "linear"}),
        "DIR/config.json: rope_scaling.factor is missing",
    ),
    "architecture": (
        config(architectures=["NewestModel"]),
        "DIR/config.json: architectures NewestModel is not supported; supported are: AXK1ForCausalLM, ",
    ),
    "another architecture": (
        config(architectures=["BertModel"]),
        'DIR/config.json: architectures BertModel does not go with model_type "llama"',
    ),
    "architectures": (config(architectures="Llama"), "DIR/config.json: architectures must be a list"),
    "quantized": (config(quantization_config={"quant_method": "aqlm"}), "DIR/config.json: quantization_config"),
    "activation": (config(hidden_act="relu"), "DIR/config.json: hidden_act must be one of"),
    "largest": (config(hidden_size=2**31 - 1, intermediate_size=2**31 - 1), "DIR: no memory for the model: "),
    "large": (config(hidden_size=96 * 10**6), "DIR: model.safetensors: tensor lm_head.weight has shape [512, 48]"),
    "generation": (
        text("generation_config.json", '{"top_p": 2}'),
        "DIR/generation_config.json: top_p must be a finite number above 0 and at most 1, not 2",
    ),
    "generation-cut": (cut("generation_config.json", 7), "DIR/generation_config.json: is not valid JSON: "),
    "tokenizer-missing": (text("tokenizer.json", None), "DIR: no tokenizer.json"),
    "tokenizer-cut": (cut("tokenizer.json", 500), "DIR/tokenizer.json: "),
    "tokenizer-other": (text("tokenizer.json", '{"version": "1.0"}'), "DIR/tokenizer.json: "),
    "tokenizer-prefix": (
        prefix("a long one"),
        "DIR/tokenizer.json: model.continuing_subword_prefix is 'a long one', but the merge ['",
    ),
    "tokenizer-binary": (text("tokenizer.json", b"\xff\xfe\x00"), "DIR/tokenizer.json: "),
    "tokenizer-vocabulary": (
        config(vocab_size=300),
        "DIR/tokenizer.json: the vocabulary has 422 tokens, but the model's embedding only 300 (vocab_size in "
        "DIR/config.json)",
    ),
    "tokenizer-config": (text("tokenizer_config.json", "{"), "DIR/tokenizer_config.json: not valid JSON: "),
    "tokenizer-config-binary": (text("tokenizer_config.json", b"\xff"), "DIR/tokenizer_config.json: not valid JSON: "),
    "eos-type": (tokenizer_config(eos_token=[1]), "DIR/tokenizer_config.json: eos_token must be text"),
    "eos-unknown": (tokenizer_config(eos_token="<end>"), "DIR/tokenizer_config.json: eos_token '<end>' is not in"),
    "extra-tokens": (
        tokenizer_config(additional_special_tokens=3),
        "DIR/tokenizer_config.json: additional_special_tokens",
    ),
    "added-tokens": (tokenizer_config(added_tokens_decoder=[1]), "DIR/tokenizer_config.json: "),
    "template": (tokenizer_config(chat_template="{% for"), "DIR/tokenizer_config.json: "),
    "template-type": (tokenizer_config(chat_template=3), "DIR/tokenizer_config.json: chat_template must be text"),
    "template-binary": (text("chat_template.jinja", b"\xff"), "DIR/chat_template.jinja: "),
    "weights-missing": (text("model.safetensors", None), "DIR: holds neither model.safetensors nor"),
    "weights-empty": (text("model.safetensors", b""), "DIR/model.safetensors: header of 0 bytes in a file of 0"),
    "weights-short": (cut("model.safetensors", 5000), "DIR/model.safetensors: tensor "),
    "weights-length": (
        text("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        "DIR/model.safetensors: header of 4611686018427387904 bytes in a file of 10: truncated or not safetensors",
    ),
    "weights-text": (
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "DIR/model.safetensors: is a pointer of Git LFS",
    ),
    "weights-bin": (
        renamed("model.safetensors", "pytorch_model.bin"),
        NEITHER + "pytorch_model.bin is not a format",
    ),
    "weights-variant": (
        renamed("model.safetensors", "model.fp16.safetensors"),
        NEITHER + "model.fp16.safetensors is a variant",
    ),
    "weights-consolidated": (
        renamed("model.safetensors", "consolidated.safetensors"),
        NEITHER + "consolidated.safetensors is in a layout",
    ),
    "weights-adapter": (
        renamed("model.safetensors", "adapter_model.safetensors"),
        NEITHER + "adapter_model.safetensors is an adapter",
    ),
    "weights-one-of-two": (
        renamed("model.safetensors", "model-00001-of-00002.safetensors"),
        "DIR: of 2 shards 1 are not there (00002); is the download complete?",
    ),
    "weights-link": (
        lambda directory: (
            (directory / "model.safetensors").unlink(),
            (directory / "model.safetensors").symlink_to("../blobs/none"),
        ),
        "DIR/model.safetensors: is a link to a file that is not there; is the download complete?",
    ),
    "adapter-alone": (
        renamed("config.json", "adapter_config.json"),
        "DIR: is an adapter, which must be merged into its base model first",
    ),
    "no-output-layer": (
        tensors(lambda values: values.pop("lm_head.weight")),
        "DIR: tensor lm_head.weight is missing, and tie_word_embeddings in config.json is false (which an absent field "
        "may mean); true there uses the embedding in its place",
    ),
    "causal": (
        config(use_bidirectional_attention=True),
        "DIR/config.json: use_bidirectional_attention is not supported",
    ),
    "quantized-tensors": (
        tensors(lambda values: values.update({"model.layers.0.mlp.down_proj.qweight": torch.zeros(2)})),
        "DIR: tensor model.layers.0.mlp.down_proj.qweight is of a quantized checkpoint, but no "
        "quantization_config tells how to read it; ",
    ),
    "weights-shape": (
        header(lambda values: values[NORM].update(shape=[2**40, 2**40])),
        f"DIR/model.safetensors: tensor {NORM}: F32 [1099511627776, 1099511627776] takes",
    ),
    "weights-offsets": (
        header(lambda values: values[NORM].update(data_offsets=[0, 10**12])),
        f"DIR/model.safetensors: tensor {NORM}: its data ends at byte",
    ),
    "weights-overlap": (
        header(lambda values: values[NORM].update(data_offsets=[0, 192])),
        "DIR/model.safetensors: tensor ",
    ),
    "weights-dtype": (
        header(lambda values: values[NORM].update(dtype="F7")),
        f"DIR/model.safetensors: tensor {NORM}: unknown dtype 'F7'",
    ),
    "tensor-missing": (tensors(lambda values: values.pop(NORM)), f"DIR: tensor {NORM} [48] is missing"),
    "tensor-shape": (
        tensors(lambda values: values.update({NORM: torch.zeros(47)})),
        f"DIR: model.safetensors: tensor {NORM} has shape [47], config.json asks for [48]",
    ),
    "layers": (
        config(num_hidden_layers=2),
        "DIR: model.safetensors: tensor model.layers.2.",
    ),
    "embedding": (config(vocab_size=600), "DIR: model.safetensors: tensor lm_head.weight has shape [512, 48]"),
    "index": (
        index('{"weight_map": {"x": "../x.safetensors"}}'),
        "DIR/model.safetensors.index.json: tensor x: '../x.safetensors' is not the name of a safetensors file",
    ),
    "index-binary": (index(b"\xff"), "DIR/model.safetensors.index.json: "),
    "shard": (
        index('{"weight_map": {"x": "model-2.safetensors"}}'),
        "DIR/model-2.safetensors: is named by model.safetensors.index.json but does not exist",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model(name: str, start: Callable[..., str]) -> None:
    damage, expected = DAMAGES[name]
    line = start(damage)
    assert line.startswith(expected), line


FLAGS: dict[str, tuple[list[str], str]] = {
    "context": (["--max-model-len", "1000"], "--max-model-len 1000 is more than the model was made for: 256"),
    "context-otherwise": (
        ["--context-length", "1000"],
        "--context-length 1000 is more than the model was made for: 256",
    ),
    "drafts-key": (
        ["--speculative-config", json.dumps({"method": "ngram", "k" * 500: 1})],
        f'--speculative-config: "{"k" * 64}..." is no key of it; known are ',
    ),
    "drafts-json": (["--speculative-config", "x" * 500], f"--speculative-config: '{'x' * 64}...' is not JSON"),
    "cache-large": (["--num-gpu-blocks-override", "1000000000000"], "a KV cache of 1,000,000,000,000 pages takes"),
    "cache-small": (["--kv-cache-memory-bytes", "100"], "the KV cache would hold no page"),
    "cache-twice": (["--kv-cache-gb", "1", "--max-total-tokens", "9"], "the size of the KV cache is given 2 times"),
    "budget": (["--max-num-batched-tokens", "8", "--max-num-seqs", "9"], "--max-num-batched-tokens 8 is less than"),
    "transfer-key": (
        ["--kv-transfer-config", '{"kv_connector": "TcpConnector", "kv_role": "kv_both", "rank": 1}'],
        "--kv-transfer-config: 'rank' is not known here; known are enable_permute_local_kv, engine_id, ",
    ),
    "transfer-long": (
        ["--kv-transfer-config", json.dumps({"kv_connector": "TcpConnector", "kv_role": "kv_both", "k" * 500: 1})],
        f"--kv-transfer-config: '{'k' * 64}...' is not known here; known are ",
    ),
    "policy": (["--schedule-policy", "luck"], "unknown schedule policy 'luck'; known are: "),
    "admin-key": (["--admin-api-key", ""], "--admin-api-key: the key is empty"),
    "tls": (["--ssl-keyfile", "/x"], "--ssl-keyfile needs --ssl-certfile"),
    "eviction": (["--radix-eviction-policy", "luck"], "unknown eviction policy 'luck'; known are: "),
    "template": (["--chat-template", "/nowhere/template.jinja"], "/nowhere/template.jinja: "),
    "tokenizer": (["--tokenizer", "/nowhere"], "/nowhere: no tokenizer.json"),
    "tools": (["--tool-call-parser", "hermez"], "--tool-call-parser 'hermez' is not known: auto, none, apertus, "),
    "reasoning": (["--reasoning-parser", "x"], "--reasoning-parser 'x' is not known: auto, none, apertus, "),
    "two-models": (["/elsewhere"], "two models are named: '/elsewhere' and 'DIR'"),
    "adapters": (
        ["--enable-lora", "--max-lora-mib", "9"],
        "--max-lora-mib is for GPUs: on a CPU an adapter takes what",
    ),
    "deterministic": (["--deterministic", "--dtype", "float16"], "--deterministic cannot be promised here: "),
    "sequences": (
        ["--max-num-seqs", str(10**15), "--num-gpu-blocks-override", "8"],
        "no memory for --max-num-seqs 1000000000000000 with 256 tokens of context each",
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_impossible_flags(name: str, start: Callable[..., str]) -> None:
    flags, expected = FLAGS[name]
    line = start(None, *flags)
    assert line.startswith(expected), line


def test_port_in_use(start: Callable[..., str]) -> None:
    """So far the undamaged model gets."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert str(taken.getsockname()[1]) in start(None, "--port", str(taken.getsockname()[1]))


def test_dummy_weights_need_a_tokenizer_to_serve(start: Callable[..., str]) -> None:
    line = start(text("tokenizer.json", None), "--load-format", "dummy")
    assert line.startswith("DIR: no tokenizer.json")


@pytest.mark.parametrize(("path", "expected"), [("/nowhere/model", "no such directory"), (__file__, "is a file")])
def test_no_directory(path: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", path]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path}: {expected}")


def test_the_traceback_is_for_debug(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", hidden_size=...)
    assert main(["--model", str(tmp_path / "model"), "--log-level", "debug"]) == 1
    assert "Traceback" in caplog.text
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_as_a_command(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x00" * 40)
    command = [sys.executable, "-m", "engine.serve", "--model", str(tmp_path / "model"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {tmp_path}/model/model.safetensors: header is not valid JSON: "
        "Expecting value: line 1 column 1 (char 0)"
    ]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--kv-cache-dtyp", "int8"], "unrecognized arguments: --kv-cache-dtyp (did you mean --kv-cache-dtype? --help"),
        # A prefix is no flag, however clear it is.
        (["--kv-cache-dt=int8"], "unrecognized arguments: --kv-cache-dt=int8 (did you mean --kv-cache-dtype? --help"),
        (["--max_num_seqs=3"], "unrecognized arguments: --max_num_seqs=3 (did you mean --max-num-seqs? --help"),
        (["--prot", "1", "--modle=x"], "unrecognized arguments: --prot --modle=x (did you mean --port and --model? --"),
        (["--" + "x" * 500], f"unrecognized arguments: --{'x' * 62}... (--help lists the flags)"),
        (["--seed", "x" * 500], f"argument --seed/--random-seed: invalid int value: '{'x' * 255}... (--help"),
        (["--swap-space"], "unrecognized arguments: --swap-space (--help lists the flags)"),
        (["--enable-metrics", "--tp", "two"], "argument --tensor-parallel-size/-tp/--tp/"),
        (["--pp-size", "2"], "argument --pipeline-parallel-size/-pp/--pp-size/"),
        (["--port", "99999"], "argument --port: '99999' is not a port"),
        (["--default-chat-template-kwargs", "[1]"], "argument --default-chat-template-kwargs: '[1]' is not a JSON"),
        (["--default-chat-template-kwargs", '{"messages": 1}'], "argument --default-chat-template-kwargs: 'messages'"),
    ],
)
def test_a_mistyped_flag_is_one_line(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(flags)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert error.startswith(f"error: {expected}") and error.count("\n") == 1
