"""`python -m tests.models.table` prints the README's table of what is served: classes of config.json by what their
layers are, each with a comparison in the tests of this folder. test_table.py holds the README against it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from engine.models.families.wrappers import WRAPPERS
from engine.models.mixers import LatentAttention
from engine.models.registry import CLASSES, ENCODERS, read_spec
from engine.models.spec import DenseAndExperts, Experts, ModelSpec
from tests.models import test_encoders, test_families, test_latent, test_llama4, test_wrappers

KINDS = ("dense", "experts", "latent attention", "recurrent state", "encoders", "text of image models")
# Where a class leaves out what a model must have.
SIZES: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "GraniteMoeHybridForCausalLM": {"num_hidden_layers": 1, "layer_types": ["mamba"], "mamba_n_heads": 64},
    "Lfm2ForCausalLM": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "NemotronHForCausalLM": {"num_hidden_layers": 2, "hybrid_override_pattern": "M*"},
}


def kind_of(spec: ModelSpec) -> str:
    """One of KINDS but for the last."""
    if spec.bidirectional:
        return "encoders"
    if any(layer.state for layer in spec.layers):
        return "recurrent state"
    if any(isinstance(layer.mixer, LatentAttention) for layer in spec.layers):
        return "latent attention"
    experts = any(isinstance(layer.feed_forward, Experts | DenseAndExperts) for layer in spec.layers)
    return "experts" if experts else "dense"


def read(architecture: str) -> ModelSpec:
    """The spec of a config.json that names the class, and of sizes as little as it may."""
    with tempfile.TemporaryDirectory() as directory:
        values = {"architectures": [architecture], **SIZES.get(architecture, {})}
        (Path(directory) / "config.json").write_text(json.dumps(values))
        return read_spec(Path(directory))


def rows() -> dict[str, list[str]]:
    """The classes of every kind, without what all their names end in."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for architecture in CLASSES:
        found[kind_of(read(architecture))].append(architecture.removesuffix("ForCausalLM"))
    found["encoders"] += ENCODERS
    found["text of image models"] += (wrapper.name for wrapper in WRAPPERS.values())
    return found


def compared() -> set[str]:
    """Those that a test of this folder compares with transformers."""
    names = {family for family, _ in (*test_families.FAMILIES.values(), *test_latent.FAMILIES.values())}
    names |= {family.removesuffix("Model") for family, _ in test_encoders.ENCODERS.values()}
    names |= {family for family, *_ in test_wrappers.CASES.values()} | set(test_families.OTHERS)
    return names | ({"Llama4"} if test_llama4.CASES else set()) | {"GptOss"}  # test_gpt_oss.py


def table() -> str:
    """Markdown."""
    lines = ["| layers | classes |", "|---|---|"]
    lines += [f"| {kind} | {', '.join(sorted(names, key=str.lower))} |" for kind, names in rows().items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
