"""What is said of a GPU that cannot be used, or is none that this engine was made for."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from engine import build
from engine.config import EngineConfig, StartupError
from engine.executor import gpu_probe
from engine.flags import parse
from engine.report import StartupReport


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "visible", "says"),
    [
        (None, (13, 0), None, "this torch is built without CUDA"),
        ("13.0", None, None, "no NVIDIA driver is installed (libcuda.so.1)"),
        (
            "13.0",
            (12, 4),
            None,
            "the NVIDIA driver is too old: it speaks CUDA 12.4, and this torch is built for 13.0; a newer driver or a "
            "torch for CUDA 12 is needed",
        ),
        # Within a major version older drivers will do.
        ("12.8", (12, 2), None, "torch sees no CUDA device"),
        ("12.8", (13, 0), "", "torch sees no CUDA device; CUDA_VISIBLE_DEVICES is ''"),
        ("13.0", (13, 0), "7\n", "torch sees no CUDA device; CUDA_VISIBLE_DEVICES is '7\\n'"),
    ],
)
def test_why_there_is_no_gpu(torch_cuda: str | None, driver: tuple[int, int] | None, visible: str, says: str) -> None:
    assert gpu_probe.obstacle(torch_cuda, driver, visible) == says


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(code: int) -> object:
        def version(to: object) -> int:
            to._obj.value = 12040  # type: ignore[attr-defined]
            return code

        return SimpleNamespace(cuDriverGetVersion=version)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: answer(0))
    assert gpu_probe.driver_version() == (12, 4)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: answer(3))
    assert gpu_probe.driver_version() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert gpu_probe.driver_version() is None

    def none(name: str) -> object:
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert gpu_probe.driver_version() is None


@pytest.mark.parametrize(
    ("capability", "usable", "xqa", "says"),
    [
        ((7, 5), False, False, "fa2, decode by our kernel or FlashInfer's plain ones"),
        ((8, 0), True, False, "fa2, decode by our kernel or FlashInfer's plain ones"),
        ((8, 9), True, False, "fa2, decode by our kernel or FlashInfer's plain ones"),
        ((9, 0), True, True, None),
        ((10, 0), True, True, "fa3 needs a Hopper; nothing here was tuned"),
        ((12, 1), True, True, "fa3 needs a Hopper; nothing here was tuned"),
    ],
)
def test_what_a_card_lacks(capability: tuple[int, int], usable: bool, xqa: bool, says: str | None) -> None:
    assert (gpu_probe.too_old("T4", capability) is None) == usable
    assert gpu_probe.has_xqa(capability) == xqa
    found = gpu_probe.stands_in(capability)
    assert found is None if says is None else found is not None and says in found


# ---- what the start makes of it


def pick(monkeypatch: pytest.MonkeyPatch, *flags: str, **machine: object) -> tuple[str, dict[str, str]]:
    """machine: available, capability, driver, torch_cuda."""
    known = {"available": False, "capability": (9, 0), "driver": (13, 0), "torch_cuda": "13.0", **machine}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: known["available"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: known["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA T4")
    monkeypatch.setattr(torch.version, "cuda", known["torch_cuda"])
    monkeypatch.setattr(gpu_probe, "driver_version", lambda: known["driver"])
    report = StartupReport()
    config: EngineConfig = parse([*flags])[0]
    return build._pick_device(config, report), dict(report.rows)


def test_a_gpu_that_can_be_used_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(monkeypatch, available=True) == ("cuda", {})
    assert pick(monkeypatch, "--device", "cuda", available=True) == ("cuda", {})
    assert pick(monkeypatch, "--device", "cpu", available=True) == ("cpu", {})


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        ({"driver": (12, 4)}, "the NVIDIA driver is too old: it speaks CUDA 12.4, and"),
        ({"torch_cuda": None}, "this torch is built without CUDA"),
        ({"available": True, "capability": (7, 5)}, "NVIDIA T4 has compute capability 7.5, and 8.0 (Ampere) or newer"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_in_a_line(
    machine: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row where the CPU stands in for it; the end of the start where it was asked for."""
    device, rows = pick(monkeypatch, **machine)
    assert device == "cpu" and rows["GPU"].startswith(f"not used: {says}")
    for flags in (["--device", "cuda"], ["--kv-cache-dtype", "fp8"], ["--kernels", "a.kit"]):
        with pytest.raises(StartupError) as error:
            pick(monkeypatch, *flags, **machine)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_a_machine_without_a_gpu_has_no_row_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(monkeypatch, driver=None) == ("cpu", {})
    with pytest.raises(StartupError, match=r"^--device cuda: no NVIDIA driver is installed \(libcuda.so.1\)$"):
        pick(monkeypatch, "--device", "cuda", driver=None)
