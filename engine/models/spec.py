"""What a model is: sizes, a list of layers and a head, as frozen dataclasses.

Families make one from config.json, loading finds its tensors, parts compute it; executors and the server read it.
Names of tensors are those of the checkpoint, without `.weight` and `.bias`, relative to their layer. Imports nothing
of ours and no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

DTYPES = ("bfloat16", "float16", "float32")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")

# Of a gate, which then multiplies; and of a feed-forward without one.
GatedActivation = Literal["silu", "gelu_tanh", "gelu"]
PlainActivation = Literal["relu2", "relu", "gelu", "gelu_tanh", "xielu"]
HeadActivation = Literal["none", "tanh", "relu", "gelu", "gelu_tanh", "silu"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A rotary embedding.

    kind: one of ROPE_KINDS. rotary_dim: how many leading dimensions of a head are turned (even).
    interleaved: the checkpoint pairs dimensions (2i, 2i+1) and not (i, i + rotary_dim/2).
    attention_scaling: factor on cos and sin (yarn, longrope).
    original_max_position: context of the pretraining, where the kind needs it.
    turning: of a proportional one, frequencies that are not 0.
    The remaining fields belong to single kinds and carry the names of config.json.
    """

    kind: str
    theta: float
    rotary_dim: int
    interleaved: bool = False
    attention_scaling: float = 1.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    turning: int = 0


@dataclass(frozen=True, slots=True)
class NormSpec:
    """An RMS norm over the last dimension: x / sqrt(mean(x^2) + eps) * (offset + weight).

    centered: x has its mean taken away first (LayerNorm). bias: is added at the end. weightless: the checkpoint has no
    weight, which is 1.
    """

    name: str
    eps: float
    offset: float = 0.0
    centered: bool = False
    bias: bool = False
    weightless: bool = False


@dataclass(frozen=True, slots=True)
class QueryScale:
    """Queries at position p are multiplied by 1 + beta ln(1 + floor((p + offset) / original_max_position))."""

    beta: float
    original_max_position: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Softmax attention with as many or fewer key and value heads than query heads; its memory is KV pages.

    scale: on q @ k. rope: None where positions are not told. window: the tokens that a query sees, itself included,
    or None for all (a Chunk of engine/groups.py: those of its block). bidirectional: queries see later tokens, too (a
    window is then to either side); such a layer keeps nothing, for its sequence is computed at once. softcap: c in
    c * tanh(x / c) on the scores, or None. q_norm, k_norm: before the rope (or after it: norm_after_rope), over each
    head or (norm_width full) over all heads at once. query_scale: None where queries keep their size. qkv: one name
    where the checkpoint has them fused, else three. value_dim: of a head's value and result, None where it is head_dim.
    sinks: the tensor (its whole name; [num_heads]) of one more logit in each head's softmax, which has no value.
    reads: the earlier layer whose keys and values it reads; it has none of its own. gated_queries: the projection to q
    gives every head its query and then a gate, by whose sigmoid its result is multiplied. v_norm: over each head's
    values. values_of_keys: values are what the projection to keys gives, before norm and rope; qkv then has two names.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    bidirectional: bool = False
    softcap: float | None = None
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    norm_width: Literal["head", "full"] = "head"
    norm_after_rope: bool = False
    query_scale: QueryScale | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    value_dim: int | None = None
    sinks: str | None = None
    reads: int | None = None
    gated_queries: bool = False
    v_norm: NormSpec | None = None
    values_of_keys: bool = False

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        kv_heads, value_dim = 0 if self.reads is not None else self.num_kv_heads, self.value_dim or self.head_dim
        queries = self.num_heads * (2 if self.gated_queries else 1) * self.head_dim
        values = 0 if self.values_of_keys else kv_heads * value_dim
        return (queries + kv_heads * self.head_dim + values + self.num_heads * value_dim) * hidden_size


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Softmax attention whose heads make their keys and values of one latent vector a token; its memory is pages of
    that and of a key of rope_dim that all heads share (DeepSeek V2, arXiv 2405.04434).

    A head's query and key are nope_dim numbers without and rope_dim with a rope. query_rank: queries are made of a
    vector of that size, after q_norm, or straight from x (None). latent_dim: of the latent, normed by latent_norm.
    value_dim: of a head's value. scale: on q @ k. rope: None where positions are not told. query_scale: None where
    queries keep their size. bias: what goes down (but for a query_rank of None) and the output have one.
    query: names of the projections, one where query_rank is None, else two.
    """

    num_heads: int
    query_rank: int | None
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: RopeSpec | None
    latent_norm: NormSpec
    q_norm: NormSpec | None = None
    query_scale: QueryScale | None = None
    bias: bool = False
    query: tuple[str, ...] = ("self_attn.q_a_proj", "self_attn.q_b_proj")
    down: str = "self_attn.kv_a_proj_with_mqa"
    up: str = "self_attn.kv_b_proj"
    output: str = "self_attn.o_proj"

    # What the cache and the backend see of it: one head that all query heads read.

    @property
    def num_kv_heads(self) -> int:
        return 1

    @property
    def head_dim(self) -> int:
        return self.latent_dim + self.rope_dim

    @property
    def window(self) -> None:
        return None

    @property
    def reads(self) -> None:
        return None

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        queries = self.num_heads * (self.nope_dim + self.rope_dim)
        query = queries * hidden_size if self.query_rank is None else self.query_rank * (queries + hidden_size)
        latent = self.latent_dim * self.num_heads * (self.nope_dim + self.value_dim)
        return query + self.head_dim * hidden_size + latent + self.num_heads * self.value_dim * hidden_size


# What keeps keys and values in pages: each has a window, a rope and `reads`.
PagedMixer = GroupedQueryAttention | LatentAttention


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a layer's recurrent state. wide: float32 whatever the model's dtype is."""

    shape: tuple[int, ...]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """A gated delta net (arXiv 2412.06464): a short convolution and silu over q, k and v, the recurrence, a norm of
    every head's result, gated by z, and a projection.

    Key heads serve equal numbers of neighbouring heads. taps: tokens that the convolution sees. projections: to q, k
    and v, to z, to b (the share of a token) and to a (its decay), or two where the checkpoint has, for one key head
    after the other, q, k, v and z, and b and a. Names are under `linear_attn`.
    """

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    taps: int
    norm: NormSpec
    projections: tuple[str, ...] = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """The tokens that the convolution still sees, and the matrix of every head."""
        matrices = StateTensor((self.num_heads, self.key_dim, self.value_dim), wide=True)
        return StateTensor((self.taps - 1, self.channels)), matrices

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        values = self.num_heads * self.value_dim
        return (self.channels + 2 * values + 2 * self.num_heads) * hidden_size + self.channels * self.taps


