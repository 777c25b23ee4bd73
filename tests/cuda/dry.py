"""A dry run without a GPU: the executor, the models and the real FlashInfer on CUDA tensors that have no memory.

`python -m tests.cuda.dry SCENARIO...`: run by test_dry_run.py in processes of its own, for it changes torch, Triton and
FlashInfer where they ask for a device. Every operation, launch, copy and plan is noted; lines of JSON, behind one
that names their scenario, say what would be wrong on a GPU, what a graph holds and which kernels are needed.

Tensors on the device are fake (shapes, dtypes, devices and strides alone), those of the host are real. FlashInfer's
Python is the installed one, its compiled modules are stand-ins that take any arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
os.environ["FLASHINFER_DISABLE_JIT"] = "0"
os.environ["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", tempfile.gettempdir())
warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402

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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class DryMode(TorchDispatchMode):
    """Operations on the device give fake tensors; what passes between host and device is looked at."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
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
        out = _tensors(result)
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


# ---- scenarios


# By what is read of checkpoints whose experts are quantised: forms of gate and up, and of down.
CODED_EXPERTS: dict[str, tuple[str, ...] | None] = {
    "GptOssForCausalLM": None,
    "DeepseekV3ForCausalLM": ("e4m3",),
    "Qwen3MoeForCausalLM": ("int4",),
    "MixtralForCausalLM": ("int4 and low", "int8"),
}
DRAFTED: list[dict[str, Any]] = [{"max_tokens": 60}, {"max_tokens": 60, "top_k": 5}, {"logprobs": 2}]
EXTRAS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"logit_bias": ((7, 5.0), (9, -50.0))},
    {"bad_words": ((11,), (3, 5))},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.05, "logprobs": 3},
    {"allowed_token_ids": tuple(range(100, 400)), "prompt_logprobs": 2},
    {},
]


def collectives_of(size: int) -> Any:
    """Rank 0's, by torch.distributed's own operations and a backend that moves nothing."""
    import torch.testing._internal.distributed.fake_pg  # registers it

    from engine.distributed.collectives import TorchCollectives

    with tempfile.TemporaryDirectory() as folder:
        return TorchCollectives(str(Path(folder) / "meeting"), 0, size, torch.device("cpu"), "fake")


def dummy_model(config: dict[str, Any], dtype: torch.dtype, max_adapters: int = 0, group: Any = None) -> Any:
    """A model whose weights have no numbers. group: of ranks, whose first one's part it is."""
    from engine.models.loading.load import load_model
    from engine.models.loading.weights import DummyWeights
    from engine.models.registry import read_spec

    # Numbers into memory that is not there would take long.
    DummyWeights.fill = lambda self, out, name: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "config.json").write_text(json.dumps(config))
        options: dict[str, Any] = {"load_format": "dummy", "max_model_len": 1024, "max_adapters": max_adapters}
        options["group"] = group
        return load_model(read_spec(directory), directory, dtype=dtype, device=DEVICE, **options)


def make_executor(
    config: dict[str, Any], way: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, **options: Any
) -> Any:
    from engine.executor.cuda import CUDAExecutor
    from engine.executor.cuda_adapters import DeviceAdapters
    from engine.forward import Limits
    from engine.ops.attention import flashinfer, flashinfer_latent
    from engine.ops.attention.device import DeviceAttention
    from engine.speculation.base import Proposer
    from engine.speculation.prediction import Prediction
    from engine.speculation.registry import make_proposer
    from tests.cuda.dry_drafts import drafts_of
    from tests.cuda.support import ALWAYS

    group = None
    if options.get("ranks"):
        from engine.ops.device_parallel import DeviceGroup

        group = DeviceGroup(collectives_of(options["ranks"]))
    model = dummy_model(config, dtype, options.get("adapters", 0), group)
    limits = Limits(
        max_num_seqs=options.get("rows", 8),
        max_num_batched_tokens=512,
        max_model_len=1024,
        page_size=16,
        num_pages=options.get("rows", 8) * 64,
        vocab_size=model.config.vocab_size,
        num_snapshots=8 if model.config.has_state else None,
        max_draft_tokens=ALWAYS.num_draft_tokens if options.get("drafts") else 0,
        max_adapters=options.get("adapters", 0),
    )
    proposer: Proposer | None = make_proposer(ALWAYS) if options.get("drafts") else None
    drafts = None
    given: dict[str, Any] = {
        "num_pages": limits.num_pages,
        "page_size": 16,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "device": DEVICE,
    }
    attention: DeviceAttention
    if way == "torch":
        attention = DeviceAttention(model.attention_spec, **given)
    elif model.attention_spec.latent is not None:
        attention = flashinfer_latent.Backend(model.attention_spec, **given)
    else:
        attention = flashinfer.Backend(model.attention_spec, decode=way, **given)
    if isinstance(options.get("drafts"), str):
        small = functools.partial(dummy_model, {**config, "num_hidden_layers": 1})
        proposer, drafts = Prediction(), drafts_of(options["drafts"], model, config, way, given, small)
    layer = DryDevice(options.get("ours", 0.5))
    adapters = DeviceAdapters(model, layer, 16, 512, 256) if limits.max_adapters else None  # type: ignore[arg-type]
    added: dict[str, Any] = {"proposer": proposer, "adapters": adapters, "cuda_graph": options.get("graph", "lazy")}
    added["drafts"] = drafts
    return CUDAExecutor(model, limits, layer, attention, **added)  # type: ignore[arg-type]


