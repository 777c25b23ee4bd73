"""EAGLE-3 heads of both layouts: their drafts are those of the formulas, computed anew over the whole text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import StartupError
from engine.forward import Limits
from engine.models.parts.decoder import Decoder
from engine.speculation.eagle3 import Eagle3Head, load_eagle3
from engine.speculation.hidden import HiddenDrafts
from engine.speculation.paged import LateProposer, PagedCache
from engine.speculation.prediction import Prediction
from tests.executor.cpu_adapter import _models
from tests.executor.test_speculation import PROBES, VOCAB, Script, model_of, plain

HIDDEN, WIDTH, HEADS, KV_HEADS, DIM, INNER, DRAFT_VOCAB = 40, 48, 4, 2, 10, 56, 97
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "target_hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT_VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}
AUX = [0, 1, 2]


def write_head(directory: Path, layout: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A random head; returns its config and its tensors by their names in the first layout."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "fc.weight": (HIDDEN, 3 * WIDTH),
        "embed_tokens.weight": (VOCAB, HIDDEN),
        "midlayer.self_attn.q_proj.weight": (HEADS * DIM, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": (KV_HEADS * DIM, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": (KV_HEADS * DIM, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        "midlayer.mlp.gate_proj.weight": (INNER, HIDDEN),
        "midlayer.mlp.up_proj.weight": (INNER, HIDDEN),
        "midlayer.mlp.down_proj.weight": (HIDDEN, INNER),
        "lm_head.weight": (DRAFT_VOCAB, HIDDEN),
    }
    tensors = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(HIDDEN, generator=generator)
    ids = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    tensors["d2t"] = ids - torch.arange(DRAFT_VOCAB)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
    config = {**CONFIG, "eagle_aux_hidden_state_layer_ids": AUX, **changes}
    stored = tensors
    written = config
    if layout == "speculators":
        inner = {name: value for name, value in config.items() if "draft_vocab" not in name and "target" not in name}
        names = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids", "norm_before_residual")
        written = {name: config[name] for name in names if name in config}
        written |= {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"]}
        written["transformer_layer_config"] = inner
        stored = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(written))
    save_file(stored, directory / "model.safetensors")
    return config, tensors


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def turned(x: Tensor) -> Tensor:
    """[T, heads, DIM], turned by positions 0, 1, ..."""
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def expected_drafts(
    w: dict[str, Tensor], aux: list[Tensor], tokens: list[int], count: int, *, norm_before_residual: bool
) -> list[int]:
    """By the formulas, over the whole text at once. aux: of all tokens but the last."""
    hidden = torch.cat(aux, -1) @ w["fc.weight"].T
    following, drafts = list(tokens[1:]), list[int]()
    for _ in range(count):
        embedded = w["embed_tokens.weight"][following]
        normed = rms(hidden, w["midlayer.hidden_norm.weight"])
        x = torch.cat((rms(embedded, w["midlayer.input_layernorm.weight"]), normed), -1)
        q, k, v = (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k = turned(q.view(-1, HEADS, DIM)), turned(k.view(-1, KV_HEADS, DIM))
        k, v = (each.view(-1, KV_HEADS, DIM).repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
        scores += torch.full(scores.shape[1:], -torch.inf).triu(1)
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["midlayer.self_attn.o_proj.weight"].T
        residual = (normed if norm_before_residual else hidden) + y
        x = rms(residual, w["midlayer.post_attention_layernorm.weight"])
        gate, up = (x @ w[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        out = residual + (torch.nn.functional.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
        best = int((rms(out[-1], w["norm.weight"]) @ w["lm_head.weight"].T).argmax())
        drafts.append(best + int(w["d2t"][best]))
        hidden, following = torch.cat((hidden, out[-1:])), [*following, drafts[-1]]
    return drafts


class Watched(HiddenDrafts):
    """Notes what it was asked and said."""

    def __init__(self, head: Eagle3Head, cache: PagedCache) -> None:
        super().__init__(head, cache, context=96)
        self.said: list[tuple[list[int], list[int]]] = []

    def propose(self, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        texts = [list(self._slots[slot].text.tokens) for slot in slots]
        found = super().propose(slots, most)
        self.said += zip(texts, found, strict=True)
        return found


@pytest.mark.parametrize(("layout", "before"), [("plain", False), ("plain", True), ("speculators", True)])
async def test_drafts_are_those_of_the_formulas(layout: str, before: bool, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    changes = {} if layout == "speculators" else {"norm_before_residual": before}
    _, tensors = write_head(tmp_path, layout, **changes)
    model, dtype = model_of(torch.float32), torch.float32
    assert isinstance(model, Decoder)
    head = load_eagle3(tmp_path, model, dtype, 96)
    watched: list[Watched] = []

    def make(limits: Limits) -> LateProposer:
        watched.append(Watched(head, PagedCache(head.attention_spec, limits, 0, dtype)))
        return watched[-1]

    group = [0, 1, 3, 7]
    found = await Script(model, dtype, Prediction(), 4, 2, make_late=make).run(group)
    model.aux_layers = ()
    expected = await plain(dtype)
    for index in group:
        assert found[index].seen() == expected[index].seen(), PROBES[index]
    said = [(text, drafts) for text, drafts in watched[0].said if drafts]
    assert len(said) > 20 and any(len(drafts) == 4 for _, drafts in said)
    for text, drafts in said[:: max(1, len(said) // 12)]:
        with torch.inference_mode():
            states = _models()[1](torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
            right = expected_drafts(
                tensors, [states[layer][0] for layer in AUX], text, len(drafts), norm_before_residual=before
            )
        assert drafts == right


def test_bad_heads(tmp_path: Path) -> None:
    model = model_of(torch.float32)
    assert isinstance(model, Decoder)

    def refused(pattern: str, drop: str = "", **changes: Any) -> None:
        _, tensors = write_head(tmp_path / "head", "plain", **changes)
        if drop:
            del tensors[drop]
            save_file(tensors, tmp_path / "head" / "model.safetensors")
        with pytest.raises(StartupError, match=pattern) as caught:
            load_eagle3(tmp_path / "head", model, torch.float32, 96)
        assert "\n" not in str(caught.value)

    refused(r"config\.json: target_hidden_size \(64\) is not the model's hidden size \(48\)", target_hidden_size=64)
    refused(r"config\.json: vocab_size \(99\) is not the model's \(211\)", vocab_size=99)
    refused(r"tensor fc\.weight \[40, 144\] is missing", drop="fc.weight")
    refused(r"tensor d2t \[97\] is missing", drop="d2t")
    refused(r"tensor embed_tokens\.weight is missing", drop="embed_tokens.weight")
    refused(r"tensor lm_head\.weight has shape \[97, 40\], config\.json asks for \[50, 40\]", draft_vocab_size=50)
    refused(re.escape("architecture 'LlamaForCausalLM' is not EAGLE-3's"), architectures=["LlamaForCausalLM"])
    refused(r"eagle_aux_hidden_state_layer_ids .*must name layers", eagle_aux_hidden_state_layer_ids=[2, 7, 30])
