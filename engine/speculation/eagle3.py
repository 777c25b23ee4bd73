"""EAGLE-3 heads: `LlamaForCausalLMEagle3` as its authors and SGLang write it, and the layout of `speculators`.

One layer over three of the target's hidden states and the next token's embedding, with a vocabulary of its own, a part
of the target's (Li et al. 2025). Read at start; run by the executor's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.families import llama
from engine.models.fields import Fields
from engine.models.loading.checkpoint import StoredTensor, find_tensors, read_integers
from engine.models.loading.weights import CheckpointWeights, recorded
from engine.models.mixers import GroupedQueryAttention, NormSpec
from engine.models.parts.attention import Attention
from engine.models.parts.dense import make_mlp
from engine.models.parts.norm import Norm, make_norm
from engine.models.parts.rope import rope_table
from engine.models.parts.source import Source
from engine.models.spec import Dense, ModelSpec
from engine.ops.attention.base import AttentionBackend, AttentionSpec, LayerAttention
from engine.ops.linear import computed
from engine.ops.norm import plain

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")


@dataclass(frozen=True, slots=True)
class Eagle3Spec:
    """What config.json says. llama: of the layer. aux_layers: the target's layers before which it reads the stream."""

    llama: ModelSpec
    eps: float
    draft_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...]
    norm_before_residual: bool
    norm_output: bool
    norm_before_fc: bool
    fc_norm: bool


