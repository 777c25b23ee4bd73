"""bench/peers.py: the same weights in bfloat16, what servers are started with, and the picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from bench.datasets import Source
from bench.peers import LOADS, as_bfloat16, picture, seed_of, servers
from bench.serve import make_jobs, parse

gguf = pytest.importorskip("gguf")


def test_matrices_are_rounded_and_the_rest_stays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix, norm = rng.standard_normal((4, 64), np.float32), rng.standard_normal(64, np.float32)
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_rope_freq_base(10000.0)
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(matrix, kinds.Q8_0), raw_dtype=kinds.Q8_0)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = gguf.GGUFReader(tmp_path / "a.gguf")
    after = gguf.GGUFReader(as_bfloat16(tmp_path / "a.gguf", tmp_path / "b.gguf"))
    for name in ("general.architecture", "llama.block_count", "tokenizer.ggml.tokens", "llama.rope.freq_base"):
        assert after.fields[name].contents() == before.fields[name].contents()
    assert [tensor.tensor_type for tensor in after.tensors] == [kinds.BF16, kinds.F32]
    values = gguf.quants.dequantize(before.tensors[0].data, kinds.Q8_0)
    rounded = gguf.quants.dequantize(after.tensors[0].data, kinds.BF16)
    np.testing.assert_allclose(rounded, values, rtol=2**-8)
    np.testing.assert_array_equal(after.tensors[1].data, norm)


def test_servers(tmp_path: Path) -> None:
    args = argparse.Namespace(
        threads=3, flags="--x 1", llamacpp_python="PY", llamacpp_command="ls {file} {port}", transformers_python=None
    )
    args.command = ["other=run {directory} {port}"]
    ours, llamacpp, own, other = servers(args, tmp_path / "m.gguf", tmp_path)
    assert ours.command is None and "--threads 3" in ours.flags and ours.flags.endswith("--x 1")
    assert llamacpp.command is not None and "--interrupt_requests false" in llamacpp.command
    assert own.command == f"ls {tmp_path}/m.gguf {{port}}"
    assert (other.name, other.command) == ("other", f"run {tmp_path} {{port}}")


def test_no_round_has_prompts_of_another() -> None:
    """All servers are up for the whole run, and some of them remember."""
    prompts = [
        job.turns[0]
        for load in LOADS
        for concurrency in (1, 4, 16)
        for number in range(3)
        for job in make_jobs(
            parse(["--endpoint", "chat", *LOADS[load].split()]), Source(), 20, seed_of(load, concurrency, number)
        )
    ]
    assert len({str(prompt)[:100] for prompt in prompts}) == 36 * 20 - 9 * 19  # of the shared ones the beginning


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"load": load, "concurrency": count, "peer": peer, "ratio": 2.0, "least": 1.5, "most": 3.0}
        for load, peer in (("short chat", "a"), ("short chat", "b"), ("JSON", "a"))
        for count in (1, 16)
    ]
    picture(rows, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
