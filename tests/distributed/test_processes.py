"""Servers over two processes: no rank outlives its parent, nobody's answer is lost where it need not be."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.server import free_port, running
from engine.config import StartupError
from engine.distributed.rank import Rank
from engine.executor.reading import Reading
from engine.flags import DEMO_MODEL
from engine.llm import LLM
from engine.lora.words import AdapterError
from engine.models.gguf.reader import open_gguf
from engine.ops.ranks import RanksEndedError
from tests.models.gguf.export import export
from tests.models.support import make_checkpoint

FLAGS = "--device cpu --threads 1 --tensor-parallel-size 2 --max-model-len 2048 --max-num-seqs 4 --kv-cache-gb 0.05"


def ranks_of(pid: int) -> list[int]:
    """Processes that this one has started, and that live."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in found for word in path.read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stream(port: int, count: int) -> Iterator[str]:
    body = {"prompt": "Once", "max_tokens": count, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.strip():
                yield line.decode().strip()


def test_a_drain_and_a_dead_parent() -> None:
    with running(FLAGS) as server:
        ranks = ranks_of(server.process.pid)
        assert len(ranks) == 1
        lines = stream(server.port, 100)
        next(lines)
        for pid in (server.process.pid, *ranks):  # as a service manager does
            os.kill(pid, signal.SIGTERM)
        rest = list(lines)
        assert rest[-1] == "data: [DONE]" and not any('"error"' in line for line in rest)
        assert server.process.wait(60) == 0
        wait_until_gone(ranks)


def test_a_parent_that_is_killed_leaves_nobody_behind() -> None:
    with running(FLAGS) as server:
        ranks = ranks_of(server.process.pid)
        server.process.kill()
        wait_until_gone(ranks)


def test_a_dead_rank_ends_streams_with_an_error_and_the_process_with_1() -> None:
    port = free_port()
    words = [sys.executable, "-m", "engine.serve", "--port", str(port), *FLAGS.split()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "OpenAI-compatible" in line:
                break
        [rank] = ranks_of(process.pid)
        lines = stream(port, 2000)
        next(lines)
        os.kill(rank, signal.SIGKILL)
        rest = list(lines)
        output = process.stdout.read()
        assert process.wait(60) == 1
    assert any('"error"' in line and "device was lost" in line for line in rest), rest[-3:]
    assert re.search(rf"rank 1 \(process {rank}\) was killed by signal 9", output), output


def test_what_is_wrong_with_a_ranks_part_is_one_line_of_the_parents(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"vocab_size": 2304}  # that of the tokenizer
    make_checkpoint(tmp_path, "Llama", **sizes)
    path = export(tmp_path, tmp_path / "blob", "llama", {}, blocks={"ffn_down": "Q6_K"})
    link = tmp_path / "a.gguf"  # as a hub's cache has it
    link.symlink_to(path)
    tensor = open_gguf(path).tensors["blk.0.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.end - 2 : tensor.end] = np.array([np.inf], np.float16).tobytes()  # of rank 1's columns
    path.write_bytes(data)
    options = {"device": "cpu", "threads": 1, "max_model_len": 64, "tensor_parallel_size": 2}
    with pytest.raises(StartupError, match=r"down_proj.weight: row 63 has a scale that is not a finite number"):
        LLM(str(link), tokenizer=str(DEMO_MODEL), **options)


def test_a_rank_that_fails_says_why_and_no_more() -> None:
    """Its thread waits for the parent's end meanwhile."""
    words = [sys.executable, "-m", "engine.distributed.rank"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'{"rank": 3, "threads": 1}\n')
        process.stdin.flush()
        output = process.stdout.read().decode()
        assert process.wait(60) == 1
    assert output.startswith("ERROR oneloop.ranks: rank 3 failed\n") and output.endswith("KeyError: 'dtype'\n"), output


def test_a_rank_whose_reader_of_adapters_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is to wait for what that thread says."""

    class Broken:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def follow(self) -> None:
            raise self.error

    statuses: list[int] = []
    monkeypatch.setattr("engine.distributed.rank._leave", statuses.append)
    for error in (RanksEndedError(), MemoryError()):
        rank = Rank.__new__(Rank)
        rank._shared, rank._ranks = Broken(error), SimpleNamespace(rank=1)  # type: ignore[assignment]
        rank._read_adapters()
    assert statuses == [1]


def test_an_adapter_that_is_read_as_the_model_is_put_to_sleep() -> None:
    models = iter([SimpleNamespace(adapted=None), None])

    class Sleepy(Rank):
        _model = property(lambda self: next(models))  # type: ignore[assignment]

    rank = Sleepy.__new__(Sleepy)
    rank._job = {"max_lora_rank": 8}
    path = Path("a")
    with pytest.raises(AdapterError, match="the model sleeps"):
        rank._read_part(path, Reading(lambda value: [value], path))