def requests_of(changes: list[dict[str, Any]], vocab: int) -> list[Any]:
    import numpy as np

    from engine.request import Request, SamplingParams

    rng = np.random.default_rng(1)
    found = []
    for number in range(8):
        params = SamplingParams(max_tokens=9, temperature=float(number % 2 == 0), seed=number, ignore_eos=True)
        prompt = rng.integers(3, min(vocab, 990), int(rng.integers(1, 90))).tolist()
        found.append(Request(f"r{number}", prompt, dataclasses.replace(params, **changes[number % len(changes)])))
    return found


def adapters_of(executor: Any) -> list[Any]:
    """One for all layers and one for some of them, and none."""
    from engine.request import Adapter
    from tests.lora.handmade import factors, write

    layers = executor.model.adapted
    inside = [name for name in layers.places if name.startswith("model.layers.")]
    modules = [name for name in inside if ".experts." not in name or name.startswith("model.layers.0.")]
    modules.append("lm_head")
    found: list[Any] = [None]
    with tempfile.TemporaryDirectory() as folder:
        for number, chosen in enumerate((modules, modules[::3]), 1):
            path = write(Path(folder) / f"a{number}", factors(layers, 4 * number, number, chosen), r=4 * number)
            weights = executor.read_adapter(path)
            found.append(
                Adapter(path.name, str(path), number, weights.rank, weights.num_bytes, weights, weights.digest)
            )
    return found


def serve(
    name: str,
    config: dict[str, Any],
    way: str,
    dtype: str,
    kv: str,
    changes: list[dict[str, Any]],
    drafts: bool | str = False,
    adapters: int = 0,
    timed: bool = False,
    float8_inputs: bool = False,
    ranks: int = 0,
) -> None:
    """Requests through the whole engine; steps of all kinds, eager and captured. timed: with the products that the
    device's clock says. float8_inputs: linear layers, which are e4m3, round theirs from four rows on."""
    from engine.kernels import kernels_of
    from tests.cuda.support import ALWAYS, NO_DRAFTS
    from tests.cuda.support import serve as through_the_engine

    LOG.__init__()  # type: ignore[misc]
    kv_dtype = torch.float8_e4m3fn if kv == "fp8" else None
    result: dict[str, Any] = {"name": name, "error": "", "attention": ""}
    try:
        with DryMode():
            executor = make_executor(
                config, way, getattr(torch, dtype), kv_dtype, drafts=drafts, adapters=adapters, ranks=ranks
            )
            given = adapters_of(executor) if adapters else [None]
            if timed:
                executor.choose_products()
            if float8_inputs:
                for linear in executor.model.linears:
                    linear.take_float8_inputs()
                    linear.float8_from = 4 if linear.has_float8_inputs else None
            begin = len(LOG.events)
            LOG.steps = True
            asked = requests_of(changes, executor.limits.vocab_size)
            asked = [dataclasses.replace(each, adapter=given[n % len(given)]) for n, each in enumerate(asked)]
            speculation = ALWAYS if drafts else NO_DRAFTS
            asyncio.run(asyncio.wait_for(through_the_engine(executor, asked, speculation=speculation), 240))
            LOG.steps = False
            if isinstance(drafts, str):
                result["drafting"] = executor._drafter.graphs.num_replays
            result["products"] = sorted({event.name for event in LOG.events[begin:] if "_multiply" in event.name})
            captured = {event.name for event in LOG.events[begin:] if event.captured}
            collectives = [event for event in LOG.events[begin:] if event.name.startswith("c10d::")]
            result["collectives"] = sorted({f"{event.name} {event.captured}" for event in collectives})
            result["sums"] = sum(event.name == "_add_up" for event in LOG.events[begin:])
            result["captured_products"] = sorted(name for name in captured if "_multiply" in name)
            result["scaled"] = [
                sum(event.name == "_scaled_mm" and event.captured is each for event in LOG.events[begin:])
                for each in (False, True)
            ]
            result["mixtures"] = [list(mixture.forms) for mixture in executor.model.mixtures]
            result["attention"] = executor.attention.describe()
            attention = executor.attention
            kit = kernels_of(attention.spec, attention.dtype, attention.kv_dtype)
            result["kit"] = [each.name for each in kit]
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    result["findings"] = dict(Counter(event.name for event in LOG.events if event.kind == "finding"))
    result["modules"] = sorted(LOG.modules)
    result["calls"] = sorted(LOG.calls)
    # Of the modules that we call ourselves, beside FlashInfer's own calls at the start.
    result["forms"] = {
        what: [len(forms), len(min(forms))] for (name, what), forms in LOG.forms.items() if "_mla_" in name
    }
    result["captured"] = sum(event.captured for event in LOG.events)
    result["drafts"] = sum(event.captured and event.name == "_accept" for event in LOG.events)
    print(json.dumps(result), flush=True)


