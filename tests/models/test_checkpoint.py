"""Reading safetensors: damaged and lying files, wrong tensors, memory at load, dummy weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import StartupError
from engine.models.loading.checkpoint import find_tensors, read_header
from engine.models.loading.load import load_model
from engine.models.loading.weights import DummyWeights
from engine.models.registry import read_spec
from tests.models.support import CPU, Runner, edit_json, load, make_checkpoint, prompts_of


def write_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(shape: Any = (2, 3), offsets: Any = (0, 24), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not-json": (b"{'a'", b"", "header is not valid JSON: "),
    "not-object": ([1], b"", "header is not a JSON object"),
    "twice": (b'{"a": 1, "a": 2}', b"", "header is not valid JSON: a name stands twice"),
    "entry": ({"a": 3}, b"", "tensor a: its header entry is not an object"),
    "dtype": ({"a": entry(dtype="F7")}, bytes(24), "tensor a: unknown dtype 'F7'"),
    "dtype-type": ({"a": entry(dtype=["F32"])}, bytes(24), "tensor a: unknown dtype ['F32']"),
    "pairs": ({"a": entry(dtype="F4", shape=[16, 3])}, bytes(24), "tensor a: F4 of shape [16, 3] has no whole bytes"),
    "pairs-size": ({"a": entry(dtype="F4", shape=[16, 4])}, bytes(24), "tensor a: U8 [16, 2] takes 32 bytes but"),
    "shape": ({"a": entry(shape=[-2, -3])}, bytes(24), "tensor a: impossible shape [-2, -3]"),
    "shape-float": ({"a": entry(shape=[2.0, 3])}, bytes(24), "tensor a: impossible shape [2.0, 3]"),
    "dimensions": ({"a": entry(shape=[1] * 70)}, bytes(24), "tensor a: impossible shape [1, 1"),
    "offsets": ({"a": entry(offsets=[24, 0])}, bytes(24), "tensor a: impossible data_offsets [24, 0]"),
    "offsets-three": ({"a": entry(offsets=[0, 1, 24])}, bytes(24), "tensor a: impossible data_offsets"),
    "end": ({"a": entry()}, bytes(20), "tensor a: its data ends at byte "),
    "size": ({"a": entry(shape=[2, 4])}, bytes(24), "tensor a: F32 [2, 4] takes 32 bytes but data_offsets span 24"),
    "product": ({"a": entry(shape=[2**40, 2**40])}, bytes(24), "tensor a: F32 [1099511627776, 1099511627776] takes"),
    "overlap": (
        {"a": entry(), "b": entry(offsets=[20, 44])},
        bytes(44),
        "tensor b: its data overlaps that of a",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_bad_header(name: str, tmp_path: Path) -> None:
    header, data, expected = HEADERS[name]
    path = tmp_path / "model.safetensors"
    write_file(path, header, data)
    with pytest.raises(StartupError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", (100).to_bytes(8, "little") + b"{}", b"\xff" * 20])
def test_header_length_beyond_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(StartupError, match="truncated or not safetensors"):
        read_header(path)


def test_header_of_a_real_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(0, 4), "c": torch.tensor(1.0, dtype=torch.bfloat16)}
    save_file(tensors, path, {"format": "pt"})
    found = read_header(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (2, 3), "b": (0, 4), "c": ()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_checkpoint(directory, "Llama")
    return directory


def rewritten(llama: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the checkpoint with changed tensors."""
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((llama / "config.json").read_text())
    return directory


def error_of(directory: Path) -> str:
    with pytest.raises(StartupError) as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_tensors_are_counted(llama: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "down_proj" in name or "norm" in name]:
            del tensors[name]

    assert error_of(rewritten(llama, tmp_path, drop)) == (
        f"{tmp_path}: tensor model.layers.0.input_layernorm.weight [48] is missing; "
        "tensor model.layers.0.mlp.down_proj.weight [48, 80] is missing; "
        "tensor model.layers.0.post_attention_layernorm.weight [48] is missing; and 7 more such problems"
    )


def test_unexpected_tensor(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    rewritten(llama, tmp_path, lambda tensors: tensors.update({name: torch.zeros(2)}))
    assert error_of(tmp_path) == f"{tmp_path}: model.safetensors: tensor {name} is not part of the model"


def test_wrong_shape(llama: Path, tmp_path: Path) -> None:
    rewritten(llama, tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}))
    assert error_of(tmp_path) == (
        f"{tmp_path}: model.safetensors: tensor model.norm.weight has shape [47], config.json asks for [48]"
    )


def test_integer_weights(llama: Path, tmp_path: Path) -> None:
    wrong = torch.zeros(48, dtype=torch.int8)
    rewritten(llama, tmp_path, lambda tensors: tensors.update({"model.norm.weight": wrong}))
    assert "tensor model.norm.weight has dtype I8, only" in error_of(tmp_path)


