"""What mixes the tokens of a sequence in a layer, as frozen dataclasses, with their norms and rotary embeddings.

Part of a model's spec (spec.py). Names of tensors are those of the checkpoint, without `.weight` and `.bias`, relative
to their layer. Imports nothing of ours and no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


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
class OutputGate:
    """activation(projection(x)), by which what attention gives is multiplied: one number for each of its own, or
    (by_head) for each head. name: of the projection."""

    name: str
    activation: Literal["sigmoid", "softplus"]
    by_head: bool = False


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Softmax attention with as many or fewer key and value heads than query heads; its memory is KV pages.

    scale: on q @ k. rope: None where positions are not told. window: the tokens that a query sees, itself included, or
    None for all (a Chunk of engine/groups.py: those of its block). bidirectional: queries see later tokens, too (a
    window is then to either side); such a layer keeps nothing, for its sequence is computed at once. softcap: c in c *
    tanh(x / c) on the scores, or None. q_norm, k_norm: before the rope (or after it: norm_after_rope), over each head
    (norm_width own: with a weight of its own) or (full) over all heads at once. query_scale: None where queries keep
    their size. qkv: one name where the checkpoint has them fused, else three. value_dim: of a head's value and result,
    None where it is head_dim. sinks: the tensor (its whole name; [num_heads]) of one more logit in each head's softmax,
    which has no value. reads: the earlier layer whose keys and values it reads; it has none of its own. gated_queries:
    the projection to q gives every head its query and then a gate, by whose sigmoid its result is multiplied. gate: one
    of its own projection. v_norm: over each head's values. values_of_keys: values are what the projection to keys
    gives, before norm and rope; qkv then has two names. heads_together: the fused projection goes from one key head to
    the next, each with its queries, its key and its value. clip: what it gives is cut off there, on both sides.
    value_scale: factor on values.
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
    norm_width: Literal["head", "own", "full"] = "head"
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
    gate: OutputGate | None = None
    heads_together: bool = False
    clip: float | None = None
    value_scale: float = 1.0

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of its matrices."""
        kv_heads, value_dim = 0 if self.reads is not None else self.num_kv_heads, self.value_dim or self.head_dim
        queries = self.num_heads * (2 if self.gated_queries else 1) * self.head_dim
        values = 0 if self.values_of_keys else kv_heads * value_dim
        gate = 0 if self.gate is None else self.num_heads * (1 if self.gate.by_head else value_dim)
        return (queries + kv_heads * self.head_dim + values + self.num_heads * value_dim + gate) * hidden_size


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
