"""The layers that checkpoints bring to guess a second token (multi-token prediction), as a head of HiddenDrafts.

DeepSeek V3 and GLM-4.5 keep them as layers past the last, MiMo-7B, Qwen3-Next and Qwen 3.5 beside the layers. The first
of them drafts; what it gives is what it reads for the next draft. Embedding and output layer are the model's. Read at
start; run by the executor's thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.gguf.reader import is_gguf
from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.finding import are_equal, find_model_tensors
from engine.models.loading.weights import OUTPUT_WEIGHT, CheckpointWeights, recorded
from engine.models.parts.decoder import Layer, embedding_name, layer_attention
from engine.models.parts.norm import Norm, make_norm
from engine.models.parts.rope import rope_table
from engine.models.parts.source import PREFIX, Source
from engine.models.spec import LayerSpec, ModelSpec
from engine.ops.attention.base import AttentionBackend, AttentionSpec
from engine.ops.linear import Linear
from engine.ops.norm import plain
from engine.speculation import eagle3

# In ModelSpec.outside: the family keeps such a layer there.
QWEN = "mtp.layers.0."


@dataclass(frozen=True, slots=True)
class MtpLayout:
    """How such a layer stands in a checkpoint. prefix: of all its tensors. layer: of its decoder layer, after that.
    join: what makes one vector of two. hidden_first: of those two, the hidden state comes before the embedding.
    zero_first: at the first position nothing stands for the embedding."""

    prefix: str
    join: str
    embedding_norm: str
    hidden_norm: str
    final_norm: str
    output: str | None = None
    embedding: str | None = None
    hidden_first: bool = False
    zero_first: bool = True
    layer: str = ""


def mtp_layout(spec: ModelSpec) -> MtpLayout | None:
    """None for a model that brings no such layer, or one that is not read."""
    past = f"layers.{spec.num_layers}."
    if past in spec.outside:
        return MtpLayout(
            *(PREFIX + past, "eh_proj", "enorm", "hnorm", "shared_head.norm"),
            output="shared_head.head.weight",
            embedding="embed_tokens.weight",
        )
    if "mtp_layers." in spec.outside:
        names = (f"{PREFIX}mtp_layers.0.", "input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm")
        return MtpLayout(*names, hidden_first=True)
    if QWEN in spec.outside:
        names = ("mtp.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        return MtpLayout(*names, embedding="embed_tokens.weight", zero_first=False, layer="layers.0.")
    return None


class Target(eagle3.Target, Protocol):
    """The model that such a layer drafts for."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See Decoder."""
        ...