def test_truncated_file(llama: Path, tmp_path: Path) -> None:
    rewritten(llama, tmp_path, lambda tensors: None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert ": truncated" in error_of(tmp_path)


def test_harmless_extras_are_ignored(llama: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    load(rewritten(llama, tmp_path, lambda tensors: tensors.update(extra)))


def test_no_weights(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert error_of(tmp_path).endswith("holds neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert error_of(tmp_path).endswith("; pytorch_model.bin is not a format that is read")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, "Llama", max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_missing_shard(shards: Path) -> None:
    last = sorted(shards.glob("*.safetensors"))[-1]
    last.unlink()
    assert error_of(shards) == (
        f"{last}: is named by model.safetensors.index.json but does not exist; is the download complete?"
    )


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "x.bin", 3, None])
def test_index_must_name_files_beside_it(shards: Path, file: Any) -> None:
    index = shards / "model.safetensors.index.json"
    edit_json(index, weight_map={"model.norm.weight": file})
    assert error_of(shards).startswith(f"{index}: tensor model.norm.weight: {file!r} is not the name of")


def test_index_names_a_tensor_that_is_not_there(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map["model.norm.weight"]
    # transformers does not miss it either, where the model has no such tensor.
    edit_json(index, weight_map=weight_map | {"model.nowhere": file})
    load(shards)
    edit_json(index, weight_map=[])
    assert "weight_map must be an object" in error_of(shards)


def test_progress_counts_bytes(shards: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(shards, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.end - tensor.begin for tensor in find_tensors(shards).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_unknown_load_format(llama: Path) -> None:
    with pytest.raises(StartupError, match="load format 'pickle' is not one of auto, safetensors, dummy"):
        load(llama, load_format="pickle")


def test_dummy_weights_are_a_function_of_the_seed(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    prompt = prompts_of([12])[0]
    first, again, other = (
        Runner(load(tmp_path, load_format="dummy", seed=seed)).logits(prompt, 12) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert 0.1 < float(first.std()) < 10
    assert len(set(first.argmax(dim=-1).tolist())) > 3


def test_dummy_tensors_differ() -> None:
    weights = DummyWeights(torch.float32, CPU, 0, {})
    # Long enough to go around the block twice.
    first, second = weights.tensor("a.weight", (5000, 500)), weights.tensor("b.weight", (5000, 500))
    assert float(first.std()) == pytest.approx(500**-0.5, rel=0.01)
    assert not torch.equal(first[:10], second[:10])
    assert torch.unique(first[:, 0]).numel() > 4900


MEASURE = """
import re, sys
from pathlib import Path
import torch
from engine.models.registry import read_spec
from engine.models.loading.load import load_model
import engine.models.parts.decoder
torch.set_num_threads(1)

def resident():
    # Not ru_maxrss, which a child inherits from its parent.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

# The first use of the linear library and of the kernels brings its own pages.
directory = Path(sys.argv[1])
small = Path(sys.argv[2])
load_model(read_spec(small), small, dtype=torch.bfloat16, device=torch.device("cpu"))
before = resident()
model = load_model(read_spec(directory), directory, dtype=torch.bfloat16, device=torch.device("cpu"))
print(resident() - before)
# What only compilers of torch need, and half a second.
assert "sympy" not in sys.modules
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tied", [False, True])
def test_memory_at_load(tied: bool, tmp_path: Path) -> None:
    """The peak stays within 1.25 times the weights: the files' pages go as the tensors are placed."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 16384}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir()
    make_checkpoint(small, "Llama", dtype=torch.bfloat16)
    config = json.loads((small / "config.json").read_text()) | sizes | heads | {"tie_word_embeddings": tied}
    (big / "config.json").write_text(json.dumps(config))
    generate_checkpoint(big)
    weights = sum(tensor.end - tensor.begin for tensor in find_tensors(big).values())
    assert weights > 190e6
    run = [sys.executable, "-c", MEASURE, str(big), str(small)]
    peak = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    print(f"peak is {peak / weights:.3f} of the weights")
    assert weights * 0.9 < peak < weights * 1.25, f"peak is {peak / weights:.2f} of the weights"


def generate_checkpoint(directory: Path) -> None:
    """Two shards of dummy weights for the config that is already there."""
    from engine.models.loading.weights import ShapeRecorder
    from engine.models.parts.decoder import Decoder

    recorder = ShapeRecorder(torch.bfloat16)
    Decoder(read_spec(directory), recorder, 16)
    weights = DummyWeights(torch.bfloat16, CPU, 0, recorder.shapes)
    names = list(recorder.shapes)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights.tensor(name, recorder.shapes[name]) for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_context_sizes_the_rope_table(llama: Path) -> None:
    config = read_spec(llama)
    for max_model_len, rows in ((None, 256), (100, 100)):
        model: Any = load_model(config, llama, dtype=torch.float32, device=CPU, max_model_len=max_model_len)
        assert model._steps[0][1].shape == (rows, 8)


def test_no_memory(llama: Path) -> None:
    """A rope table of 2^60 bytes."""
    with pytest.raises(StartupError, match="no memory for the model: "):
        load(llama, max_model_len=2**54)


def test_an_index_that_cannot_be_read(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    index.unlink()
    index.mkdir()
    assert error_of(shards) == f"{index}: Is a directory"
