"""What a model is: sizes, a list of layers and a head, as frozen dataclasses.

Families make one from config.json, loading finds its tensors, parts compute it; executors and the server read it.
Names of tensors are those of the checkpoint, without `.weight` and `.bias`, relative to their layer. Imports no
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.models.mixers import (
    GroupedQueryAttention,
    Mixer,
    NormSpec,
    PagedMixer,
    RopeSpec,
    SideBySide,
    StatefulMixer,
    StateTensor,
)

DTYPES = ("bfloat16", "float16", "float32")

# Of a gate, which then multiplies; and of a feed-forward without one.
GatedActivation = Literal["silu", "gelu_tanh", "gelu"]
PlainActivation = Literal["relu2", "relu", "gelu", "gelu_tanh", "xielu"]
HeadActivation = Literal["none", "tanh", "relu", "gelu", "gelu_tanh", "silu"]


@dataclass(frozen=True, slots=True)
class Dense:
    """down(activation(gate(x)) * up(x)). gate_up: one name where the checkpoint has them fused, else two.

    up_first: so are the fused rows. down_bias: what `bias` does not say of the last product alone. gate_scale,
    down_scale: factors on what gate and down give. sparsity: of a token's gate values, the share below which a normal
    distribution with their mean and deviation has them; those count as 0, and that bound is taken from the others.
    """

    intermediate_size: int
    activation: GatedActivation
    bias: bool = False
    up_first: bool = False
    down_bias: bool = False
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gate_scale: float = 1.0
    down_scale: float = 1.0
    sparsity: float = 0.0

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        return 3 * hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True)
class Ungated:
    """down(activation(up(x))). Of xielu, two numbers are learned: `mlp.act_fn.alpha_p` and `alpha_n`."""

    intermediate_size: int
    activation: PlainActivation
    bias: bool = False
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        return 2 * hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True)
class Router:
    """Which experts a token goes through, and with what share: scores of all experts, the best are chosen.

    score: of an expert's logit. bias: a tensor (its whole name; [experts], or [1, experts] where bias_is_row) that is
    added to the scores for the choice alone. normalize: the shares of a token's chosen experts are made to add up to 1
    (their sum counts as `minimum` at least). groups, groups_chosen: experts stand in so many groups, of which those
    with the best score, or (group_best) the best sum of two, may be chosen from.
    scale: factor on the shares. wide: logits are computed in float32. linear_bias: the projection to logits has one.
    input_scale: the tensor ([hidden]) of a norm of what is rated, times hidden^-0.5; input_eps: its epsilon.
    expert_scale: the tensor ([experts]) of factors on the shares. softcap: c in c * tanh(x / c) on the logits, or None.
    near: the share of an expert is that of a softmax over those not yet chosen whose logits are not further below the
    best one's than that part of the larger of the two; it replaces score and normalize (PhiMoE, arXiv 2409.12136).
    """

    normalize: bool
    name: str = "mlp.gate"
    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: str | None = None
    bias_is_row: bool = False
    wide: bool = False
    linear_bias: bool = False
    groups: int = 1
    groups_chosen: int = 1
    group_best: Literal[1, 2] = 2
    scale: float = 1.0
    minimum: float = 0.0
    input_scale: str | None = None
    input_eps: float = 0.0
    expert_scale: str | None = None
    softcap: float | None = None
    near: float | None = None


@dataclass(frozen=True, slots=True)
class Clamp:
    """An expert's activation: g sigmoid(alpha g) (u + 1), with g at most `limit` and u within it on both sides.

    Rows of gate and up alternate in the one projection that makes them.
    """

    limit: float
    alpha: float


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts, each a Dense (not gated: an Ungated) of its own; a router chooses a few for every token.

    `{}` in a name is the expert's number. stacked: the checkpoint may have all experts of a layer in one tensor, whose
    name lacks the number: as rows ([experts, out, in]) or as columns ([experts, in, out]); where the shape can only be
    the other, it counts. fused: the tensor that may have gate and up of all experts as rows instead, [experts, 2 out,
    in]. shared: what every token goes through beside them. shared_gate: a projection to one number whose sigmoid is the
    share of that. on_input: shares are factors on what experts read, not on what they give. latent_size: experts work
    in a smaller space, to and from which `latent` project (with a bias: latent_bias). bias: each
    projection of an expert has one, and a stacked one is called NAME_bias. clamp: the activation, in place of
    `activation`. mxfp4: the checkpoint has their matrices in four bits (ops/mxfp4.py), in which they stay. held: of
    a rank that has some experts and not others, the first of them and the first behind them; None for all.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    activation: GatedActivation | PlainActivation
    router: Router
    gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    down: str = "mlp.experts.{}.down_proj"
    stacked: Literal["rows", "columns"] | None = None
    fused: str | None = None
    gated: bool = True
    shared: Dense | Ungated | None = None
    shared_gate: str | None = None
    on_input: bool = False
    latent_size: int | None = None
    latent: tuple[str, str] = ("", "")
    latent_bias: bool = False
    bias: bool = False
    clamp: Clamp | None = None
    mxfp4: bool = False
    held: tuple[int, int] | None = None

    @property
    def here(self) -> range:
        """Numbers of the experts that are held."""
        return range(self.num_experts) if self.held is None else range(*self.held)

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        shared = 0 if self.shared is None else self.shared.num_parameters(hidden_size)
        gate = 0 if self.shared_gate is None else hidden_size
        if self.bias:  # of all experts: a matrix
            shared += self.num_experts * (2 * self.intermediate_size + hidden_size)
        inputs, projections = self.latent_size or hidden_size, 2 * hidden_size * (self.latent_size or 0)
        own = self.num_experts * inputs * (3 if self.gated else 2) * self.intermediate_size
        return own + self.num_experts * hidden_size + projections + shared + gate


@dataclass(frozen=True, slots=True)
class DenseAndExperts:
    """dense_out_norm(dense(dense_norm(x))) + experts_out_norm(experts(experts_norm(x))); the router reads x itself."""

    dense: Dense
    experts: Experts
    dense_norm: NormSpec
    dense_out_norm: NormSpec
    experts_norm: NormSpec
    experts_out_norm: NormSpec

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        return self.dense.num_parameters(hidden_size) + self.experts.num_parameters(hidden_size)


FeedForward = Dense | Ungated | Experts | DenseAndExperts


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What every layer adds at its end: norm(projection(activation(gate(x)) * its own `size` numbers of the token)).

    Those are (sqrt(size) table[token] + table_norm(table_projection(embedding) / sqrt(hidden_size))) / sqrt(2), of a
    table [vocab_size, layers * size]. table, table_projection, table_norm: of the model; the others of a layer.
    """

    size: int
    vocab_size: int
    activation: GatedActivation
    norm: NormSpec
    table_norm: NormSpec
    gate: str = "per_layer_input_gate"
    projection: str = "per_layer_projection"
    table: str = "embed_tokens_per_layer"
    table_projection: str = "per_layer_model_projection"


