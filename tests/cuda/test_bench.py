"""bench/gpu.py runs its engine sections on the fake device: the figures mean nothing, the rows must be there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_kernels, gpu_steps
from engine.text.tokenizer import Tokenizer
from tests.cuda.fake_device import FakeDevice, FakeDeviceError
from tests.cuda.fake_flashinfer import FakeFlashInfer
from tests.cuda.support import TINY


def tiny() -> gpu.Subject:
    """Of which a step of 40 tokens holds three prompts."""
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 40, "context": 12, "decode_tokens": 9}
    return gpu.Subject("tiny", TINY, FakeDevice(0), torch.float32, **sizes)


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WARM_STEPS", 2)
    monkeypatch.setattr(gpu, "settle", lambda: None)  # this process has other tests before it
    report = gpu.Report(tmp_path / "results", 1e9, "NVIDIA H200")
    subject = tiny()
    gpu.bench_model(report, subject, [1, 3], bandwidth=1e9, flops=1e9)
    assert report.path.name.startswith("h200-")
    content = json.loads(report.path.read_text())
    assert set(content) == {"commit", "date", "gpu", "versions", "command", "rows"} and content["command"] == [
        Path(sys.argv[0]).name,
        *sys.argv[1:],
    ]
    names = [(row["name"], row["batch"]) for row in content["rows"]]
    assert names.count(("decode", 1)) == names.count(("decode", 3)) == 1
    # 40 tokens a step hold three prompts of 12.
    assert ("prefill", 3 * gpu.PREFILL_STEPS) in names and ("prompts to first tokens", 3) in names
    assert ("overlap on over off", 3) in names
    launches = [row["context"] for row in content["rows"] if row["name"] == "host launch, small prompt step"]
    assert launches == [12, 12]
    for row in content["rows"]:
        assert set(row) == {"name", "model", "batch", "context", "value", "unit", "floor_ratio"} and row["value"] > 0
    assert report.table().count("\n") == len(content["rows"]) + 1


def test_sections_that_fail_or_have_no_time_cost_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = gpu.Report(tmp_path, 0.0, "none")
    assert not report.has_time(1.0)
    assert gpu.main(["--out", str(tmp_path)]) == (1 if not torch.cuda.is_available() else 0)
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_device_that_is_lost_costs_one_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process, which gets the device anew, does those behind it; one that fails otherwise is only told."""
    calls: list[object] = []
    monkeypatch.setattr(gpu, "copy_rate", lambda device: 1e12)
    monkeypatch.setattr(gpu, "gemm_rate", lambda device: 1e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "none")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "use_kit_of_build", lambda: "")
    monkeypatch.setattr(gpu, "TimedDevice", FakeDevice)
    monkeypatch.setattr(gpu.os, "execv", lambda path, words: calls.append(words))
    errors = [ValueError("a bug"), RuntimeError("a step"), RuntimeError("never"), RuntimeError("never")]
    errors[1].__cause__ = FakeDeviceError("CUDA error: an illegal memory access was encountered")

    def section(*args: object, **options: object) -> None:
        raise errors.pop(0)

    for name in ("bench_products", "bench_experts", "bench_http", "bench_kernels"):
        monkeypatch.setattr(gpu, name, section)
    words = ["--out", str(tmp_path), "--seconds", "400", "--only", "products", "experts", "kernels", "HTTP"]
    assert gpu.main(words) == 0
    assert [str(error) for error in errors] == ["never", "never"]
    (command,) = calls
    assert isinstance(command, list) and command[-3:] == ["--only", "HTTP", "kernels"] and command[2] == "bench.gpu"
    assert int(command[command.index("--seconds") + 1]) > 300
    assert "products failed: ValueError: a bug\nexperts failed: RuntimeError: a step\n" in capsys.readouterr().err