class MtpHead:
    """A Head, see hidden.py. own: which of output layer and embedding it has of its own."""

    # It reads what the model's output layer reads.
    aux_layers: tuple[int, ...] = ()

    def __init__(
        self,
        spec: ModelSpec,
        layout: MtpLayout,
        source: Source,
        target: Target,
        own: Mapping[str, str],
        max_model_len: int,
    ) -> None:
        layer, hidden, prefix = _drafting_layer(spec), spec.hidden_size, layout.prefix
        assert spec.final_norm is not None and layer.paged is not None
        self._target = target
        self.width = hidden
        self.linears, self.mixtures = source.linears, source.mixtures
        self._hidden_first, self._zero_first = layout.hidden_first, layout.zero_first

        def norm(name: str) -> Norm:
            assert spec.final_norm is not None
            return make_norm(dataclasses.replace(spec.final_norm, name=name), source, prefix, hidden)

        self.attention_spec = AttentionSpec((layer_attention(layer.paged),))
        self._embedding_norm, self._hidden_norm = norm(layout.embedding_norm), norm(layout.hidden_norm)
        self._join = source.linear([prefix + layout.join], [hidden], 2 * hidden)
        self._layer = Layer(layer, source, 0, prefix + layout.layer, hidden)
        self._norm = norm(layout.final_norm)
        self._output: Linear | None = None
        if "output" in own:
            self._output = source.linear([own["output"].removesuffix(".weight")], [spec.vocab_size], hidden)
        self._embedding = source.embedding(own["embedding"], spec.vocab_size, hidden) if "embedding" in own else None
        self._table = None
        if layer.paged.rope is not None:
            self._table = rope_table(layer.paged.rope, spec.max_position_embeddings, max_model_len, source.device)

    def fuse(self, hidden: Tensor, aux: list[Tensor]) -> Tensor:
        """See Head."""
        return hidden

    def forward(self, token_ids: Tensor, hidden: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See Head."""
        embedded = self._target.embedded(token_ids) if self._embedding is None else self._embedding.rows(token_ids)
        if self._zero_first:
            # As it was trained: at the first position there is no token before.
            embedded = embedded.masked_fill((positions == 0)[:, None], 0.0)
        pair = [self._embedding_norm(embedded), self._hidden_norm(hidden)]
        residual = self._join(torch.cat(pair[::-1] if self._hidden_first else pair, -1))
        layer = self._layer
        assert layer.mlp is not None
        y = layer.attention(layer.input_norm.later(residual), self._table, positions, attention)
        x, residual = layer.mlp_norm.add(y, residual)
        x, _ = self._norm.add(layer.mlp(x), residual)
        return plain(x)

    def use(self, target: Target) -> None:
        """See Head."""
        self._target = target

    def tokens(self, hidden: Tensor) -> Tensor:
        """See Head."""
        logits = self._target.logits(hidden) if self._output is None else self._output(hidden)
        return logits.argmax(-1)


def _drafting_layer(spec: ModelSpec) -> LayerSpec:
    """Such a layer is like the model's last, or like the last that attends."""
    return next((layer for layer in reversed(spec.layers) if layer.paged is not None), spec.layers[-1])


def check_mtp(spec: ModelSpec, directory: Path) -> MtpLayout:
    """Raises StartupError where nothing can draft."""
    layout = mtp_layout(spec)
    if layout is None:
        raise StartupError(
            f"speculative decoding (mtp) cannot be used with {spec.architecture}: config.json tells of no layer that "
            "drafts, or of one whose layout is not read (those past the last layer, MiMo's and Qwen's are)"
        )
    if is_gguf(directory):
        raise StartupError(f"{directory}: speculative decoding (mtp) needs a directory in HF format, not a GGUF file")
    layer = _drafting_layer(spec)
    ends = (layer.mixer_out_norm, layer.feed_forward_out_norm, layer.end_scale, spec.layer_input)
    plain_layer = layer.paged is layer.mixer and layer.feed_forward is not None and not layer.parallel
    plain_layer = plain_layer and not layer.post_norm and layer.residual_scale == 1.0 and ends == (None,) * len(ends)
    if not plain_layer or spec.embedding_scale != 1.0 or spec.final_norm is None:
        raise StartupError(f"speculative decoding (mtp) cannot be used with {spec.architecture}: its layers have more")
    return layout


CPU = torch.device("cpu")


def load_mtp(
    directory: Path,
    target: Target,
    dtype: torch.dtype,
    max_model_len: int,
    device: torch.device = CPU,
    layers: tuple[LayerSpec, ...] | None = None,
) -> MtpHead:
    """layers: the model's, whole, where the target has a rank's part of them. Raises StartupError: one line with the
    file, the tensor and what was expected."""
    spec = target.config if layers is None else dataclasses.replace(target.config, layers=layers)
    layout = check_mtp(spec, directory)
    prefix = layout.prefix
    drafting = prefix.removeprefix(PREFIX)
    others = tuple(each for each in spec.outside if not each.startswith(drafting) and each != "mtp_layers.")
    # As if it were one more layer: its experts stand as the others' do.
    wider = dataclasses.replace(spec, layers=(*spec.layers, _drafting_layer(spec)), outside=others)
    beside = (prefix + layout.layer, f"{PREFIX}layers.{spec.num_layers}.") if layout.layer else None
    stored = find_model_tensors(directory, wider, beside)
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    if not tensors:
        raise StartupError(f"{directory}: the checkpoint has none of the tensors of the layer that drafts ({prefix}*)")
    own = _own(layout, prefix, stored, spec, dtype)
    for name in (layout.output, layout.embedding):
        if name is not None and prefix + name not in own.values():
            tensors.pop(prefix + name, None)
    shapes, _ = recorded(lambda source: MtpHead(spec, layout, source, target, own, max_model_len), dtype)
    with CheckpointWeights(dtype, device, directory, tensors, shapes) as weights:
        return MtpHead(spec, layout, weights, target, own, max_model_len)


def _own(
    layout: MtpLayout, prefix: str, stored: dict[str, StoredTensor], spec: ModelSpec, dtype: torch.dtype
) -> dict[str, str]:
    """Names of the output layer and embedding that are not copies of the model's, which most checkpoints have."""
    embedding = embedding_name(spec)
    models = {"output": stored.get(OUTPUT_WEIGHT, stored.get(embedding)), "embedding": stored.get(embedding)}
    own = {}
    for what, name in (("output", layout.output), ("embedding", layout.embedding)):
        copy = None if name is None else stored.get(prefix + name)
        other = models[what]
        if copy is not None and (other is None or not are_equal(copy, other, dtype)):
            own[what] = f"{prefix}{name}"
    return own
