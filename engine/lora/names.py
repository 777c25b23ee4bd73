"""Which of our layers a tensor of an adapter is for: names as peft writes them, modules as transformers has them.

Our places (models/loading/adapted.py) have the names of checkpoints. transformers' modules have the same ones for the
most part; wrappers stand before them, and mixtures of experts are gathered into stacks.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from engine.models.loading.adapted import AdaptedLayers, Place
from engine.models.loading.weights import OUTPUT
from engine.models.mixers import GroupedQueryAttention
from engine.models.parts.source import PREFIX
from engine.models.spec import Dense, DenseAndExperts, Experts

# Ends of tensor names, and what the tensor is of its module. The adapter's own name may stand in it, too.
ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "looked-up down",
    ".lora_embedding_B": "looked-up up",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".base_layer.weight": "copy",
    ".base_layer.bias": "bias",
    ".modules_to_save.weight": "weight",
    ".modules_to_save.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}
_DEFAULT = re.compile(r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save)\.default\b")
_BEFORE = "base_model.model."
# What stands before the layers' own names, in whichever number and order.
_WRAPPERS = (
    "model",
    "language_model",
    "text_model",
    "transformer",
    "backbone",
    "gpt_neox",
    "decoder",
    "thinker",
    "bert",
    "roberta",
    "distilbert",
    "new",
    "nomic_bert",
)
_EMBEDDING = re.compile(r"(embed_tokens|embeddings|word_embeddings|embed_in|wte|tok_embeddings)$")
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_QUERIES = ("q_proj", "k_proj", "v_proj")
_FUSED_QKV = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")
_RESULTS = ("o_proj", "out_proj", "dense", "c_proj")
# How transformers calls layers, whatever a checkpoint calls them.
_LAYERS = re.compile(r"layers\.(\d{1,6})\.(.*)", re.DOTALL)
# What output layers are called.
OUTPUTS = ("lm_head", "embed_out", "output", "cls.predictions.decoder")


def parse(name: str) -> tuple[str, str] | None:
    """A tensor's name -> its module's path in transformers' model, and one of ENDS' values; None for none of them."""
    name = _DEFAULT.sub(r".\1", name)
    for end, kind in ENDS.items():
        if name.endswith(end):
            return name.removesuffix(end).removeprefix(_BEFORE).removeprefix(_BEFORE), kind
    return None


@dataclass(frozen=True, slots=True)
class Stack:
    """All experts of a layer in one module. gate_up, down: the places of each expert's projections; where a module has
    only one of them, the other is empty. parameters: their names in the module."""

    count: int
    gate_up: tuple[tuple[Place, ...], ...]
    down: tuple[tuple[Place, ...], ...]
    parameters: tuple[str, str]


class Resolver:
    """Places by the paths of modules."""

    def __init__(self, layers: AdaptedLayers) -> None:
        self._spec = layers.spec
        self._places = layers.places
        self._tails = {name.removeprefix(PREFIX): place for name, place in layers.places.items()}
        pattern = re.escape(self._spec.layer_names).replace(r"\{\}", r"(\d{1,6})")
        self._layer = re.compile(pattern + "(.*)", re.DOTALL)
        self._embedding = self._spec.embedding.tokens

    def find(self, path: str) -> Place | None:
        """The place of a module; None where the model has none of that name."""
        for tail in self._candidates(path):
            if tail in self._tails:
                return self._tails[tail]
        for tail in self._candidates(path):
            match = self._layer.fullmatch(tail) or _LAYERS.fullmatch(tail)
            if match is not None and int(match[1]) < self._spec.num_layers:
                found = self._by_role(self._spec.layer_names.format(match[1]), int(match[1]), match[2])
                if found is not None:
                    return found
        return None

    def _by_role(self, prefix: str, index: int, name: str) -> Place | None:
        """Of a module in a layer that transformers splits or joins where the checkpoint does not."""
        layer = self._spec.layers[index]
        root, last = name.split(".")[0], name.split(".")[-1]
        mixer, forward = layer.mixer, layer.feed_forward
        if isinstance(mixer, GroupedQueryAttention) and "att" in root:
            if last in _RESULTS:
                return self._tails.get(prefix + mixer.output)
            kv_heads = mixer.num_kv_heads if mixer.reads is None else 0
            value_dim = mixer.value_dim or mixer.head_dim
            rows = [mixer.num_heads * mixer.head_dim, kv_heads * mixer.head_dim, kv_heads * value_dim]
            plain = not (mixer.gated_queries or mixer.heads_together or mixer.values_of_keys)
            return self._part(prefix, mixer.qkv, rows, last, _QUERIES, _FUSED_QKV) if plain else None
        if isinstance(forward, Dense) and name.count(".") == 1:
            names = ("up_proj", "gate_proj") if forward.up_first else ("gate_proj", "up_proj")
            if last == "down_proj":
                return self._tails.get(prefix + forward.down)
            rows = [forward.intermediate_size] * 2
            return self._part(prefix, forward.gate_up, rows, last, names, ("gate_up_proj",))
        return None

    def _part(
        self,
        prefix: str,
        ours: tuple[str, ...],
        rows: list[int],
        name: str,
        parts: tuple[str, ...],
        whole: tuple[str, ...],
    ) -> Place | None:
        """One of `parts` in what is joined in `ours`, or all of them together where they are apart there."""
        places = [self._tails.get(prefix + each) for each in ours]
        first = places[0]
        if first is None or any(each is None or each.site != first.site for each in places):
            return None
        if name in whole and len(ours) == len(parts):
            return dataclasses.replace(first, count=sum(rows))
        if name not in parts:
            return None
        at = parts.index(name)
        if len(ours) == len(parts):
            return places[at]
        return (
            dataclasses.replace(first, first=first.first + sum(rows[:at]), count=rows[at]) if len(ours) == 1 else None
        )

    def stack(self, path: str) -> Stack | None:
        """The experts of a layer that a module holds together; None where it does not."""
        inner = path.removesuffix(".base_layer")
        for tail in self._candidates(inner):
            match = self._layer.fullmatch(tail)
            experts = self._experts(int(match[1])) if match is not None else None
            if match is None or experts is None:
                continue
            name = match[2]
            prefix = self._spec.layer_names.format(match[1])
            for place, templates in enumerate((experts.gate_up, (experts.down,))):
                if any(name == each.replace(".{}", "") for each in templates):
                    own = self._of_experts(prefix, experts, templates)
                    first, second = (own, ()) if place == 0 else ((), own)
                    return Stack(experts.num_experts, first, second, ("weight", "weight"))
            roots = {each.split(".{}")[0] for each in (*experts.gate_up, experts.down)}
            if name in roots or (name.split(".")[-1] == "experts" and name.count(".") == 1):
                first, second = (self._of_experts(prefix, experts, each) for each in (experts.gate_up, (experts.down,)))
                return Stack(
                    experts.num_experts, first, second, ("gate_up_proj" if experts.gated else "up_proj", "down_proj")
                )
        return None

    def is_known_layer(self, path: str) -> bool:
        """Whether it is of a layer that the model has."""
        found = [self._layer.fullmatch(tail) for tail in self._candidates(path)]
        return any(match is not None and int(match[1]) < self._spec.num_layers for match in found)

    def _candidates(self, path: str) -> list[str]:
        """Names that a module may have here, without `model.`."""
        tails = [path]
        while (first := tails[-1].split(".", 1))[0] in _WRAPPERS and len(first) == 2:
            tails.append(first[1])
        found = []
        for tail in tails:
            found.append(tail)
            if _EMBEDDING.fullmatch(tail.removeprefix("embeddings.")):
                found.append(self._embedding)
            if tail in OUTPUTS:
                found.append(OUTPUT)
            match = self._layer.fullmatch(tail)
            if match is not None and int(match[1]) < self._spec.num_layers:
                found += self._other_names(self._spec.layer_names.format(match[1]), int(match[1]), match[2])
        return found

    def _other_names(self, prefix: str, index: int, name: str) -> list[str]:
        """Of a module in a layer: where its mixture of experts has another name in the checkpoint."""
        experts = self._experts(index)
        if experts is None:
            return []
        root, _, rest = name.partition(".")
        own = {each.split(".")[0] for each in (experts.router.name, *experts.gate_up)}
        found = [f"{prefix}{each}.{rest}" for each in sorted(own) if rest and each != root]
        shared, inner = experts.shared, rest.split(".")
        if shared is not None and inner[0] in _SHARED:
            found.append(f"{prefix}{shared.down.rpartition('.')[0]}.{'.'.join(inner[1:])}")
        if rest in ("gate", "router", "gate.wg", "router.layer", "router.classifier", "gate.linear"):
            found.append(prefix + experts.router.name)
        return found

    def _experts(self, index: int) -> Experts | None:
        if index >= self._spec.num_layers:
            return None
        forward = self._spec.layers[index].feed_forward
        forward = forward.experts if isinstance(forward, DenseAndExperts) else forward
        return forward if isinstance(forward, Experts) else None

    def _of_experts(self, prefix: str, experts: Experts, templates: tuple[str, ...]) -> tuple[tuple[Place, ...], ...]:
        return tuple(
            tuple(self._tails[prefix + each.format(number)] for each in templates)
            for number in range(experts.num_experts)
        )