def test_what_steps_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as a profiler tells them, and steps of an engine on the fake device."""
    kernels = [gpu_steps.Kernel(("small", "large")[i % 2], 10.0 * i, (1.0, 5.0)[i % 2]) for i in range(8)]
    table = gpu_steps.by_time(kernels, 2)
    assert table[0].startswith("kernels 12 us a step, 4 launches")
    assert [line.split() for line in table[1:]] == [
        ["10.0", "us", "2.0x", "5.00", "us", "large"],
        ["2.0", "us", "2.0x", "1.00", "us", "small"],
    ]
    monkeypatch.setattr(gpu_steps, "STRETCH", 2)
    assert [line.split() for line in gpu_steps.in_order(kernels[::-1])] == [
        ["0.0", "+", "1.0", "small"],
        ["10.0", "+", "5.0", "large"],
    ]
    subject = tiny()
    with subject.layer.may_block():
        executor = subject.executor()
    lines = gpu_steps.look(subject, executor, 3, host=True)
    executor.close()
    assert lines[0] == "## tiny, 3 rows of 12 tokens" and lines[1].endswith("steps") and "median" in lines[1]
    assert any("tottime" in line for line in lines[2:])
    assert gpu_steps.as_seen([], 3) == "no step of the whole batch"


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "HEADS", ((4, 1, 64),))
    monkeypatch.setattr(gpu_kernels, "ATTENDING", (1, 3))
    monkeypatch.setattr(gpu_kernels, "ATTENDED", 40)
    report, layer = gpu.Report(tmp_path, 1e9, "none"), FakeDevice(0)
    with layer.may_block():
        gpu_kernels.bench_attention(report, layer, 1e9, FakeFlashInfer(layer))
    names = [(row["name"], row["batch"], row["context"]) for row in report.content["rows"]]
    ways = ("attention 4/1x64, XQA", "attention 4/1x64, FlashInfer's wrapper")
    assert names == [(way, rows, 40) for rows in (1, 3) for way in ways]


def test_products_and_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "PRODUCTS", ((24, 16), (8, 16)))
    monkeypatch.setattr(gpu_kernels, "EXPERTS", (16, 8, 4, 2))
    report, layer = gpu.Report(tmp_path, 1e9, "none"), FakeDevice(0)
    with layer.may_block():
        gpu.bench_products(report, layer, 1e9)
        gpu.bench_experts(report, layer, 1e9, 1e9)
    names = [(row["name"], row["batch"]) for row in report.content["rows"]]
    assert ("product 24x16, ours", 1) in names and ("product 8x16, cuBLAS", 4) in names
    assert names[-3:] == [("experts of a layer", tokens) for tokens in (1, 64, 4096)]
    assert all(row["value"] > 0 and row["floor_ratio"] is not None for row in report.content["rows"])


def test_a_token_makes_text(tmp_path: Path) -> None:
    """Or the server has less to do than it would have. The section itself: test_gpu_run.py."""
    gpu.write_words(tmp_path, 500)
    assert Tokenizer.load(tmp_path).decode([7, 300]) == "w7 w300"


def test_a_server_takes_the_kit_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would compile kernels, or do without where nothing can be compiled."""
    monkeypatch.setattr(gpu, "KIT_OF_BUILD", tmp_path / "kernels.kit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.kit_flags() == ""
    (tmp_path / "kernels.kit").write_bytes(b"")
    assert gpu.kit_flags() == f"--kernels {tmp_path / 'kernels.kit'}"


def test_rates_are_measured() -> None:
    device = torch.device("cpu")
    assert gpu.copy_rate(device, 2**16) > 0 and gpu.gemm_rate(device, 16) > 0


def test_floors() -> None:
    """Bytes of weights and KV of a decode step, and operations of a prompt, against a count by hand (no norms)."""
    subject = gpu.Subject("tiny", TINY, FakeDevice(0), torch.float32, max_num_seqs=1, context=8, decode_tokens=4)
    matrices = 2 * (32 * 8 * (4 + 2 * 2) + 32 * 32 + 3 * 48 * 32)
    assert subject.weight_bytes(1) == subject.weight_bytes(7) == 4 * (matrices + 101 * 32)
    assert subject.kv_bytes(10) == 4 * 10 * 2 * 2 * 2 * 8
    assert subject.prefill_flops(3) == 2 * matrices * 3 + 2 * 2 * 4 * 8 * 9


def test_floors_of_experts() -> None:
    """A token reads the experts it has chosen; many tokens read nearly all, and each computes its own."""
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2}
    shape = {**TINY, **extra, "architectures": ["MixtralForCausalLM"]}
    subject = gpu.Subject("tiny", shape, FakeDevice(0), torch.float32, max_num_seqs=1, context=8, decode_tokens=4)
    others = 2 * (32 * 8 * (4 + 2 * 2) + 32 * 32 + 4 * 32)
    expert = 2 * 3 * 48 * 32
    assert subject.weight_bytes(1) == 4 * (others + 2 * expert + 101 * 32)
    assert subject.weight_bytes(2) == 4 * (others + 3 * expert + 101 * 32)
    assert subject.prefill_flops(3) == 2 * (others + 2 * expert) * 3 + 2 * 2 * 4 * 8 * 9
