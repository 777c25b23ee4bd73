"""What drafts on the device of a dry run (dry.py): weights that have no numbers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.executor.cuda_drafter import Drafts
from engine.models.loading.weights import DummyWeights, ShapeRecorder
from engine.ops.attention import flashinfer
from engine.ops.attention.device import DeviceAttention
from engine.speculation.eagle3 import Eagle3Head, read_eagle3
from engine.speculation.mtp import MtpHead, mtp_layout
from engine.speculation.nets import HeadNet, ModelNet, Net


def drafts_of(
    method: str,
    model: Any,
    config: dict[str, Any],
    way: str,
    given: dict[str, Any],
    small: Callable[[torch.dtype], Any],
) -> Drafts:
    """method: of SpeculationOptions; drawn: a draft model whose drafts are. given: for an attention backend. small:
    makes a draft model."""
    given = {**given, "kv_dtype": None}
    dtype, device, net = given["dtype"], given["device"], None
    made: Callable[[Any], Any] | None = None
    if method in ("draft_model", "drawn"):
        net = ModelNet(small(dtype), None, device)
    elif method == "eagle3":
        with tempfile.TemporaryDirectory() as folder:
            changes = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 500}
            (Path(folder) / "config.json").write_text(json.dumps({**config, **changes}))
            spec = read_eagle3(Path(folder), model.config)
        made = lambda source: Eagle3Head(spec, source, model, {"layer": "midlayer.", "own": ""}, 1024)  # noqa: E731
    else:
        layout = mtp_layout(model.config)
        assert layout is not None
        made = lambda source: MtpHead(model.config, layout, source, model, {}, 1024)  # noqa: E731
    if made is not None:
        recorder = ShapeRecorder(dtype)
        made(recorder)
        head = made(DummyWeights(dtype, device, 0, recorder.shapes, None))
        if method == "eagle3":
            head.target_ids = head.target_ids.to(device)
        net = HeadNet(head)
    assert net is not None
    own: Net = net

    def by_torch() -> DeviceAttention:
        return DeviceAttention(own.attention_spec, **given)

    latent = own.attention_spec.common is None or way == "torch"
    attention = by_torch() if latent else flashinfer.Backend(own.attention_spec, decode=way, **given)
    return Drafts(own, attention, by_torch, 0, 1024, method == "drawn")
