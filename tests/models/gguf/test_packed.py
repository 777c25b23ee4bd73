"""Files of mixed types, as people publish them: everything stays packed, with the logits of float32 numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import StartupError
from engine.executor.cpu_start import choose_threads
from engine.models.loading.load import weight_bytes
from engine.models.registry import read_spec
from engine.ops import native
from engine.ops.packed import PackedLinear, can_stay_packed
from tests.models.gguf.export import export
from tests.models.support import Runner, load, make_checkpoint, prompts_of, relative_error

pytestmark = pytest.mark.skipif(not can_stay_packed(torch.float32, torch.device("cpu")), reason="no native kernels")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
# As llama.cpp mixes Q4_K_M: q and k unlike v, of the feed-forward down unlike the others.
MEDIUM = {"attn_v": "Q6_K", "attn_": "Q4_K", "ffn_down": "Q6_K", "ffn_": "Q4_K", "token_embd": "Q6_K"}
# Parts of one layer all different, and numbers among them.
DYNAMIC = {
    "attn_q": "Q5_K", "attn_v": "Q8_0", "attn_output": "IQ4_XS", "ffn_gate": "Q2_K", "ffn_up": "Q3_K",
    "ffn_down": "MXFP4", "token_embd": "Q4_0", "output": "Q5_1",
}  # fmt: skip
CASES = {
    "medium, tied": ({"tie_word_embeddings": True}, MEDIUM, {"Q4_K": 2 * 3, "Q6_K": 2 * 2 + 1}),
    "medium": ({}, MEDIUM | {"output": "Q6_K"}, {"Q4_K": 2 * 3, "Q6_K": 2 * 2 + 1}),
    "dynamic": ({}, DYNAMIC, dict.fromkeys(("Q5_K", "Q8_0", "IQ4_XS", "Q2_K", "Q3_K", "MXFP4"), 2) | {"Q5_1": 1}),
    "biased": (
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"attn_k": "IQ4_NL", "attn_": "Q5_0", "ffn_": "Q4_1", "token_embd": "Q8_0"},
        {"Q5_0": 2 * 3, "IQ4_NL": 2, "Q4_1": 2 * 2, "Q8_0": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mixed_types(name: str, tmp_path: Path) -> None:
    sizes, blocks, kinds = CASES[name]
    make_checkpoint(tmp_path, "Llama", **{**SIZES, **sizes})
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, blocks=blocks)
    model = load(path)
    found = Counter(linear.block for linear in model.linears if isinstance(linear, PackedLinear))
    assert found == kinds
    runner = Runner(model)
    [prompt] = prompts_of([20])
    assert runner.same_bits(prompt)
    with native.disabled():
        numbers = load(path)
        expected = Runner(numbers, num_seqs=1).logits(prompt, 8)
    assert not any(isinstance(linear, PackedLinear) for linear in numbers.linears)
    # Inputs of 16 bits; each layer is to 3e-5 (tests/ops/test_packed.py), and random layers spread that.
    assert relative_error(runner.logits(prompt, 8), expected) <= 5e-4
    spec = read_spec(path)
    assert weight_bytes(spec, path, torch.float32) < 0.4 * 4 * spec.num_parameters
    assert choose_threads(weight_bytes(spec, path, torch.float32), cores=8) == 1


def test_inputs_of_eight_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama", **{**SIZES, "tie_word_embeddings": True})
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, blocks=MEDIUM)
    [prompt] = prompts_of([20])
    exact = Runner(load(path)).logits(prompt, 8)
    model = load(path, packed_input_bits=8)
    assert {linear.input_bits for linear in model.linears} == {8}
    runner = Runner(model)
    assert runner.same_bits(prompt)
    assert 1e-4 < relative_error(runner.logits(prompt, 8), exact) < 5e-2


@pytest.mark.parametrize(
    ("kind", "before", "number"), [("Q6_K", 2, np.array([np.inf], np.float16).tobytes()), ("MXFP4", 17, b"\xff")]
)
def test_a_scale_that_is_no_number(kind: str, before: int, number: bytes, tmp_path: Path) -> None:
    """before: how many bytes it lies before the end of a row."""
    make_checkpoint(tmp_path, "Llama", **{**SIZES, "num_hidden_layers": 1})
    path = export(tmp_path, tmp_path / "a.gguf", "llama", {}, blocks={"ffn_down": kind})
    from engine.models.gguf.reader import open_gguf

    tensor = open_gguf(path).tensors["blk.0.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    at = tensor.begin + 5 * (tensor.end - tensor.begin) // 256 - before
    data[at : at + len(number)] = number
    path.write_bytes(data)
    with pytest.raises(StartupError, match=r"down_proj.weight: row 4 has a scale that is not a finite number"):
        load(path)
