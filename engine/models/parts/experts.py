"""Mixtures of experts, as a CPU and as a GPU compute them. Run by the executor's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from engine.models.mixers import NormSpec
from engine.models.parts.clamped import clamped_experts, mxfp4_stack
from engine.models.parts.dense import Mlp, make_mlp
from engine.models.parts.norm import Norm, make_norm
from engine.models.parts.source import Source
from engine.models.spec import Dense, DenseAndExperts, Experts, Ungated
from engine.ops.activation import Clamped, by_rows
from engine.ops.experts import Activation, Choice, Mixture
from engine.ops.linear import Linear, Product, computed
from engine.ops.norm import Normed, plain, rms_norm
from engine.ops.reordered import permuted


def make_experts(spec: Experts, source: Source, prefix: str, hidden_size: int) -> Callable[[Tensor | Normed], Tensor]:
    """The form that the device wants, and beside it what all tokens share."""
    kind: type[StackedExperts] | type[AllExperts] | type[SeparateExperts] = SeparateExperts
    if keeps_experts_stacked(source.device):
        known = spec.gated and spec.latent_size is None and spec.activation in ("silu", "gelu_tanh")
        kind = StackedExperts if known else AllExperts
    routed = kind(spec, source, prefix, hidden_size)
    return source.summed(routed if spec.shared is None else WithShared(routed, spec, source, prefix, hidden_size))


def keeps_experts_stacked(device: torch.device) -> bool:
    """Whether all experts of a layer are one tensor: what a GPU's kernels read."""
    return device.type == "cuda"


def _expert(spec: Experts, number: int) -> Dense | Ungated:
    """One of them, on its own."""
    gate_up, down = tuple(name.format(number) for name in spec.gate_up), spec.down.format(number)
    if not spec.gated:
        return Ungated(spec.intermediate_size, spec.activation, up=gate_up[0], down=down)  # type: ignore[arg-type]
    return Dense(spec.intermediate_size, spec.activation, gate_up=gate_up, down=down)  # type: ignore[arg-type]


Expert = Callable[[Tensor], Tensor | Product]


def _experts_of(spec: Experts, source: Source, prefix: str, hidden_size: int) -> Sequence[Expert]:
    """All that are held, each a callable of its own."""
    if spec.clamp is not None:
        return clamped_experts(spec, source, prefix, hidden_size)
    return [make_mlp(_expert(spec, number), source, prefix, hidden_size) for number in spec.here]


def _latent(spec: Experts, source: Source, prefix: str, hidden_size: int) -> tuple[Linear, Linear] | None:
    """What leads into the space that the experts compute in and back, where it is not that of the residuals."""
    if spec.latent_size is None:
        return None
    (into, back), bias, size = (prefix + name for name in spec.latent), spec.latent_bias, spec.latent_size
    there = source.linear([into], [size], hidden_size, bias=bias)
    return there, source.linear([back], [hidden_size], size, bias=bias)


class Rating:
    """The router's projection and the choice that follows from it."""

    def __init__(self, spec: Experts, source: Source, prefix: str, hidden_size: int) -> None:
        router, count = spec.router, spec.num_experts
        self._wide = router.wide
        self._input_norm: Tensor | None = None
        self._input_eps = router.input_eps
        if router.input_scale is not None:
            self._input_norm = source.tensor(prefix + router.input_scale, (hidden_size,)) * hidden_size**-0.5
        scales = None
        if router.expert_scale is not None:
            scales = source.tensor(prefix + router.expert_scale, (count,), torch.float32)
        dtype = torch.float32 if router.wide else None
        bias = router.linear_bias
        self._project = source.linear([prefix + router.name], [count], hidden_size, bias=bias, dtype=dtype)
        added = None
        if router.bias is not None:
            shape = (1, count) if router.bias_is_row else (count,)
            # Not rounded: it decides between scores that are close.
            added = source.tensor(prefix + router.bias, shape, torch.float32).view(-1)
        self.choice = Choice(
            spec.num_experts_per_token,
            router.normalize,
            router.score,
            added,
            router.groups,
            router.groups_chosen,
            router.group_best,
            router.scale,
            router.minimum,
            scales,
            router.softcap,
            router.near,
        )

    def logits(self, x: Tensor) -> Tensor:
        """[N, hidden] -> [N, experts]."""
        if self._input_norm is not None:
            x = rms_norm(x, self._input_norm, self._input_eps)
        return self._project(x.float() if self._wide else x)