@contextlib.contextmanager
def weights_of_codes(form: str, down: str | None = None) -> Iterator[None]:
    """Every linear layer keeps codes that have no numbers, and experts, whose last matrix may have others (down)."""
    from engine.models.loading.weights import DummyWeights
    from engine.ops import device_coded
    from engine.ops.device_coded import DeviceCodedLinear

    plain = DummyWeights.linear

    def linear(self: DummyWeights, names: Any, rows: Any, columns: int, **options: Any) -> Any:
        if options.get("dtype") is not None:  # a router
            return plain(self, names, rows, columns, **options)
        total, device = sum(rows), self.device
        bias = torch.empty(total, dtype=self.dtype, device=device) if options.get("bias") else None
        made = DeviceCodedLinear(
            form, total, columns, 32, self.dtype, device, [], bias, activation=options.get("activation")
        )
        self.linears.append(made)
        return made

    def experts(self: DummyWeights, names: Any, count: int, rows: int, columns: int, **options: Any) -> Any:
        own = down if down is not None and len(names) == count else form
        return device_coded.codes_of(own, len(names) * rows, columns, 32, self.device, [])

    with (
        mock.patch.object(DummyWeights, "linear", linear),
        mock.patch.object(DummyWeights, "experts", experts),
        # Which scales are the same cannot be asked of tensors without numbers.
        mock.patch.object(device_coded, "_fewest", lambda scales, lows: (scales.half(), lows)),
    ):
        yield


def encode(name: str, config: dict[str, Any]) -> None:
    """Whole texts through an encoder, of several lengths, pairs among them."""
    from engine.config import SchedulerOptions
    from engine.executor.cuda import CUDAExecutor
    from engine.executor.start import encoder_limits
    from engine.ops.attention.device_packed import Backend
    from tests.cuda.test_encoders import vectors

    LOG.__init__()  # type: ignore[misc]
    result: dict[str, Any] = {"name": name, "error": ""}
    try:
        with DryMode():
            model = dummy_model(config, torch.bfloat16)
            limits = encoder_limits(SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=128), 64, 1000)
            attention = Backend(model.attention_spec, max_tokens=128, dtype=torch.bfloat16, device=DEVICE)
            executor = CUDAExecutor(model, limits, DryDevice(0.5), attention, cuda_graph="off")  # type: ignore[arg-type]
            LOG.steps = True
            asyncio.run(asyncio.wait_for(vectors(executor, classify=False), 60))
            LOG.steps = False
            result["attention"] = attention.describe()
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    result["findings"] = dict(Counter(event.name for event in LOG.events if event.kind == "finding"))
    print(json.dumps(result), flush=True)


