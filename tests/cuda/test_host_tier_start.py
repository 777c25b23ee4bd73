"""--kv-host-gb at start: what cannot work ends in one readable line, what can is said in the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine.build import _add_carriers
from engine.config import CacheOptions, EngineConfig, StartupError, TierOptions, TransferOptions
from engine.engine import Engine
from engine.executor import cpu_start
from engine.report import StartupReport
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import HYBRID, SMALL, make_executor, tiny_model


class NothingToLock(FakeDevice):
    """Has some page-locked memory for itself, and none of a tier's size."""

    def pinned(self, num_bytes: int) -> Tensor:
        if num_bytes > 2**20:
            raise RuntimeError("CUDA error: out of memory\nand more of it")
        return super().pinned(num_bytes)


def start(
    directory: Path, host_bytes: int, *, device: FakeDevice | None = None, limits: Any = SMALL, **options: Any
) -> str:
    """The rows about tiers. Raises StartupError."""
    (directory / "config.json").write_text("{}")
    model = tiny_model(json.dumps(HYBRID)) if limits.num_snapshots is not None else tiny_model()
    executor = make_executor(limits, device=device or FakeDevice(), model=model)
    config = EngineConfig(tiers=TierOptions(None, 10**8, 5.0, host_bytes), **options)
    engine, report = Engine(config, executor, None), StartupReport()
    try:
        _add_carriers(engine, directory, model.config, 64, report)
        return "\n".join(f"{name}: {value}" for name, value in report.rows)
    finally:
        engine._end_carriers()
        executor.close()


def test_the_table_says_how_much_there_is(tmp_path: Path) -> None:
    row = start(tmp_path, 10**6)
    assert (
        "host tier: 0.001 GB of page-locked memory: " in row and f" pages beside the device's {SMALL.num_pages}" in row
    )


def test_too_little_for_two_pages(tmp_path: Path) -> None:
    with pytest.raises(
        StartupError, match=r"^--kv-host-gb must be at least \S+ for this model: less holds no two page"
    ):
        start(tmp_path, 1000)


def test_more_than_the_host_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_start, "available_memory", lambda: 10 * 10**9)
    line = "--kv-host-gb: 9.5 GB are more than 90% of the host memory that can be had, 10.0 GB"
    with pytest.raises(StartupError) as error:
        start(tmp_path, 9_500_000_000)
    assert str(error.value) == line


def test_no_page_locked_memory(tmp_path: Path) -> None:
    with pytest.raises(StartupError) as error:
        start(tmp_path, 8 * 10**6, device=NothingToLock())
    line = str(error.value)
    assert line.startswith("--kv-host-gb 0.008: no 0.008 GB of page-locked memory: CUDA error: out of memory")
    assert "\n" not in line


def test_servers_that_exchange_pages(tmp_path: Path) -> None:
    rows = start(tmp_path, 10**6, transfer=TransferOptions(connector="TcpConnector"))
    assert "transfer: TcpConnector: keeps pages and reads them, asked at 127.0.0.1:" in rows and "host tier: " in rows


def test_servers_that_exchange_states_without_snapshots(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"^--kv-transfer-config: there is no room for a snapshot"):
        limits = dataclasses.replace(SMALL, num_snapshots=0)
        start(tmp_path, 0, limits=limits, transfer=TransferOptions(connector="TcpConnector"))


def test_without_a_prefix_cache(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"^--kv-host-gb needs the prefix cache"):
        start(tmp_path, 10**6, cache=CacheOptions(enable_prefix_caching=False))


def test_states_without_snapshots(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"^--kv-host-gb: there is no room for a snapshot"):
        start(tmp_path, 10**6, limits=dataclasses.replace(SMALL, num_snapshots=0))
