"""The parts of a decoder: norms, attention, MLP, mixture of experts.

Each part takes its tensors from a `Weights` when it is built and is a plain callable afterwards. Run by the
executor's thread; a layer issues few operations, for each costs 1 to 25 us of Python on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.config import ExpertsConfig, ModelConfig
from engine.models.rope import split_pairs
from engine.models.weights import Weights
from engine.ops.attention.base import AttentionBackend
from engine.ops.attention.device import HeadNorms, StepAttention
from engine.ops.experts import choose_experts, mix_experts
from engine.ops.linear import Linear, Product, computed
from engine.ops.norm import Normed, add_rms_norm, plain, rms_norm


class Norm:
    """RMS norm over the last dimension: x / sqrt(mean(x^2) + eps) * (offset + weight).

    With an offset the weight is kept in float32: 1 + weight would lose the weight's low bits in 16.
    """

    def __init__(self, weights: Weights, name: str, width: int, eps: float, offset: float = 0.0) -> None:
        self.eps = eps
        self.weight = weights.tensor(f"{name}.weight", (width,))
        if offset:
            self.weight = self.weight.float() + offset

    def __call__(self, x: Tensor | Product) -> Tensor:
        """[N, width] -> [N, width]."""
        return rms_norm(computed(x), self.weight, self.eps)

    def later(self, x: Tensor) -> Tensor | Normed:
        """The same, for a product to take."""
        return Normed(x, self.weight, self.eps)

    def add(self, x: Tensor | Product, residual: Tensor) -> tuple[Tensor | Normed, Tensor]:
        """x and residual [N, width] -> (norm of their sum, their sum). The sum takes the residual's memory."""
        if isinstance(x, Product):
            residual = x.add_to(residual)
            return self.later(residual), residual
        return add_rms_norm(x, residual, self.weight, self.eps)


