"""A GPU that is not there, for a dry run (dry.py): CUDA tensors that have no memory, and a note of all that happens.

Tensors on the device are fake (shapes, dtypes, devices and strides alone), those of the host are real. FlashInfer's
Python is the installed one, its compiled modules are stand-ins that take any arguments. Imported before FlashInfer,
which looks into the environment then.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
os.environ["FLASHINFER_DISABLE_JIT"] = "0"
os.environ["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", tempfile.gettempdir())
warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402

from tests.cuda.fake_device import Mode, tensors_of  # noqa: E402

DEVICE = torch.device("cuda", 0)
# Operations that only hand out memory or another view of it, so that no kernel runs.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
FREE |= {"set_", "_unsafe_view", "empty_permuted"}
# Operations whose result, or its size, the host must have.
LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"}
PROPERTIES = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    name="NVIDIA H200",
    total_memory=140 * 2**30,
    warp_size=32,
    shared_memory_per_multiprocessor=228 * 1024,
    shared_memory_per_block_optin=227 * 1024,
)


# Kinds of events that are a kernel each.
LAUNCHES = ("aten", "triton", "library")


class Event(NamedTuple):
    """kind: aten, triton, library, graph, copy, plan or finding. captured: by a graph."""

    kind: str
    name: str
    captured: bool


class Log:
    """What has happened. steps: only then does a look at the device cost anything."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.modules: set[str] = set()
        # Functions of modules that were called: (module, function).
        self.calls: set[tuple[str, str]] = set()
        # With which arguments.
        self.forms: dict[tuple[str, str], set[tuple[str, ...]]] = {}
        self.capturing = False
        self.steps = False
        self.pinned: list[tuple[int, int]] = []
        self.kept: list[Tensor] = []

    def add(self, kind: str, name: str) -> None:
        self.events.append(Event(kind, name, self.capturing))

    def finding(self, what: str) -> None:
        if self.steps:
            self.add("finding", what)

    def is_pinned(self, tensor: Tensor) -> bool:
        at = tensor.data_ptr()
        return any(begin <= at < end for begin, end in self.pinned)

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append((tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize))
        self.kept.append(tensor)
        return tensor


LOG = Log()
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class DryMode(Mode):
    """Operations on the device give fake tensors; what passes between host and device is looked at."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = tensors_of((args, kwargs))
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("prim::"):  # of what is known of a tensor without a look at it
            return func(*args, **kwargs)
        pin = kwargs.pop("pin_memory", False)
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if device is not None and device.type == "cuda":
            device = kwargs["device"] = DEVICE
        if not any(isinstance(tensor, FakeTensor) for tensor in given) and (device is None or device.type != "cuda"):
            result = func(*args, **kwargs)
            return LOG.pin(result) if pin else result
        if name == "copy_" and args[0].is_cuda != args[1].is_cuda:
            self._passes(args[1] if args[0].is_cuda else args[0], args[0].is_cuda, (*args, *kwargs.values())[2:])
            return args[0]
        if name == "_to_copy" and device is not None and (device.type == "cuda") != args[0].is_cuda:
            self._passes(args[0], device.type == "cuda", (kwargs.get("non_blocking", False),))
            if device.type == "cuda":
                with FAKE:
                    return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=DEVICE)
        if name in LOOKS:
            LOG.finding(f"{name} brings a value to the host")
        with FAKE:
            result = func(*args, **kwargs)
        memory = {tensor.untyped_storage()._cdata for tensor in given}
        out = tensors_of(result)
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        fresh = any(tensor.untyped_storage()._cdata not in memory for tensor in out)
        if (fresh or not is_view) and name not in FREE and any(tensor.numel() for tensor in (*given, *out)):
            LOG.add("aten", name)
        for tensor in out:
            if not tensor.is_cuda and name not in ("copy_", "_to_copy"):
                LOG.finding(f"{name} brings a value to the host")
        if isinstance(result, bool | int | float):
            LOG.finding(f"{name} brings a value to the host")
        return result

    @staticmethod
    def _passes(host: Tensor, to_device: bool, options: tuple[object, ...]) -> None:
        way = "upload" if to_device else "download"
        LOG.add("copy", way)
        if not any(option is True for option in options):
            LOG.finding(f"a {way} that waits")
        if isinstance(host, FakeTensor) or not LOG.is_pinned(host):
            LOG.finding(f"a {way} by pageable memory")
        if LOG.capturing:
            LOG.finding(f"a graph holds a {way}")


class DryDevice:
    """A DeviceLayer that has done everything at once."""

    device = DEVICE

    def __init__(self, ours: float = 0.5) -> None:
        """ours: how long our products need, where cuBLAS needs 1."""
        self.ours = ours

    def stream(self) -> object:
        return object()

    def event(self) -> object:
        return object()

    @contextlib.contextmanager
    def on(self, stream: object) -> Iterator[None]:
        yield

    def launch(self, work: Callable[[], object]) -> None:
        work()

    def upload(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    download = upload

    def record(self, event: object) -> None: ...

    wait = synchronize = record

    def is_done(self, event: object) -> bool:
        return True

    def synchronize_all(self) -> None: ...

    @contextlib.contextmanager
    def may_block(self) -> Iterator[None]:
        before, LOG.steps = LOG.steps, False
        try:
            yield
        finally:
            LOG.steps = before

    aside = may_block

    def capture(self, work: Callable[[], object]) -> list[Event]:
        return self.capture_parts(lambda cut: work())[0]

    def capture_parts(self, work: Callable[[Callable[[], None]], object]) -> list[list[Event]]:
        ends, LOG.capturing = [len(LOG.events)], True
        try:
            work(lambda: ends.append(len(LOG.events)))
        finally:
            LOG.capturing = False
        ends.append(len(LOG.events))
        return [
            [event for event in LOG.events[begin:end] if event.kind in LAUNCHES]
            for begin, end in itertools.pairwise(ends)
        ]

    def drop_graph_memory(self) -> None: ...

    def replay(self, graph: list[Event]) -> None:
        LOG.add("graph", "replay")

    def time(self, graph: list[Event]) -> float:
        return 1.0 if any(event.kind == "aten" for event in graph) else self.ours

    def pinned(self, num_bytes: int) -> Tensor:
        return LOG.pin(torch.zeros(num_bytes, dtype=torch.uint8))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    def free_memory(self) -> int:
        return 130 * 2**30

    def total_memory(self) -> int:
        return 140 * 2**30

    def allocated_memory(self) -> int:
        return 2**31

    def peak_memory(self, *, reset: bool = False) -> int:
        return 2**32

    def is_lost(self, error: BaseException) -> bool:
        return False

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        yield


# ---- what is asked for a device


# Builds of torch without CUDA have nothing that could be asked to make a device the current one.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""


def guard_device() -> None:
    """Let operations name a CUDA device; needs a C++ compiler where torch is built without CUDA."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10"]
        subprocess.run(["c++", "-o", library, source, *flags], check=True)
        ctypes.CDLL(str(library))


