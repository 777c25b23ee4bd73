"""A dry run without a GPU: the executor, the models and the real FlashInfer on CUDA tensors that have no memory.

`python -m tests.cuda.dry SCENARIO...`: run by test_dry_run.py in processes of its own, for it changes torch, Triton and
FlashInfer where they ask for a device. Every operation, launch, copy and plan is noted (dry_device.py); lines of JSON,
behind one that names their scenario, say what would be wrong on a GPU, what a graph holds and which kernels are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.cuda.dry_device import DEVICE, LAUNCHES, LOG, DryDevice, DryMode, without_compiler, without_gpu

# By what is read of checkpoints whose experts are quantised: forms of gate and up, and of down.
CODED_EXPERTS: dict[str, tuple[str, ...] | None] = {
    "GptOssForCausalLM": None,
    "DeepseekV3ForCausalLM": ("e4m3",),
    "Qwen3MoeForCausalLM": ("int4",),
    "MixtralForCausalLM": ("int4 and low", "int8"),
}
DRAFTED: list[dict[str, Any]] = [
    {"max_tokens": 60},
    {"max_tokens": 60, "top_k": 5},
    {"logprobs": 2},
    {"repetition_penalty": 1.3, "bad_words": ((11,), (3, 5))},
]
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
            result["attending"] = sorted({event.name for event in LOG.events[begin:] if "_attend" in event.name})
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
    from tests.gpu.support import BASE, EXTRA, OUR_ATTENTION, families

    llama = {**BASE, "architectures": ["LlamaForCausalLM"]}
    for name in names:
        print(json.dumps({"scenario": name}), flush=True)
        if name == "families":
            for architecture in families():
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                # Those whose layers differ in what their attention sees are tried by both.
                for way in ("auto", "wrapper") if "window" in str(config) else ("auto",):
                    serve(f"{architecture} {way}", config, way, "bfloat16", "auto", [{}, {"top_p": 0.9}])
            for architecture in sorted(OUR_ATTENTION):
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                for kv in ("auto", "fp8"):
                    serve(f"{architecture} ours", config, "torch", "bfloat16", kv, [{}, {"top_p": 0.9}])
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
            for architecture in ("Qwen3_5ForCausalLM", "FalconH1ForCausalLM"):
                config = {**BASE, "architectures": [architecture], **EXTRA.get(architecture, {})}
                serve(f"drafts {architecture}", config, "auto", "bfloat16", "auto", DRAFTED, drafts=True)
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
                way = "torch" if architecture in OUR_ATTENTION else "auto"
                with contextlib.nullcontext() if forms is None else weights_of_codes(*forms):
                    serve(name, config, way, "bfloat16", "auto", [{}, {"top_k": 5}], timed=True)
        else:
            shape, rows, draw = name.split(":")
            count(shape, SHAPES[shape], int(rows), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