class NoNorm(Norm):
    """Stands where a family has no norm: only the residual addition is left."""

    def __init__(self) -> None:
        pass

    def __call__(self, x: Tensor | Product) -> Tensor:
        return computed(x)

    def later(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor | Product, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = x.add_to(residual) if isinstance(x, Product) else residual.add_(x)
        return residual, residual


class Attention:
    """Fused projection to q, k and v, norms on q and k where the family has them, rope, attention, projection."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, prefix: str) -> None:
        names, dim = config.names, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self._layer = layer
        self._head_dim = dim
        self._heads = heads + 2 * kv_heads
        self._split = [heads, kv_heads, kv_heads]
        rope = config.rope
        order = split_pairs(heads + kv_heads, dim, rope.rotary_dim) if rope.interleaved else None
        rows = [heads * dim, kv_heads * dim, kv_heads * dim]
        self._qkv = weights.linear(
            [prefix + name for name in names.qkv],
            rows if len(names.qkv) == 3 else [sum(rows)],
            config.hidden_size,
            bias=config.qkv_bias,
            order=order,
        )
        self._output = weights.linear(
            [prefix + names.output], [config.hidden_size], heads * dim, bias=config.output_bias
        )
        self._q_norm: Norm | None = None
        self._k_norm: Norm | None = None
        self._head_norms: HeadNorms | None = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            eps, offset = config.rms_norm_eps, config.norm_offset
            q_width, k_width = (heads * dim, kv_heads * dim) if full else (dim, dim)
            self._q_norm = Norm(weights, prefix + names.q_norm, q_width, eps, offset)
            self._k_norm = Norm(weights, prefix + names.k_norm, k_width, eps, offset)
            self._norm_widths = (q_width, k_width)
            if not full:
                self._head_norms = (self._q_norm.weight, self._k_norm.weight, eps)

    def __call__(self, x: Tensor | Normed, table: Tensor, attention: AttentionBackend) -> Tensor | Product:
        """[T, hidden] -> [T, hidden]. table: of `rope_table`; the backend turns q and k by it as it goes."""
        q, k, v = self._qkv(x).view(-1, self._heads, self._head_dim).split_with_sizes(self._split, 1)
        if self._head_norms is not None and isinstance(attention, StepAttention):
            return self._output.later(attention.forward(self._layer, q, k, v, table, self._head_norms))
        if self._q_norm is not None and self._k_norm is not None:
            q_width, k_width = self._norm_widths
            q = self._q_norm(q.reshape(-1, q_width)).view(q.shape)
            k = self._k_norm(k.reshape(-1, k_width)).view(k.shape)
        return self._output.later(attention.forward(self._layer, q, k, v, table))


class Mlp:
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, config: ModelConfig, weights: Weights, gate_up: tuple[str, ...], down: str, inner: int) -> None:
        self._gate_up: Linear = weights.linear(
            gate_up,
            [inner, inner] if len(gate_up) == 2 else [2 * inner],
            config.hidden_size,
            bias=config.mlp_bias,
            activation=config.activation,
        )
        self._down: Linear = weights.linear([down], [config.hidden_size], inner, bias=config.mlp_bias)

    def __call__(self, x: Tensor | Normed) -> Tensor | Product:
        """[N, hidden] -> [N, hidden]."""
        return self._down.later(self._gate_up.gated(x))


def keeps_experts_stacked(device: torch.device) -> bool:
    """Whether all experts of a layer are one tensor: what a GPU's kernels read."""
    return device.type == "cuda"


class Experts:
    """A mixture of experts: every token goes through the few experts that the router rates highest.

    Tokens are sorted by expert, so each expert that is needed does one product over all its tokens. That reads the
    counts on the host, which is free on the CPU; for a GPU there is StackedExperts.
    """

    def __init__(self, config: ModelConfig, experts: ExpertsConfig, weights: Weights, prefix: str) -> None:
        names = config.names
        self._count = experts.num_experts
        self._chosen = experts.num_experts_per_token
        self._normalize = experts.normalize
        self._router = weights.linear([prefix + names.router], [experts.num_experts], config.hidden_size)
        self._experts = [
            Mlp(
                config,
                weights,
                tuple(prefix + name.format(number) for name in names.expert_gate_up),
                prefix + names.expert_down.format(number),
                experts.intermediate_size,
            )
            for number in range(experts.num_experts)
        ]

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        x = plain(x)
        experts, shares = choose_experts(self._router(x), self._chosen, normalize=self._normalize)
        experts = experts.view(-1)
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=self._count).tolist()
        inputs = x.index_select(0, order // self._chosen)
        parts, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                parts.append(computed(self._experts[expert](inputs[start : start + count])))
                start += count
        outputs = torch.empty_like(inputs).index_copy_(0, order, torch.cat(parts))
        # float32 times the model's dtype: a token's experts are added up in float32, the best rated first.
        weighted = outputs.view(-1, self._chosen, x.shape[-1]) * shares[:, :, None]
        return weighted.sum(dim=1).to(x.dtype)


class StackedExperts:
    """The same on a GPU, where the host knows no counts (ops/experts.py)."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig, weights: Weights, prefix: str) -> None:
        assert not config.mlp_bias, "experts with biases are not stacked yet"
        names, hidden = config.names, config.hidden_size
        count, inner = experts.num_experts, experts.intermediate_size
        self._chosen = experts.num_experts_per_token
        self._normalize = experts.normalize
        self._activation = config.activation
        self._router = weights.linear([prefix + names.router], [count], hidden)
        parts = [prefix + name.format(number) for number in range(count) for name in names.expert_gate_up]
        rows = [2 * inner * count // len(parts)] * len(parts)
        self._gate_up = weights.stacked([f"{part}.weight" for part in parts], rows, hidden)
        self._gate_up = self._gate_up.view(count, 2 * inner, hidden)
        downs = [f"{prefix + names.expert_down.format(number)}.weight" for number in range(count)]
        self._down = weights.stacked(downs, [hidden] * count, inner).view(count, hidden, inner)

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        x = plain(x)
        weights = self._gate_up, self._down
        return mix_experts(x, self._router(x), *weights, self._chosen, self._activation, normalize=self._normalize)


class Layer:
    """One decoder layer: the parts, put together by Decoder.forward."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        prefix = f"model.layers.{index}."
        names = config.names
        eps, offset, width = config.rms_norm_eps, config.norm_offset, config.hidden_size

        def norm(name: str | None) -> Norm:
            return Norm(weights, prefix + name, width, eps, offset) if name else NoNorm()

        self.input_norm = norm(names.input_norm)
        self.attention = Attention(config, weights, index, prefix)
        self.attention_out_norm = norm(names.attention_out_norm) if names.attention_out_norm else None
        self.mlp_norm = norm(names.mlp_norm)
        self.mlp: Mlp | Experts | StackedExperts
        if config.experts is not None and config.experts.layers[index]:
            kind = StackedExperts if keeps_experts_stacked(weights.device) else Experts
            self.mlp = kind(config, config.experts, weights, prefix)
        else:
            gate_up = tuple(prefix + name for name in names.gate_up)
            self.mlp = Mlp(config, weights, gate_up, prefix + names.down, config.intermediate_size)
        self.mlp_out_norm = norm(names.mlp_out_norm) if names.mlp_out_norm else None