@dataclass(frozen=True, slots=True)
class Streams:
    """Layers pass `count` hidden states of a token on; attention and feed-forward see the `active` one of them.

    rank: of a low-rank path beside attention. router_norm, path_norm: of a layer. scaled: what a layer's own inputs
    are gated by is multiplied by a learned vector.
    """

    count: int
    active: int
    rank: int
    router_norm: NormSpec
    path_norm: NormSpec
    scaled: bool

    def num_parameters(self, num_layers: int, hidden_size: int) -> int:
        """Elements of its matrices in the whole model."""
        layer = hidden_size * (self.count + 2 * self.rank) + self.count**3 + self.count**2
        return num_layers * layer + 2 * (self.count - 1) * hidden_size**2


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """x + out_norm(mixer(norm(x))), then the same with the feed-forward; a norm that is None is not there.

    One of the two may be missing; the norms of a feed-forward alone are those of the mixer that is not there.

    parallel: the feed-forward reads what the mixer reads, or x by its own norm, and both are added at once.
    residual_scale: factor on what is added to x. post_norm: the out norms are of the sums: x = out_norm(x + mixer(x)).
    end_scale: the tensor ([1]) of a factor on what the layer gives.
    """

    mixer: Mixer | None
    feed_forward: FeedForward | None
    mixer_norm: NormSpec | None = None
    mixer_out_norm: NormSpec | None = None
    feed_forward_norm: NormSpec | None = None
    feed_forward_out_norm: NormSpec | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    post_norm: bool = False
    end_scale: str | None = None

    @property
    def paged(self) -> PagedMixer | None:
        """What in it keeps, or reads, keys and values."""
        return next((mixer for mixer in self._mixers if isinstance(mixer, PagedMixer)), None)

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """The tensors of its recurrent state, empty where it has none."""
        return next((mixer.state for mixer in self._mixers if isinstance(mixer, StatefulMixer)), ())

    @property
    def _mixers(self) -> tuple[Mixer | None, ...]:
        return self.mixer.mixers if isinstance(self.mixer, SideBySide) else (self.mixer,)

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        feed_forward = self.feed_forward.num_parameters(hidden_size) if self.feed_forward is not None else 0
        return feed_forward + (self.mixer.num_parameters(hidden_size) if self.mixer is not None else 0)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint is quantised. method: one of loading/schemes/resolve.py. config: the JSON object that says it.

    path, prefix: the file that has it and where in it, for errors.
    """

    method: str
    config: str
    path: str = field(default="", compare=False)
    prefix: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a token begins as: its row of a table; encoders add its position's and its type's, and take a norm of that.

    positions, types: names of their tables, None where there are none. num_positions: rows; those before first_position
    are of no token. num_types: of tokens; all are of the first, but for the second text of a pair.
    """

    tokens: str = "embed_tokens"
    positions: str | None = None
    num_positions: int = 0
    first_position: int = 0
    types: str | None = None
    num_types: int = 0
    norm: NormSpec | None = None

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of the tables of positions and types."""
        return (self.num_positions + self.num_types) * hidden_size


@dataclass(frozen=True, slots=True)
class Projection:
    """norm(activation(weight x + bias)). name: of its tensors, whole; an empty one has no weight."""

    name: str
    size: int
    bias: bool = True
    activation: HeadActivation = "none"
    norm: NormSpec | None = None


@dataclass(frozen=True, slots=True)
class Classifier:
    """A head that gives a number for every label. pooling: what of a text it reads, each of its tokens where it is all.

    late: the mean is taken of what the head gives for every token. labels: their names. steps: one after another.
    activation: what makes shares of the numbers, none where they are the answer.
    """

    pooling: Literal["cls", "last", "mean", "all"]
    labels: tuple[str, ...]
    steps: tuple[Projection, ...]
    activation: Literal["sigmoid", "softmax", "none"]
    late: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model of text: embedding, layers, final norm, output layer.

    layers: equal ones are one object. max_position_embeddings: tokens that it was trained for. dtype: what config.json
    names, bfloat16 where it names none. eos_token_ids: of config.json; where it does not mention them,
    class_eos_token_ids are those of the class. embedding_scale: factor on what the embedding gives. head_bias: the
    output layer has one. logit_scale: factor on logits. logit_softcap: c in c * tanh(x / c), or None. architecture:
    the class, as `architectures` names it. headless: there is no output layer, so hidden states are all it gives.
    assumed: sizes that config.json does not name. outside: what names of tensors begin with (after a `model.` or not)
    that are not read: those of other inputs than text, and of layers that draft. text_only: it was made for other
    inputs, too. quantisation: of its checkpoint, None where there is none. embedding, layer_names: how tensors are
    called; `{}` is the layer's number. classifier: the head in place of an output layer. projections: what a pooled
    vector goes through (Dense modules of sentence-transformers).
    layer_input: what every layer is given of the token itself, if anything.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    embedding_scale: float = 1.0
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    architecture: str = ""
    headless: bool = False
    class_eos_token_ids: tuple[int, ...] = ()
    assumed: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    text_only: bool = False
    quantisation: Quantisation | None = None
    layer_input: LayerInput | None = None
    streams: Streams | None = None
    embedding: Embedding = Embedding()
    layer_names: str = "layers.{}."
    classifier: Classifier | None = None
    projections: tuple[Projection, ...] = ()

    @property
    def bidirectional(self) -> bool:
        """Later tokens count: a text is computed at once, nothing is kept of it, and none follows."""
        return any(isinstance(each.mixer, GroupedQueryAttention) and each.mixer.bidirectional for each in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def paged(self) -> tuple[PagedMixer, ...]:
        """Those of every layer that reads keys and values from pages."""
        return tuple(layer.paged for layer in self.layers if layer.paged is not None)

    @property
    def attention(self) -> PagedMixer | None:
        """Of the first layer that has one; others may differ in sizes, too."""
        return next(iter(self.paged), None)

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads if self.attention is not None else 0

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads if self.attention is not None else 0

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim if self.attention is not None else 0

    @property
    def windows(self) -> tuple[int | None, ...]:
        """One entry a layer that has pages of its own: the tokens that a query sees, itself included; None for all."""
        return tuple(mixer.window for mixer in self.paged if mixer.reads is None)

    @property
    def longest_window(self) -> int | None:
        """Tokens that a query sees at most, itself included; None where some layer sees all, or none has pages."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if windows and len(windows) == len(self.windows) else None

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """Those there are, in the order in which layers have them."""
        return tuple(dict.fromkeys(mixer.rope for mixer in self.paged if mixer.rope is not None))

    @property
    def states(self) -> tuple[tuple[StateTensor, ...], ...]:
        """One entry a layer: the tensors of its recurrent state, empty where it has none."""
        return tuple(layer.state for layer in self.layers)

    @property
    def has_state(self) -> bool:
        return any(self.states)

    @property
    def experts(self) -> tuple[Experts, ...]:
        """Those of every layer that has some."""
        forwards = [layer.feed_forward for layer in self.layers]
        inner = [each.experts if isinstance(each, DenseAndExperts) else each for each in forwards]
        return tuple(each for each in inner if isinstance(each, Experts))

    @property
    def context_length(self) -> int:
        """Tokens of context the model is made for: yarn is the one kind whose field does not say it itself."""
        yarn = [int(rope.original_max_position * rope.factor) for rope in self.ropes if rope.kind == "yarn"]
        return max([self.max_position_embeddings, *yarn])

    @property
    def num_parameters(self) -> int:
        """Elements of all weight matrices; norms and biases, far below 1%, are left out."""
        matrices = 1 if self.tie_word_embeddings or self.headless else 2
        total = self.vocab_size * self.hidden_size * matrices + self.embedding.num_parameters(self.hidden_size)
        if self.streams is not None:
            total += self.streams.num_parameters(self.num_layers, self.hidden_size)
        if (own := self.layer_input) is not None:
            total += self.num_layers * own.size * (own.vocab_size + 3 * self.hidden_size)
        return total + sum(layer.num_parameters(self.hidden_size) for layer in self.layers)


def share(layers: Iterable[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The same layers, equal ones as one object."""
    seen: dict[LayerSpec, LayerSpec] = {}
    return tuple(seen.setdefault(layer, layer) for layer in layers)


def difference(first: Any, second: Any, name: str = "") -> str | None:
    """Where two specs differ first: `layers.3.mixer.window`; None where they are equal."""
    if first == second:
        return None
    inner: list[tuple[str, Any, Any]] = []
    if type(first) is type(second) and dataclasses.is_dataclass(first):
        names = [each.name for each in dataclasses.fields(first)]
        inner = [(each, getattr(first, each), getattr(second, each)) for each in names]
    elif isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        inner = [(str(index), *pair) for index, pair in enumerate(zip(first, second, strict=True))]
    for part, one, other in inner:
        if (found := difference(one, other, f"{name}.{part}" if name else part)) is not None:
            return found
    return name