class BesideDense:
    """A dense feed-forward and experts, each between norms of its own; the router reads what neither norm has seen."""

    def __init__(self, spec: DenseAndExperts, source: Source, prefix: str, hidden_size: int) -> None:
        def norm(each: NormSpec) -> Norm:
            return make_norm(each, source, prefix, hidden_size)

        self._dense = Mlp(spec.dense, source, prefix, hidden_size)
        self._experts: Callable[..., Tensor] = make_experts(spec.experts, source, prefix, hidden_size)
        self._norms = norm(spec.dense_norm), norm(spec.experts_norm)
        self._out_norms = norm(spec.dense_out_norm), norm(spec.experts_out_norm)

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        x = plain(x)
        dense = self._out_norms[0](self._dense(self._norms[0](x)))
        return dense + self._out_norms[1](self._experts(self._norms[1](x), x))


class WithShared:
    """Experts, and a feed-forward that every token goes through beside them, with a share of its own or a whole one."""

    def __init__(
        self, routed: Callable[[Tensor | Normed], Tensor], spec: Experts, source: Source, prefix: str, hidden_size: int
    ) -> None:
        assert spec.shared is not None
        self._routed = routed
        self._shared = make_mlp(spec.shared, source, prefix, hidden_size)
        self._gate = None if spec.shared_gate is None else source.linear([prefix + spec.shared_gate], [1], hidden_size)

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        x = plain(x)
        shared = computed(self._shared(x))
        if self._gate is not None:
            shared = shared * by_rows(torch.sigmoid, self._gate(x)).to(x.dtype)
        return self._routed(x).add_(shared)


class SeparateExperts:
    """A mixture of experts: every token goes through the few experts that the router rates highest.

    Tokens are sorted by expert, so each expert that is needed does one product over all its tokens. That reads the
    counts on the host, which is free on the CPU; for a GPU there is StackedExperts. A rank that holds some of them
    gives their part of the sum.
    """

    def __init__(self, spec: Experts, source: Source, prefix: str, hidden_size: int) -> None:
        self._count = spec.num_experts
        self._chosen = spec.num_experts_per_token
        self._on_input = spec.on_input
        self._rating = Rating(spec, source, prefix, hidden_size)
        self._inner = _latent(spec, source, prefix, hidden_size)
        self._experts = _experts_of(spec, source, prefix, spec.latent_size or hidden_size)
        self._here = spec.here
        self._adapters = source.adapters

    def __call__(self, x: Tensor | Normed, rated: Tensor | None = None) -> Tensor:
        """[N, hidden] -> [N, hidden]. rated: what the router reads, if it is not x."""
        x = plain(x)
        experts, shares = self._rating.choice(self._rating.logits(x if rated is None else rated))
        experts = experts.view(-1)
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=self._count).tolist()
        if self._inner is not None:
            x = self._inner[0](x)
        first = sum(counts[: self._here.start])
        counts = counts[self._here.start : self._here.stop]
        own = order[first : first + sum(counts)]
        tokens = own // self._chosen
        inputs = x.index_select(0, tokens)
        if self._on_input:
            inputs = (inputs * shares.view(-1)[own][:, None]).to(x.dtype)
        adapters = self._adapters
        before, whose = (0, None) if adapters is None else (adapters.ids, adapters.chosen(tokens))
        parts, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                if adapters is not None and whose is not None:
                    adapters.use(whose[start : start + count])
                parts.append(computed(self._experts[expert](inputs[start : start + count])))
                start += count
        if adapters is not None and whose is not None:
            adapters.use(before)
        outputs = (x.new_empty if len(own) == len(order) else x.new_zeros)((len(order), x.shape[-1]))
        if parts:
            outputs.index_copy_(0, own, torch.cat(parts))
        # float32 times the model's dtype: a token's experts are added up in float32, the best rated first.
        weighted = outputs.view(-1, self._chosen, x.shape[-1])
        weighted = weighted.float() if self._on_input else weighted * shares[:, :, None]
        mixed = weighted.sum(dim=1).to(x.dtype)
        return mixed if self._inner is None else self._inner[1](mixed)


