"""What one rank of a tensor parallel group has of a model: a smaller spec, and which rows and columns of which tensors.

Heads and the inner sizes of feed-forwards and experts are divided, query heads beside the key heads that they read;
what follows the layers' outputs (norms, routers, heads for vectors) is the same in every rank, and so is a recurrent
mixer that cannot be divided. Used at start, on the loading thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.loading.adapted import AdaptedSource
from engine.models.loading.cuts import Cut, cut_out
from engine.models.loading.weights import OUTPUT, PIECE, CheckpointWeights, DummyWeights, Weights
from engine.models.mixers import (
    GatedDelta,
    GroupedQueryAttention,
    LatentAttention,
    Mamba2,
    Mixer,
    ShortConv,
    SideBySide,
)
from engine.models.parts.decoder import embedding_name
from engine.models.parts.source import PREFIX
from engine.models.spec import Dense, DenseAndExperts, Experts, FeedForward, LayerSpec, ModelSpec, Ungated, share
from engine.ops.experts import Stack
from engine.ops.heads import HeadLinear
from engine.ops.linear import Linear
from engine.ops.lora import StackedSites
from engine.ops.mxfp4 import BLOCK as MXFP4_BLOCK
from engine.ops.parallel import share_of

FLAG = "--tensor-parallel-size"


class Group(Protocol):
    """What a model needs of the group while it computes; ops/parallel.py makes layers of it."""

    rank: int
    size: int
    # Whether a rank has whole experts, and not a part of each.
    expert_parallel: bool

    def summed(self, linear: Linear, bias: Tensor | None) -> Linear:
        """A layer whose products are added up over the ranks, and the bias to that."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """x of all ranks, added up."""
        ...

    def embedding(self, own: Linear, first: int, count: int) -> Linear:
        """A table of `count` rows of which this rank has those from `first` on, in `own`."""
        ...

    def output_layer(self, own: Linear, first: int, count: int) -> Linear:
        """The layer that makes logits, of which this rank has rows from `first` on; it may be an embedding, too."""
        ...


@dataclass(slots=True)
class Plan:
    """rows: by module, the parts of it that are laid below one another. columns: by module, the part, and whether the
    products are added up there. tensors: of single tensors. pieces: of small ones, the parts that are laid below one
    another. raw: of tensors of bytes, by axis. same: names that stand for those of others. vocabulary: rows of the
    embedding and of the output layer."""

    spec: ModelSpec
    rows: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    columns: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)
    pieces: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    raw: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    vocabulary: tuple[int, int] = (0, 0)


def refuse(spec: ModelSpec, size: int, *, expert_parallel: bool = False) -> str | None:
    """Why a model cannot be divided among so many ranks; None where it can."""
    try:
        for rank in range(size):
            plan_of(spec, rank, size, expert_parallel=expert_parallel)
    except StartupError as error:
        return str(error)
    return None


def plan_of(spec: ModelSpec, rank: int, size: int, *, expert_parallel: bool = False) -> Plan:
    """What rank `rank` of `size` has. expert_parallel: of experts some whole, and not of each a part. Raises
    StartupError for a model that cannot be divided so."""
    return _Planner(spec, rank, size, expert_parallel).plan


class _Planner:
    def __init__(self, spec: ModelSpec, rank: int, size: int, expert_parallel: bool) -> None:
        self._rank, self._size, self._expert_parallel = rank, size, expert_parallel
        self._name = spec.architecture or "this model"
        if spec.streams is not None:
            self._fail(f"{self._name} passes several streams from layer to layer, which are not divided so far")
        self.plan = Plan(spec)
        layers = [
            self._layer(layer, PREFIX + spec.layer_names.format(index), spec.hidden_size)
            for index, layer in enumerate(spec.layers)
        ]
        self.plan.spec = dataclasses.replace(spec, layers=share(layers))
        self.plan.vocabulary = share_of(spec.vocab_size, rank, size)
        if share_of(spec.vocab_size, size - 1, size)[0] >= spec.vocab_size:
            self._fail(f"a vocabulary of {spec.vocab_size} tokens is too small to be divided")

    def _fail(self, why: str) -> Any:
        raise StartupError(f"{FLAG} {self._size}: {why}")

    def _share(self, count: int, what: str) -> int:
        if count % self._size:
            self._fail(f"does not divide the {count} {what} of {self._name}")
        return count // self._size

    def _range(self, count: int) -> tuple[int, int]:
        each = count // self._size
        return self._rank * each, (self._rank + 1) * each

    def _layer(self, layer: LayerSpec, prefix: str, hidden_size: int) -> LayerSpec:
        mixer, feed_forward = layer.mixer, layer.feed_forward
        if mixer is not None:
            mixer = self._mixer(mixer, prefix, hidden_size)
        if feed_forward is not None:
            feed_forward = self._feed_forward(feed_forward, prefix)
        return dataclasses.replace(layer, mixer=mixer, feed_forward=feed_forward)

    def _mixer(self, mixer: Mixer, prefix: str, hidden_size: int) -> Mixer:
        if isinstance(mixer, SideBySide):
            parts = tuple(self._mixer(each, prefix, hidden_size) for each in mixer.mixers)
            return dataclasses.replace(mixer, mixers=parts)  # type: ignore[arg-type]
        if isinstance(mixer, GroupedQueryAttention):
            return self._attention(mixer, prefix)
        if isinstance(mixer, LatentAttention):
            return self._latent(mixer, prefix)
        if isinstance(mixer, GatedDelta):
            return self._delta(mixer, prefix + "linear_attn.")
        if isinstance(mixer, Mamba2):
            return self._mamba(mixer, f"{prefix}{mixer.name}.")
        return self._convolution(mixer, prefix + "conv.")

    def _delta(self, mixer: GatedDelta, prefix: str) -> GatedDelta:
        """Heads beside the key heads that they read."""
        plan, heads, key_heads = self.plan, mixer.num_heads, mixer.num_key_heads
        if key_heads % self._size:
            return mixer
        keys, values = _scaled(self._range(key_heads), mixer.key_dim), _scaled(self._range(heads), mixer.value_dim)
        own, all_keys = self._range(heads), key_heads * mixer.key_dim
        convolved = [keys, _scaled(keys, 1, all_keys), _scaled(values, 1, 2 * all_keys)]
        names = [prefix + name for name in mixer.projections]
        if len(names) == 2:
            served = heads // key_heads
            widths = 2 * mixer.key_dim + 2 * served * mixer.value_dim, 2 * served
            for name, width in zip(names, widths, strict=True):
                plan.rows[name] = [_scaled(self._range(key_heads), width)]
        else:
            for name, parts in zip(names, (convolved, [values], [own], [own]), strict=True):
                plan.rows[name] = parts
        plan.pieces[f"{prefix}conv1d.weight"] = convolved
        for name in ("A_log", "dt_bias"):
            plan.pieces[prefix + name] = [own]
        plan.columns[f"{prefix}out_proj"] = (*values, True)
        return dataclasses.replace(mixer, num_heads=heads // self._size, num_key_heads=key_heads // self._size)

    def _mamba(self, mixer: Mamba2, prefix: str) -> Mamba2:
        """Heads beside the groups that they read, and the parts that are normed together."""
        plan, size, heads, groups = self.plan, self._size, mixer.num_heads, mixer.num_groups
        normed = mixer.norm is not None
        if heads % size or (groups % size and size % groups) or (normed and mixer.norm_parts % size):
            return mixer
        own = self._range(heads)
        # Several ranks may have the same group.
        group = self._range(groups)
        if groups % size:
            first = self._rank // (size // groups)
            group = first, first + 1
        inner, states = mixer.inner_size, mixer.state_size
        values = _scaled(own, mixer.head_dim)
        keys = [_scaled(group, states, inner + each * groups * states) for each in range(2)]
        convolved = [values, *keys]
        in_proj = [values, *(_scaled(part, 1, inner) for part in convolved), _scaled(own, 1, inner + mixer.channels)]
        plan.rows[f"{prefix}in_proj"] = in_proj
        for kind in ("weight", "bias"):
            plan.pieces[f"{prefix}conv1d.{kind}"] = convolved
        for name in ("A_log", "dt_bias", "D"):
            plan.pieces[prefix + name] = [own]
        if mixer.norm is not None:
            plan.pieces[f"{prefix}{mixer.norm.name}.weight"] = [values]
        plan.columns[f"{prefix}out_proj"] = (*values, True)
        parts = mixer.norm_parts // size if normed else mixer.norm_parts
        own_groups = group[1] - group[0]
        return dataclasses.replace(mixer, num_heads=heads // size, num_groups=own_groups, norm_parts=parts)

    def _convolution(self, mixer: ShortConv, prefix: str) -> ShortConv:
        """Channels are independent of one another."""
        plan, count = self.plan, mixer.hidden_size
        if count % self._size:
            return mixer
        own = self._range(count)
        plan.rows[f"{prefix}in_proj"] = [_scaled(own, 1, each * count) for each in range(3)]
        for kind in ("weight", "bias"):
            plan.pieces[f"{prefix}conv.{kind}"] = [own]
        plan.columns[f"{prefix}out_proj"] = (*own, True)
        return dataclasses.replace(mixer, hidden_size=count // self._size)

    def _attention(self, mixer: GroupedQueryAttention, prefix: str) -> GroupedQueryAttention:
        plan, size = self.plan, self._size
        heads, kv_heads, dim = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
        value_dim = mixer.value_dim or dim
        own_heads = self._share(heads, "attention heads")
        if mixer.norm_width == "full" and (mixer.q_norm or mixer.k_norm):
            self._fail(f"{self._name} norms all heads at once, which is not divided so far")
        first = self._rank * own_heads
        queries = (first, first + own_heads)
        if kv_heads % size == 0:
            keys = self._range(kv_heads)
        elif size % kv_heads == 0 and not mixer.heads_together:
            # Several ranks have the same key head.
            key = self._rank // (size // kv_heads)
            keys = (key, key + 1)
        else:
            self._fail(f"{kv_heads} key heads of {self._name} are neither divided by it nor divide it")
            raise AssertionError
        own_keys = keys[1] - keys[0]

        each = dim * (2 if mixer.gated_queries else 1)
        # As the checkpoint has them: of all heads and of this rank's.
        parts = [(heads * each, _scaled(queries, each))]
        if mixer.reads is None:
            parts.append((kv_heads * dim, _scaled(keys, dim)))
            if not mixer.values_of_keys:
                parts.append((kv_heads * value_dim, _scaled(keys, value_dim)))
        names = [prefix + name for name in mixer.qkv]
        if mixer.heads_together:
            plan.rows[names[0]] = [_scaled(keys, (heads // kv_heads + 2) * dim)]
        elif len(names) == len(parts):
            for name, (_, part) in zip(names, parts, strict=True):
                plan.rows[name] = [part]
        else:
            offset, found = 0, []
            for count, part in parts:
                found.append((offset + part[0], offset + part[1]))
                offset += count
            plan.rows[names[0]] = found
        plan.columns[prefix + mixer.output] = (*_scaled(queries, value_dim), True)
        if mixer.gate is not None:
            plan.rows[prefix + mixer.gate.name] = [_scaled(queries, 1 if mixer.gate.by_head else value_dim)]
        if mixer.sinks is not None:
            plan.tensors[prefix + mixer.sinks] = queries
        if mixer.norm_width == "own":
            for norm, part in ((mixer.q_norm, queries), (mixer.k_norm, keys)):
                if norm is None:
                    continue
                name = f"{prefix}{norm.name}.weight"
                if "{}" not in name:
                    plan.tensors[name] = part
                    continue
                for head in range(part[1] - part[0]):
                    plan.same[name.format(head)] = name.format(part[0] + head)
        return dataclasses.replace(mixer, num_heads=own_heads, num_kv_heads=own_keys)

    def _latent(self, mixer: LatentAttention, prefix: str) -> LatentAttention:
        """Heads are divided; the latents, and so the cache, are the same in every rank."""
        plan, own = self.plan, self._share(mixer.num_heads, "attention heads")
        first, last = self._range(mixer.num_heads)
        query, up = mixer.nope_dim + mixer.rope_dim, mixer.nope_dim + mixer.value_dim
        plan.rows[prefix + mixer.query[-1]] = [(first * query, last * query)]
        plan.tensors[f"{prefix}{mixer.up}.weight"] = (first * up, last * up)
        plan.columns[prefix + mixer.output] = (first * mixer.value_dim, last * mixer.value_dim, True)
        return dataclasses.replace(mixer, num_heads=own)

    def _feed_forward(self, spec: FeedForward, prefix: str) -> FeedForward:
        if isinstance(spec, DenseAndExperts):
            dense, experts = self._dense(spec.dense, prefix, summed=True), self._experts(spec.experts, prefix)
            return dataclasses.replace(spec, dense=dense, experts=experts)
        return self._experts(spec, prefix) if isinstance(spec, Experts) else self._plain(spec, prefix, summed=True)

    def _plain(self, spec: Dense | Ungated, prefix: str, *, summed: bool) -> Dense | Ungated:
        """summed: what it gives is added up where it comes about; else by who asks for it."""
        if isinstance(spec, Dense):
            return self._dense(spec, prefix, summed=summed)
        return self._ungated(spec, prefix, summed=summed)

    def _dense(self, spec: Dense, prefix: str, *, summed: bool) -> Dense:
        if spec.sparsity:
            self._fail(f"{self._name} compares all gates of a token, which is not divided so far")
        inner, part = self._inner(spec.intermediate_size)
        names = [prefix + name for name in spec.gate_up]
        if len(names) == 2:
            for name in names:
                self.plan.rows[name] = [part]
        else:
            self.plan.rows[names[0]] = [part, (part[0] + spec.intermediate_size, part[1] + spec.intermediate_size)]
        self.plan.columns[prefix + spec.down] = (*part, summed)
        return dataclasses.replace(spec, intermediate_size=inner)

    def _ungated(self, spec: Ungated, prefix: str, *, summed: bool) -> Ungated:
        inner, part = self._inner(spec.intermediate_size)
        self.plan.rows[prefix + spec.up] = [part]
        self.plan.columns[prefix + spec.down] = (*part, summed)
        return dataclasses.replace(spec, intermediate_size=inner)

    def _inner(self, count: int) -> tuple[int, tuple[int, int]]:
        return self._share(count, "inner numbers of a feed-forward"), self._range(count)

    def _experts(self, spec: Experts, prefix: str) -> Experts:
        """Every rank has a part of each, or some whole."""
        if spec.latent_size is not None:
            self._fail(f"{self._name} has experts in a smaller space, which are not divided so far")
        if self._expert_parallel:
            return self._whole_experts(spec, prefix)
        if spec.clamp is not None:
            return self._clamped_experts(spec, prefix)
        for number in range(spec.num_experts):
            gate_up, down = tuple(name.format(number) for name in spec.gate_up), spec.down.format(number)
            one: Dense | Ungated
            if spec.gated:
                one = Dense(spec.intermediate_size, "silu", gate_up=gate_up, down=down)
            else:
                one = Ungated(spec.intermediate_size, "relu", up=gate_up[0], down=down)
            self._plain(one, prefix, summed=False)
        shared = None if spec.shared is None else self._plain(spec.shared, prefix, summed=False)
        inner, _ = self._inner(spec.intermediate_size)
        return dataclasses.replace(spec, intermediate_size=inner, shared=shared)

    def _whole_experts(self, spec: Experts, prefix: str) -> Experts:
        self._share(spec.num_experts, "experts")
        held = self._range(spec.num_experts)
        if spec.mxfp4:
            for name in (*spec.gate_up, spec.down):
                for kind in ("blocks", "scales"):
                    self.plan.raw[f"{prefix}{name.replace('.{}', '')}_{kind}"] = (0, *held)
        shared = None if spec.shared is None else self._plain(spec.shared, prefix, summed=False)
        return dataclasses.replace(spec, held=held, shared=shared)

    def _clamped_experts(self, spec: Experts, prefix: str) -> Experts:
        """Gates and what they multiply are rows in turn."""
        plan, [gate_up] = self.plan, spec.gate_up
        inner, part = self._inner(spec.intermediate_size)
        pairs = 2 * part[0], 2 * part[1]
        for number in range(spec.num_experts):
            plan.rows[prefix + gate_up.format(number)] = [pairs]
            plan.columns[prefix + spec.down.format(number)] = (*part, False)
        if spec.mxfp4:
            if inner % MXFP4_BLOCK:
                self._fail(f"{self._name} has blocks of {MXFP4_BLOCK} columns, and a rank would have {inner} columns")
            blocks = part[0] // MXFP4_BLOCK, part[1] // MXFP4_BLOCK
            for kind in ("blocks", "scales"):
                plan.raw[f"{prefix}{gate_up.replace('.{}', '')}_{kind}"] = (1, *pairs)
                plan.raw[f"{prefix}{spec.down.replace('.{}', '')}_{kind}"] = (2, *blocks)
        return dataclasses.replace(spec, intermediate_size=inner)


def _scaled(part: tuple[int, int], width: int, offset: int = 0) -> tuple[int, int]:
    """Of heads, say, their rows from `offset` on."""
    return offset + part[0] * width, offset + part[1] * width


class SlicedWeights:
    """A Source of a rank's parts; `inner` knows the whole tensors. To be made once of a source.

    layers: where adapters are served, `inner` with places for them around its layers.
    """

    def __init__(
        self,
        inner: Weights,
        plan: Plan,
        group: Group,
        shapes: dict[str, tuple[int, ...]],
        layers: AdaptedSource | None = None,
    ) -> None:
        self._inner = inner
        self._layers: Weights | AdaptedSource = inner if layers is None else layers
        # What is added to sums, by the names of modules.
        self.biases: dict[str, Tensor] = {}
        self._plan = plan
        self._group = group
        self._shapes = shapes
        self.dtype, self.device = inner.dtype, inner.device
        self.deterministic, self.linears, self.mixtures = inner.deterministic, inner.linears, inner.mixtures
        self.adapters = self._layers.adapters
        # Where one module becomes several: their names and rows.
        self._pieces: dict[str, list[tuple[str, int]]] = {}
        self._cut_all(embedding_name(plan.spec))

    def _cut_all(self, embedding: str) -> None:
        plan = self._plan
        for module, parts in plan.rows.items():
            several = len(parts) > 1
            self._pieces[module] = []
            for number, part in enumerate(parts):
                name = f"{module}{PIECE}{number}" if several else module
                for kind in (".weight", ".bias"):
                    self._cut(name + kind, module + kind, *part, done=number + 1 == len(parts))
                self._pieces[module].append((name, part[1] - part[0]))
        for module, (begin, end, _) in plan.columns.items():
            self._cut(f"{module}.weight", f"{module}.weight", begin, end, by_columns=True)
        for name, part in plan.tensors.items():
            self._cut(name, name, *part)
        for name in (embedding, f"{OUTPUT}.weight", f"{OUTPUT}.bias"):
            self._cut(name, name, *plan.vocabulary)
        if plan.same:
            self._rename(plan.same)

    def _cut(self, name: str, whole: str, begin: int, end: int, *, by_columns: bool = False, done: bool = True) -> None:
        shape = self._shapes.get(whole)
        if shape is None:
            return  # the model has no such bias
        cut = Cut(shape, begin, end, by_columns)
        if isinstance(self._inner, DummyWeights):
            self._inner.cuts[name] = (whole, cut)
        elif isinstance(self._inner, CheckpointWeights):
            self._inner.replace_tensor(name, cut_out(whole, self._inner.stored(whole), cut))
            if done and name != whole:
                self._inner.drop_tensor(whole)

    def _rename(self, same: dict[str, str]) -> None:
        if isinstance(self._inner, CheckpointWeights):
            found = {name: self._inner.stored(other) for name, other in same.items()}
            for name, stored in found.items():
                self._inner.replace_tensor(name, stored)
        elif isinstance(self._inner, DummyWeights):
            for name, other in same.items():
                self._inner.cuts[name] = (other, Cut(self._shapes[other], 0, self._shapes[other][0]))

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """See Source."""
        _, _, summed = self._plan.columns.get(name.removesuffix(".bias"), (0, 0, True))
        if name.endswith(".bias") and not summed and self._group.rank:
            # The first rank adds it, for all.
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        if (pieces := self._plan.pieces.get(name)) is not None:
            whole = self._inner.tensor(name, self._shapes[name], dtype)
            return torch.cat([whole[begin:end] for begin, end in pieces])
        return self._inner.tensor(name, shape, dtype)

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See Source."""
        cut = self._plan.raw.get(name)
        if cut is None:
            return self._inner.raw(name, shape)
        axis, begin, end = cut
        return self._inner.raw(name, self._shapes[name]).narrow(axis, begin, end - begin).contiguous()

    def stacked(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> Tensor:
        """See Source."""
        pieces: list[tuple[str, int]] = []
        once: list[bool] = []
        for name, count in zip(names, rows, strict=True):
            module, _, kind = name.rpartition(".")
            found = [(f"{piece}.{kind}", own) for piece, own in self._pieces.get(module, [(module, count)])]
            pieces += found
            _, _, summed = self._plan.columns.get(module, (0, 0, True))
            once += [kind == "bias" and not summed] * len(found)
        counts = [count for _, count in pieces]
        stack = self._inner.stacked([name for name, _ in pieces], counts, *columns)
        if self._group.rank and any(once):
            # The first rank adds them, for all.
            for part, is_once in zip(stack.split_with_sizes(counts), once, strict=True):
                if is_once:
                    part.zero_()
        return stack

    def experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, *, order: Tensor | None = None
    ) -> Stack:
        """See Source."""
        pieces = [piece for name in names for piece in self._pieces.get(name, [(name, rows)])]
        [own] = {count for _, count in pieces}
        return self._inner.experts([name for name, _ in pieces], count, own, columns, order=order)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        order: Tensor | None = None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:
        """See Source."""
        by_columns = self._plan.columns.get(names[0])
        if by_columns is not None:
            assert order is None and activation is None and len(names) == 1
            _, _, summed = by_columns
            # Once in all: by who adds up, or else by the first rank.
            own = bias and not summed and self._group.rank == 0
            linear = self._layers.linear(names, rows, columns, bias=own, dtype=dtype)
            if not summed:
                return linear
            vector = self._inner.tensor(f"{names[0]}.bias", (rows[0],), torch.float32) if bias else None
            if vector is not None:
                self.biases[names[0]] = vector
            return self._group.summed(linear, vector)
        pieces = [
            piece for name, count in zip(names, rows, strict=True) for piece in self._pieces.get(name, [(name, count)])
        ]
        names, counts = [name for name, _ in pieces], [count for _, count in pieces]
        assert sum(counts) == sum(rows), (names, counts, rows)
        return self._layers.linear(names, counts, columns, bias=bias, order=order, activation=activation, dtype=dtype)

    def adapted(self, layer: Linear, name: str) -> Linear:
        """See Source."""
        return self._layers.adapted(layer, name)

    def adapted_experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, order: Tensor | None
    ) -> StackedSites | None:
        """See Source."""
        pieces = [piece for name in names for piece in self._pieces.get(name, [(name, rows)])]
        [own] = {count for _, count in pieces}
        return self._layers.adapted_experts([name for name, _ in pieces], count, own, columns, order)

    def adapted_heads(
        self, name: str, to_latent: HeadLinear, to_value: HeadLinear
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """See Source."""
        return self._layers.adapted_heads(name, to_latent, to_value)

    def embedding(self, name: str, count: int, width: int) -> Linear:
        """See Source."""
        if name != embedding_name(self._plan.spec):
            return self._layers.embedding(name, count, width)
        first, last = self._plan.vocabulary
        return self._group.embedding(self._layers.embedding(name, last - first, width), first, count)

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """See Source."""
        first, last = self._plan.vocabulary
        own = self._layers.output_layer(last - first, hidden, tied=tied, bias=bias)
        return self._group.output_layer(own, first, vocab)

    def summed(self, part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """See Source."""
        add_up = self._group.sum
        return lambda *given: add_up(part(*given))