def without_gpu() -> None:
    """Let torch answer as if there were an H200, and Triton launch nothing."""
    guard_device()
    for name, value in {
        "_lazy_init": lambda: None,
        "get_device_capability": lambda *args, **options: (9, 0),
        "get_device_properties": lambda *args, **options: PROPERTIES,
        "current_device": lambda: 0,
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    JITFunction.__getitem__ = _triton_launch


def _triton_launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    def launch(*args: Any, **options: Any) -> None:
        limits = (2**31 - 1, 65535, 65535)
        if not all(1 <= size <= limit for size, limit in zip(grid, limits, strict=False)):
            LOG.finding(f"{kernel.__name__} has a grid of {grid}")
        for tensor in (each for each in args if isinstance(each, Tensor)):
            if not tensor.is_cuda:
                LOG.finding(f"{kernel.__name__} gets a tensor of the host")
            elif tensor.storage_offset() * tensor.itemsize % 16:
                LOG.finding(f"{kernel.__name__} gets a pointer that is not aligned, and is compiled anew")
        LOG.add("triton", kernel.__name__)

    return launch


def _form(argument: Any) -> str:
    """What an argument is, for calls that are to be alike."""
    if isinstance(argument, Tensor):
        return f"{argument.dtype} [{argument.dim()}] {'device' if argument.is_cuda else 'host'}"
    return type(argument).__name__


class _Module:
    """Stands for a compiled module of FlashInfer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, what: str) -> Callable[..., object]:
        if what.startswith("__"):
            raise AttributeError(what)

        if what == "plan_with_staged_workspace_bytes":  # of what wraps a module, which is not there
            raise AttributeError(what)

        def call(*args: Any) -> object:
            LOG.modules.add(self.name)
            LOG.calls.add((self.name, what))
            LOG.forms.setdefault((self.name, what), set()).add(tuple(map(_form, args)))
            if what == "plan":
                LOG.add("plan", self.name)
                return [0] * 16
            for number, argument in enumerate(args):
                if isinstance(argument, Tensor) and not argument.is_cuda:
                    LOG.finding(f"{self.name}.{what} gets a tensor of the host as argument {number}")
            LOG.add("library", f"{self.name}.{what}")
            return None

        return call


def without_compiler() -> None:
    """Let FlashInfer load a stand-in for whatever module it asks for."""
    import flashinfer.jit.core as core
    import flashinfer.utils as utils

    utils.get_device_properties = lambda device: PROPERTIES
    core.check_cuda_arch = lambda *args, **options: None

    def load(self: Any) -> _Module:
        LOG.modules.add(self.name)
        return _Module(self.name)

    def every(kind: type) -> Iterator[type]:
        yield kind
        for each in kind.__subclasses__():
            yield from every(each)

    for kind in every(core.JitSpec):
        if "build_and_load" in vars(kind):
            kind.build_and_load = load  # type: ignore[attr-defined]
