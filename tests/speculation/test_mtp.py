"""Layers that checkpoints bring to draft with: their drafts are those of the formula over transformers' own layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import StartupError
from engine.speculation.hidden import HiddenDrafts
from tests.models.support import make_checkpoint
from tests.speculation.test_start import answers, build, write_tokenizer

LAYERS, WIDTH, VOCAB = 3, 48, 211
_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
_GATED_EXPERTS = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
QWEN = ("mtp.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
# Of each: the class, its sizes, what config.json has beside, and names of the layer and of its parts.
PAST = ("layers.3.", "eh_proj", "enorm", "hnorm", "shared_head.norm")
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "deepseek": (
        "DeepseekV3",
        {
            **_EXPERTS,
            "num_key_value_heads": 6,
            "kv_lora_rank": 20,
            "q_lora_rank": 28,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 10,
        },
        {"num_nextn_predict_layers": 1},
        PAST,
    ),
    "glm": ("Glm4Moe", {**_EXPERTS, "head_dim": 16, "use_qk_norm": True}, {"num_nextn_predict_layers": 1}, PAST),
    "mimo": (
        "Qwen2",
        {},
        {"num_nextn_predict_layers": 1, "architectures": ["MiMoForCausalLM"], "model_type": "mimo"},
        ("mtp_layers.0.", "input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm"),
    ),
    "qwen-next": ("Qwen3Next", {**_DELTA, **_GATED_EXPERTS}, {}, QWEN),
    "qwen": ("Qwen3_5", _DELTA, {"mtp_num_hidden_layers": 1}, QWEN),
    "qwen-moe": ("Qwen3_5Moe", {**_DELTA, **_GATED_EXPERTS}, {"mtp_num_hidden_layers": 1}, QWEN),
}


def write(directory: Path, family: str, *, copies: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A model of one layer more, which the file has as the one that drafts. copies: how it has an output layer and an
    embedding: "equal" to the model's, or its "own". Returns transformers' model and the tensors beside the layer."""
    name, sizes, changes, (prefix, join, *norms) = FAMILIES[family]
    model = make_checkpoint(directory, name, num_hidden_layers=LAYERS + 1, **sizes)
    write_tokenizer(directory, {f"t{index}": index for index in range(VOCAB)})
    generator = torch.Generator().manual_seed(4)
    parts = {join: torch.randn((WIDTH, 2 * WIDTH), generator=generator) * (2 * WIDTH) ** -0.5}
    parts |= {norm: 1 + 0.2 * torch.randn(WIDTH, generator=generator) for norm in norms}
    parts["head"], parts["embedding"] = model.lm_head.weight.detach(), model.model.embed_tokens.weight.detach()
    if copies == "own":
        for part in ("head", "embedding"):
            parts[part] = parts[part] + torch.randn((VOCAB, WIDTH), generator=generator) * 0.3
    layer = f"{prefix}layers.0." if family.startswith("qwen") else f"model.{prefix}"
    stored = {
        key.replace(f"model.layers.{LAYERS}.", layer): tensor
        for key, tensor in load_file(directory / "model.safetensors").items()
    }
    root = prefix if family.startswith("qwen") else layer
    stored |= {f"{root}{part}.weight": parts[part].clone() for part in (join, *norms)}
    if copies:
        stored[f"model.{prefix}shared_head.head.weight"] = parts["head"].clone()
        stored[f"model.{prefix}embed_tokens.weight"] = parts["embedding"].clone()
    save_file(stored, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    for each in ("layer_types", "mlp_layer_types"):
        if each in config:
            config[each] = config[each][:LAYERS]
    config |= {"num_hidden_layers": LAYERS, **changes}
    if name.startswith("Qwen3_5"):
        # As its files are: a model for images, with the text part inside.
        stored = {key.replace("model.", "model.language_model.", 1): tensor for key, tensor in stored.items()}
        save_file({**stored, "model.visual.patch.weight": torch.ones(3)}, directory / "model.safetensors")
        kind = config["model_type"].removesuffix("_text")
        config = {"architectures": [f"{name}ForConditionalGeneration"], "model_type": kind, "text_config": config}
    (directory / "config.json").write_text(json.dumps(config))
    return model, parts


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def expected_drafts(family: str, model: Any, parts: dict[str, Tensor], tokens: list[int], count: int) -> list[int]:
    """By the formula, over the whole text at once."""
    _, join, embedding_norm, hidden_norm, final = FAMILIES[family][3]
    inner, eps, is_qwen = model.model, model.config.rms_norm_eps, family.startswith("qwen")
    # Qwen's norms hold what is added to 1.
    norms = {name: weight + is_qwen for name, weight in parts.items()}
    hidden = inner(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states[LAYERS][0]
    hidden = rms(hidden, inner.norm.weight + is_qwen, eps)
    following, drafts = list(tokens[1:]), list[int]()
    for _ in range(count):
        embedded = parts["embedding"][following].clone()
        if not is_qwen:
            embedded[0] = 0
        pair = [rms(embedded, norms[embedding_norm], eps), rms(hidden, norms[hidden_norm], eps)]
        x = torch.cat(pair[::-1] if family == "mimo" else pair, -1) @ parts[join].T
        positions = torch.arange(len(x))[None]
        mask = torch.full((1, 1, len(x), len(x)), -torch.inf).triu(1)
        out = inner.layers[LAYERS](
            x[None],
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=inner.rotary_emb(x[None], positions),
        )
        out = rms(out[0] if out.dim() == 3 else out, norms[final], eps)
        drafts.append(int((out[-1] @ parts["head"].T).argmax()))
        hidden, following = torch.cat((hidden, out[-1:])), [*following, drafts[-1]]
    return drafts


@pytest.mark.parametrize(
    ("family", "copies", "ranks"),
    [
        ("deepseek", "equal", 1),
        ("deepseek", "equal", 2),
        ("glm", "own", 1),
        ("mimo", "", 1),
        ("mimo", "", 2),
        ("qwen-next", "", 1),
        ("qwen", "", 1),
        ("qwen-moe", "", 1),
        ("qwen-moe", "", 2),
    ],
)
async def test_drafts_are_those_of_the_formula(
    family: str, copies: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ranks: that have a part of the model each, of which the first has the whole layer that drafts."""
    model, parts = write(tmp_path, family, copies=copies)
    expected = await answers(build(tmp_path))
    said: list[tuple[list[int], list[int]]] = []
    propose = HiddenDrafts.propose

    def watched(self: HiddenDrafts, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        texts = [list(self._slots[slot].text.tokens) for slot in slots]
        found = propose(self, slots, most)
        said.extend(zip(texts, found, strict=True))
        return found

    monkeypatch.setattr(HiddenDrafts, "propose", watched)
    built = build(tmp_path, ranks, method="mtp", num_draft_tokens=3, adaptive=False)
    root = "" if family.startswith("qwen") else "model."
    assert dict(built.report.rows)["draft model"].endswith(f", {root}{FAMILIES[family][3][0]}*")
    assert await answers(built) == expected
    drafted = [(text, drafts) for text, drafts in said if drafts]
    assert len(drafted) > 20 and any(len(drafts) == 3 for _, drafts in drafted)
    # Those of prompts that were found in the cache may have been made with another token behind the last page.
    first = drafted[: len(drafted) // 2]
    for text, drafts in first[:: len(first) // 6]:
        with torch.inference_mode():
            assert drafts == expected_drafts(family, model, parts, text, len(drafts))


def test_what_cannot_be(tmp_path: Path) -> None:
    def refused(pattern: str) -> None:
        with pytest.raises(StartupError, match=pattern) as caught:
            build(tmp_path, method="mtp", num_draft_tokens=1)
        assert "\n" not in str(caught.value)

    make_checkpoint(tmp_path, "Llama")
    write_tokenizer(tmp_path, {f"t{index}": index for index in range(VOCAB)})
    refused(r"\(mtp\) cannot be used with LlamaForCausalLM: config.json tells of no layer that drafts")
    write(tmp_path, "glm")
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.3.eh_proj.weight"
    save_file({**stored, name: stored[name][:, 1:].clone()}, tmp_path / "model.safetensors")
    refused(r"tensor model\.layers\.3\.eh_proj\.weight has shape \[48, 95\], config\.json asks for \[48, 96\]")
    save_file({key: each for key, each in stored.items() if key != name}, tmp_path / "model.safetensors")
    refused(r"tensor model\.layers\.3\.eh_proj\.weight \[48, 96\] is missing")
    bare = {key: each for key, each in stored.items() if not key.startswith("model.layers.3.")}
    save_file(bare, tmp_path / "model.safetensors")
    refused(r"has none of the tensors of the layer that drafts \(model\.layers\.3\.\*\)")