class AllExperts:
    """A GPU's form of experts that its kernels do not know, in plain torch: each computes every token, and counts with
    its share, mostly 0. The host knows no counts."""

    def __init__(self, spec: Experts, source: Source, prefix: str, hidden_size: int) -> None:
        assert not spec.on_input
        self._rating = Rating(spec, source, prefix, hidden_size)
        self._inner = _latent(spec, source, prefix, hidden_size)
        self._experts = _experts_of(spec, source, prefix, spec.latent_size or hidden_size)
        self._first = spec.here.start

    def __call__(self, x: Tensor | Normed, rated: Tensor | None = None) -> Tensor:
        """[N, hidden] -> [N, hidden]. rated: what the router reads, if it is not x."""
        x = plain(x)
        logits = self._rating.logits(x if rated is None else rated)
        experts, shares = self._rating.choice(logits)
        spread = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, experts, shares)
        if self._inner is not None:
            x = self._inner[0](x)
        total = torch.zeros_like(x, dtype=torch.float32)
        for number, expert in enumerate(self._experts, self._first):
            total.addcmul_(computed(expert(x)).float(), spread[:, number, None])
        mixed = total.to(x.dtype)
        return mixed if self._inner is None else self._inner[1](mixed)


class StackedExperts:
    """The same on a GPU, where the host knows no counts (ops/experts.py)."""

    def __init__(self, spec: Experts, source: Source, prefix: str, hidden_size: int) -> None:
        assert spec.gated and spec.latent_size is None
        self._rating = Rating(spec, source, prefix, hidden_size)
        self._on_input = spec.on_input
        self._mixture = make_mixture(spec, source, prefix, hidden_size)
        source.mixtures.append(self._mixture)

    def __call__(self, x: Tensor | Normed, rated: Tensor | None = None) -> Tensor:
        """[N, hidden] -> [N, hidden]. rated: what the router reads, if it is not x."""
        x = plain(x)
        logits = self._rating.logits(x if rated is None else rated)
        mix = self._rating.choice.mix_of_scaled if self._on_input else self._rating.choice.mix
        return mix(x, logits, self._mixture)


def make_mixture(spec: Experts, source: Source, prefix: str, hidden_size: int) -> Mixture:
    """The matrices of all experts that are held, gates first."""
    count, inner = len(spec.here), spec.intermediate_size
    ups = [prefix + name.format(number) for number in spec.here for name in spec.gate_up]
    downs = [prefix + spec.down.format(number) for number in spec.here]
    order, activation = None, cast(Activation, spec.activation)
    if spec.clamp is not None:
        activation = Clamped(spec.clamp.limit, spec.clamp.alpha)
        # Rows of gate and up alternate there.
        order = torch.arange(2 * inner).view(inner, 2).T.reshape(-1)
    if spec.mxfp4:
        gate_up = mxfp4_stack(source, prefix + spec.gate_up[0], count, 2 * inner, hidden_size, order)
        down = mxfp4_stack(source, prefix + spec.down, count, hidden_size, inner, None)
    else:
        gate_up = source.experts(ups, count, 2 * inner * count // len(ups), hidden_size, order=order)
        down = source.experts(downs, count, hidden_size, inner)
    biases: tuple[Tensor | None, Tensor | None] = None, None
    if spec.bias:
        rows = 2 * inner * count // len(ups)
        first = source.stacked([f"{name}.bias" for name in ups], [rows] * len(ups)).view(count, -1)
        first = first if order is None else permuted(first, order, 1)
        biases = first, source.stacked([f"{name}.bias" for name in downs], [hidden_size] * count).view(count, -1)
    options: Any = {"total": spec.num_experts, "held": spec.held}
    given = (count, spec.num_experts_per_token, gate_up, down, activation, source.dtype, biases)
    mixture = Mixture(*given, **options)
    above = source.adapted_experts(ups, count, 2 * inner * count // len(ups), hidden_size, order)
    below = source.adapted_experts(downs, count, hidden_size, inner, None)
    if above is not None and below is not None:
        mixture.adapted = above, below
    return mixture