@dataclass(frozen=True, slots=True)
class ShortConv:
    """out(c * convolution(b * x)) with b, c and x [hidden_size] from one projection; names are under `conv`."""

    hidden_size: int
    taps: int
    bias: bool = False

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """The tokens that the convolution still sees."""
        return (StateTensor((self.taps - 1, self.hidden_size)),)

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        return 4 * hidden_size * hidden_size + hidden_size * self.taps


@dataclass(frozen=True, slots=True)
class Mamba2:
    """A state space of scalar decays (arXiv 2405.21060): a short convolution and silu over x, B and C, the recurrence,
    a gate, a norm, and a projection.

    num_groups: of B and C, each for equal numbers of neighbouring heads. taps: tokens that the convolution sees. steps:
    bounds of a token's step. norm: None where there is none; over each of norm_parts equal parts of the result, gated
    before it, or after it (norm_first). multipliers: factors on the parts z, x, B, C and dt of what is projected.
    name: of its tensors.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    taps: int
    norm: NormSpec | None
    norm_parts: int = 1
    norm_first: bool = False
    steps: tuple[float, float] = (0.0, math.inf)
    conv_bias: bool = True
    bias: bool = False
    output_bias: bool = False
    multipliers: tuple[float, ...] | None = None
    name: str = "mamba"

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """The tokens that the convolution still sees, and the matrix of every head."""
        matrices = StateTensor((self.num_heads, self.state_size, self.head_dim), wide=True)
        return StateTensor((self.taps - 1, self.channels)), matrices

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        projected = self.inner_size + self.channels + self.num_heads
        return (projected + self.inner_size) * hidden_size + self.channels * self.taps


# What keeps a recurrent state: each has a `state`.
StatefulMixer = GatedDelta | ShortConv | Mamba2


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Mixers that read the same, times input_scales, and whose results are added up, times output_scales. At most one
    has keys and values, and one a state."""

    mixers: tuple[PagedMixer | StatefulMixer, ...]
    input_scales: tuple[float, ...]
    output_scales: tuple[float, ...]

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        return sum(mixer.num_parameters(hidden_size) for mixer in self.mixers)


# What mixes the tokens of a sequence.
Mixer = PagedMixer | StatefulMixer | SideBySide


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
    expert_scale: the tensor ([experts]) of factors on the shares.
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
    `activation`. mxfp4: the checkpoint has their matrices in four bits (ops/mxfp4.py), in which they stay.
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

    parallel: the feed-forward reads what the mixer reads, and both are added at once; it has no norms of its own.
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
class Float8:
    """Matrices of the checkpoint are float8 with scales. block: rows and columns that share one; None: all of them."""

    block: tuple[int, int] | None


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
    inputs, too. float8: how its checkpoint is quantised, None where it is not. embedding, layer_names: how tensors are
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
    float8: Float8 | None = None
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