def read_eagle3(directory: Path, target: ModelSpec) -> Eagle3Spec:
    """Raises StartupError for what is not this layout, or is made for another model."""
    path = directory / "config.json"
    whole = Fields.read(path)
    is_speculators = whole.has("speculators_model_type")
    if is_speculators and whole.raw("speculators_model_type") != "eagle3":
        whole.fail("speculators_model_type", f"must be 'eagle3', not {whole.raw('speculators_model_type')!r:.40}")
    names = whole.raw("architectures")
    if not is_speculators and not (isinstance(names, list) and names and names[0] in ARCHITECTURES):
        shown = names[0] if isinstance(names, list) and names else names
        raise StartupError(f"{path}: architecture {shown!r:.60} is not EAGLE-3's ({ARCHITECTURES[0]})")
    inner = whole.nested("transformer_layer_config") if is_speculators else whole
    if inner is None:
        whole.fail("transformer_layer_config", "is missing")
    fields = inner.over(llama.DEFAULTS)
    layers = fields.integer("num_hidden_layers", 1)
    if layers != 1:
        fields.fail("num_hidden_layers", f"({layers}) must be 1 in an EAGLE-3 head")
    spec = llama.read_spec(fields)
    hidden = whole.integer("target_hidden_size", target.hidden_size)
    if hidden != target.hidden_size:
        whole.fail("target_hidden_size", f"({hidden}) is not the model's hidden size ({target.hidden_size})")
    if not whole.has("target_hidden_size") and spec.hidden_size != target.hidden_size:
        fields.fail("hidden_size", f"({spec.hidden_size}) is not the model's ({target.hidden_size})")
    if spec.vocab_size != target.vocab_size:
        fields.fail("vocab_size", f"({spec.vocab_size}) is not the model's ({target.vocab_size})")
    count = target.num_layers
    own = whole.nested("eagle_config") or whole
    given = next((each for each in (whole, own) if each.has("eagle_aux_hidden_state_layer_ids")), None)
    if given is None:
        aux: tuple[int, ...] = (2, count // 2, count - 3)
        if count < 6:  # the default of so few layers would not rise
            aux = tuple(sorted(max(0, index) for index in aux))
    else:
        aux = given.integers("eagle_aux_hidden_state_layer_ids")
        # Two conventions are about: ids that begin with 1 are of outputs, which are the next layer's inputs.
        if aux and aux[0] == 1:
            aux = tuple(index + 1 for index in aux)
    if not aux or any(not 0 <= index <= count for index in aux):
        whole.fail(
            "eagle_aux_hidden_state_layer_ids", f"({list(aux)}) must name layers of the model, which has {count}"
        )
    return Eagle3Spec(
        llama=spec,
        eps=fields.number("rms_norm_eps", minimum=0.0, maximum=1.0),
        draft_vocab_size=whole.integer("draft_vocab_size", spec.vocab_size),
        target_hidden_size=hidden,
        aux_layers=aux,
        norm_before_residual=whole.flag("norm_before_residual", is_speculators),
        norm_output=whole.flag("norm_output"),
        norm_before_fc=whole.flag("norm_before_fc"),
        fc_norm=whole.flag("fc_norm"),
    )


class Target(Protocol):
    """The model that a head drafts for."""

    @property
    def config(self) -> ModelSpec: ...

    def embedded(self, token_ids: Tensor) -> Tensor:
        """int32 [T] -> [T, hidden_size]: rows of the embedding."""
        ...


class Eagle3Head:
    """A Head, see hidden.py."""

    def __init__(
        self, spec: Eagle3Spec, source: Source, target: Target, names: Mapping[str, str], max_model_len: int
    ) -> None:
        layer, hidden = spec.llama.layers[0], spec.llama.hidden_size
        attention, mlp = layer.mixer, layer.feed_forward
        assert isinstance(attention, GroupedQueryAttention) and isinstance(mlp, Dense)
        self.aux_layers = spec.aux_layers
        self.attention_spec = AttentionSpec(
            (
                LayerAttention(
                    attention.num_heads,
                    attention.num_kv_heads,
                    attention.head_dim,
                    attention.head_dim,
                    attention.scale,
                ),
            )
        )
        self._spec, self._target = spec, target
        self.width = hidden
        self.linears, self.mixtures = source.linears, source.mixtures
        prefix = names["layer"]

        def norm(name: str, width: int = hidden) -> Norm:
            return make_norm(NormSpec(name, spec.eps), source, "", width)

        count, width = len(spec.aux_layers), spec.target_hidden_size
        self._fc = source.linear(["fc"], [hidden], count * width)
        self._before_fc = norm("input_norm", count * width) if spec.norm_before_fc else None
        self._aux_norms = [norm(f"fc_norm.{index}", width) for index in range(count)] if spec.fc_norm else []
        self._embedding = (
            source.embedding("embed_tokens.weight", spec.llama.vocab_size, hidden) if names["own"] else None
        )
        self._input_norm, self._hidden_norm = norm(f"{prefix}input_layernorm"), norm(f"{prefix}hidden_norm")
        self._attention = Attention(attention, source, 0, prefix, hidden, input_size=2 * hidden)
        self._post_norm = norm(f"{prefix}post_attention_layernorm")
        self._mlp = make_mlp(mlp, source, prefix, hidden)
        self._norm = norm("norm")
        self._lm_head = source.linear(["lm_head"], [spec.draft_vocab_size], hidden)
        self._table = None
        if attention.rope is not None:
            self._table = rope_table(attention.rope, spec.llama.max_position_embeddings, max_model_len, source.device)
        # Ids of the target's vocabulary.
        self.target_ids: Tensor = torch.arange(spec.draft_vocab_size)

    def fuse(self, hidden: Tensor, aux: list[Tensor]) -> Tensor:
        """See Head."""
        if self._aux_norms:
            aux = [norm(each) for norm, each in zip(self._aux_norms, aux, strict=True)]
        x = torch.cat(aux, -1)
        if self._before_fc is not None:
            x = self._before_fc(x)
        return self._fc(x)

    def forward(self, token_ids: Tensor, hidden: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See Head."""
        embedded = self._target.embedded(token_ids) if self._embedding is None else self._embedding.rows(token_ids)
        normed = self._hidden_norm(hidden)
        residual = normed.clone() if self._spec.norm_before_residual else hidden.clone()
        joined = torch.cat([self._input_norm(embedded), normed], -1)
        y = self._attention(joined, self._table, positions, attention)
        x, residual = self._post_norm.add(y, residual)
        out = residual.add_(computed(self._mlp(plain(x))))
        return self._norm(out) if self._spec.norm_output else out

    def use(self, target: Target) -> None:
        """See Head."""
        self._target = target

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> float32 [R, draft_vocab_size]."""
        return self._lm_head(hidden if self._spec.norm_output else self._norm(hidden)).float()

    def tokens(self, hidden: Tensor) -> Tensor:
        """See Head."""
        return self.target_ids[self.logits(hidden).argmax(-1)]


CPU = torch.device("cpu")


def load_eagle3(
    directory: Path, target: Target, dtype: torch.dtype, max_model_len: int, device: torch.device = CPU
) -> Eagle3Head:
    """Raises StartupError: one line with the file, the tensor and what was expected."""
    spec = read_eagle3(directory, target.config)
    stored: dict[str, StoredTensor] = {
        name.removeprefix("model."): tensor for name, tensor in find_tensors(directory).items()
    }
    d2t = stored.pop("d2t", None)
    stored.pop("t2d", None)
    prefix = "layers.0." if any(name.startswith("layers.0.") for name in stored) else "midlayer."
    names = {"layer": prefix, "own": "embed_tokens.weight" if "embed_tokens.weight" in stored else ""}
    if not names["own"] and spec.llama.hidden_size != target.config.hidden_size:
        raise StartupError(f"{directory}: tensor embed_tokens.weight is missing, and the model's is of another width")
    shapes, _ = recorded(lambda source: Eagle3Head(spec, source, target, names, max_model_len), dtype)
    with CheckpointWeights(dtype, device, directory, stored, shapes) as weights:
        head = Eagle3Head(spec, weights, target, names, max_model_len)
    head.target_ids = _target_ids(directory, d2t, spec).to(device)
    return head


def _target_ids(directory: Path, d2t: StoredTensor | None, spec: Eagle3Spec) -> Tensor:
    size, vocab = spec.draft_vocab_size, spec.llama.vocab_size
    own = torch.arange(size)
    if d2t is None:
        if size != vocab:
            raise StartupError(
                f"{directory}: tensor d2t [{size}] is missing: the draft vocabulary has {size} of {vocab}"
            )
        return own
    if d2t.shape != (size,) or d2t.dtype not in ("I64", "I32"):
        raise StartupError(
            f"{d2t.file}: tensor d2t has shape {list(d2t.shape)} and dtype {d2t.dtype}, expected [{size}] and I64"
        )
    found = own + torch.tensor(read_integers(d2t))
    if bool(((found < 0) | (found >= vocab)).any()):
        raise StartupError(f"{d2t.file}: tensor d2t names tokens that the model lacks, expected ids below {vocab}")
    return found