def count(name: str, config: dict[str, Any], rows: int, draw: str = "plain") -> None:
    """What the graph of a decode step holds, by layer and for the rest; and the launches of a mixed step.

    draw: as a GraphKey has it; behind a +, whether the model has places for adapters, and whether the rows have any.
    """
    from engine.executor.cuda_graph import GraphKey

    kind, _, places = draw.partition("+")
    totals, mixed, names = [], [], []
    for layers in (2, 4):
        LOG.__init__()  # type: ignore[misc]
        with DryMode():
            # A step with drafts is one of decoding at the other set of buffers.
            drafts = kind == "drafts"
            options = {"rows": rows, "adapters": 2 if places else 0, "drafts": drafts}
            executor = make_executor({**config, "num_hidden_layers": layers}, "auto", torch.bfloat16, None, **options)
            executor.choose_products()
            how = 2 if drafts else 0, "plain" if drafts else kind
            key = GraphKey(rows, executor.graphs.widths[0], *how, places == "adapters")
            executor._prepare(key)
            if executor.attention.decode_needs_plan(rows):
                executor._plan_padding(executor._sides[0], key)
            graph = executor.layer.capture(lambda key=key, executor=executor: executor._decode(key))
            totals.append(len(graph))
            names.append(Counter(event.name for event in graph))
            mixed.append(_mixed_launches(executor, rows))
    per_layer, *per_mixed_layer = (counts[1] - counts[0] for counts in (totals, *zip(*mixed, strict=True)))
    print(
        json.dumps(
            {
                "name": name,
                "rows": rows,
                "draw": draw,
                "layer": per_layer / 2,
                "step": totals[0] - per_layer,
                # One by one, and as a chain of graphs.
                "mixed_layer": [number / 2 for number in per_mixed_layer],
                "mixed_step": [number - more for number, more in zip(mixed[0], per_mixed_layer, strict=True)],
                "in_layer": {op: n / 2 for op, n in (names[1] - names[0]).items()},
                "in_step": dict(names[0] - names[1] + (names[0] - (names[1] - names[0]))),
                "modules": sorted(LOG.modules),
            }
        ),
        flush=True,
    )


def _mixed_launches(executor: Any, rows: int) -> tuple[int, int]:
    """Of a step with one prompt beside rows - 1 that decode: one by one, and as a chain of graphs."""
    from tests.executor.driver import GREEDY, Driver, decode, prefill

    driver = Driver(executor)

    async def run() -> tuple[int, int]:
        slots = list(range(1, rows))
        if slots:
            pages = {slot: [slot * 4 + i for i in range(4)] for slot in slots}
            await driver.run([prefill(slot, [5, 6, 7]) for slot in slots], pages, dict.fromkeys(slots, GREEDY))
        ends = [len(LOG.events)]
        for position in (3, 4):
            rest = [decode(slot, position) for slot in slots]
            await driver.run([*rest, prefill(rows, list(range(5, 40)))], {rows: [1, 2, 3]}, {rows: GREEDY})
            ends.append(len(LOG.events))
            executor.pieces.capture(executor.model, executor.pieces.size(rows + 34))
            ends.append(len(LOG.events))
        counts = [
            sum(event.kind in (*LAUNCHES, "graph") for event in LOG.events[begin:end])
            for begin, end in itertools.pairwise(ends)
        ]
        return counts[0], counts[2]

    return asyncio.run(run())


def planted() -> None:
    """What is wrong on purpose is found."""
    from engine.ops.triton import norm

    LOG.__init__()  # type: ignore[misc]
    LOG.steps = True
    layer = DryDevice()
    with DryMode():
        x = layer.zeros((4, 64), torch.float32)
        with contextlib.suppress(Exception):
            x.sum().item()
        x.copy_(torch.ones(4, 64))
        norm.rms_norm(x.view(-1)[1:65].view(1, 64), layer.zeros((64,), torch.float32), 1e-5)
        layer.capture(lambda: layer.download(layer.pinned(1024).view(torch.float32).view(4, 64), x))
    findings = dict(Counter(event.name for event in LOG.events if event.kind == "finding"))
    print(json.dumps({"name": "planted", "findings": findings}), flush=True)


def signatures() -> None:
    """Parameters of what is called, those with defaults behind a bar."""
    import flashinfer

    prefill, decode = flashinfer.BatchPrefillWithPagedKVCacheWrapper, flashinfer.BatchDecodeWithPagedKVCacheWrapper
    found = {}
    latent = flashinfer.mla.BatchMLAPagedAttentionWrapper
    for name, call in {
        "mla.__init__": latent.__init__,
        "mla.plan": latent.plan,
        "mla.run": latent.run,
        "mla.csr": flashinfer.mla.MLAPlanMetadata.csr,
        "prefill.__init__": prefill.__init__,
        "prefill.plan": prefill.plan,
        "prefill.run": prefill.run,
        "decode.__init__": decode.__init__,
        "decode.plan": decode.plan,
        "decode.run": decode.run,
        "xqa": flashinfer.decode.xqa_batch_decode_with_kv_cache,
    }.items():
        named = [
            p
            for p in inspect.signature(call).parameters.values()
            if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        required = [p.name for p in named if p.default is p.empty]
        found[name] = " ".join([*required, "|", *(p.name for p in named if p.default is not p.empty)])
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values()):
            found[name] += " ..."  # and what it hands on by name
    print(json.dumps({"name": "signatures", "found": found}), flush=True)


def main(names: list[str]) -> None:
    without_gpu()
    without_compiler()
    from bench.shapes import SHAPES
    from tests.cuda.test_encoders import ENCODERS
    from tests.gpu.support import BASE, EXTRA, TORCH_ATTENTION, families

    llama = {**BASE, "architectures": ["LlamaForCausalLM"]}
    for name in names:
        print(json.dumps({"scenario": name}), flush=True)
        if name == "families":
            for architecture in families():
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                # Those whose layers differ in what their attention sees are tried by both.
                for way in ("auto", "wrapper") if "window" in str(config) else ("auto",):
                    serve(f"{architecture} {way}", config, way, "bfloat16", "auto", [{}, {"top_p": 0.9}])
        elif name == "encoders":
            for encoder in ("bert", "windows", "grouped"):
                encode(encoder, {**ENCODERS[encoder], "hidden_size": 512, "head_dim": 128})
        elif name == "signatures":
            signatures()
        elif name == "planted":
            planted()
        elif name == "adapters":
            for architecture in (
                "LlamaForCausalLM",
                "Qwen3MoeForCausalLM",
                "DeepseekV3ForCausalLM",
                "Qwen3_5ForCausalLM",
            ):
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                way = "torch" if architecture == "DeepseekV3ForCausalLM" else "auto"
                serve(f"adapters {architecture}", config, way, "bfloat16", "auto", [{}, {"top_k": 5}], adapters=2)
        elif name == "drafts":
            for method in ("draft_model", "drawn", "eagle3"):
                for way in ("auto", "wrapper"):
                    serve(f"{method} {way}", llama, way, "bfloat16", "auto", DRAFTED, drafts=method)
            for architecture in ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"):
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                config["num_nextn_predict_layers"] = 1
                serve(f"mtp {architecture}", config, "auto", "bfloat16", "auto", DRAFTED, drafts="mtp")
        elif name == "features":
            for way in ("torch", "auto", "wrapper"):
                serve(f"extras {way}", llama, way, "bfloat16", "auto", EXTRAS)
            for way in ("auto", "wrapper"):
                serve(f"drafts {way}", llama, way, "bfloat16", "auto", DRAFTED, drafts=True)
            serve("extras float32", llama, "torch", "float32", "auto", EXTRAS)
            for way in ("auto", "wrapper"):
                serve(f"fp8 {way}", llama, way, "bfloat16", "fp8", [{}, {"top_k": 5}])
            for form in ("int4 and low", "e4m3"):
                with weights_of_codes(form):
                    serve(f"codes {form}", llama, "auto", "bfloat16", "auto", [{}, {"top_k": 5}])
            with weights_of_codes("e4m3"):
                given = ("codes and inputs e4m3", llama, "auto", "bfloat16", "auto", [{}, {"top_k": 5}])
                serve(*given, float8_inputs=True)
        elif name == "ranks":
            from engine.ops import device_parallel

            device_parallel.GATHER_BYTES = 1 << 12  # steps are small here
            for size, architecture in ((2, "LlamaForCausalLM"), (4, "LlamaForCausalLM"), (2, "Qwen3MoeForCausalLM")):
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                config |= {"num_attention_heads": 8, "num_key_value_heads": 4}
                title = f"{size} ranks of {architecture}"
                serve(title, config, "auto", "bfloat16", "auto", [{}, {"top_p": 0.9}], ranks=size, timed=True)
                torch.distributed.destroy_process_group()
        elif name == "experts":  # of codes
            for architecture, forms in CODED_EXPERTS.items():
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                if forms is None:  # as it is published
                    config["quantization_config"] = {"quant_method": "mxfp4"}
                name = f"{architecture} {'mxfp4' if forms is None else ', '.join(forms)}"
                way = "torch" if architecture in TORCH_ATTENTION else "auto"
                with contextlib.nullcontext() if forms is None else weights_of_codes(*forms):
                    serve(name, config, way, "bfloat16", "auto", [{}, {"top_k": 5}], timed=True)
        else:
            shape, rows, draw = name.split(":")
            count(shape, SHAPES[shape], int(rows), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
