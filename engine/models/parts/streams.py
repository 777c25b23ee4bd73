"""A decoder whose layers pass several streams on (Gemma 3n): AltUp (arXiv 2301.13310), LAuReL and sparse gates.

Built at start by loading/; run by the executor's thread. Sums over the few streams are written out, so that a token's
bits do not depend on what is computed beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.parts.decoder import Decoder, Layer
from engine.models.parts.norm import make_norm
from engine.models.parts.source import PREFIX, Source
from engine.models.spec import ModelSpec, Streams
from engine.ops.activation import by_rows
from engine.ops.attention.base import AttentionBackend
from engine.ops.norm import Normed

# Of the mean square of a stream, before it is divided by.
SMALLEST = 1e-5


def make_decoder(spec: ModelSpec, source: Source, max_model_len: int) -> Decoder:
    """The decoder that the spec asks for."""
    return (Decoder if spec.streams is None else StreamDecoder)(spec, source, max_model_len)


class AltUp:
    """A layer's predictions of all streams from all, and their correction by what it computed from one of them."""

    def __init__(self, spec: Streams, source: Source, prefix: str, hidden_size: int) -> None:
        count = spec.count
        self._count, self._active = count, spec.active
        self._factor = 1 / hidden_size
        self._norm = make_norm(spec.router_norm, source, prefix, hidden_size)
        self._router = source.linear([f"{prefix}altup.modality_router"], [count], hidden_size)
        self._predict = source.linear([f"{prefix}altup.prediction_coefs"], [count * count], count)
        self._correct = source.linear([f"{prefix}altup.correction_coefs"], [count], count)

    def predict(self, streams: list[Tensor]) -> list[Tensor]:
        """[T, hidden] of every stream -> the same, anew."""
        shares = self._predict(self._routed(streams[self._active])).view(-1, self._count, self._count, 1)
        predicted = []
        for to, stream in enumerate(streams):
            total = streams[0] * shares[:, to, 0]
            for index in range(1, self._count):
                total = total.add_(streams[index] * shares[:, to, index])
            predicted.append(total.add_(stream))
        return predicted

    def correct(self, predicted: list[Tensor], computed: Tensor) -> list[Tensor]:
        """[T, hidden] of every stream, in their memory. computed: what the layer made of the active one."""
        shares = self._correct(self._routed(computed)) + 1.0
        news = computed - predicted[self._active]
        return [stream.add_(news * shares[:, index, None]) for index, stream in enumerate(predicted)]

    def _routed(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, streams], from -1 to 1."""
        return by_rows(torch.tanh, self._router(self._norm(x) * self._factor)).to(x.dtype).contiguous()


class Laurel:
    """x + norm(right(left(x))), of a small rank."""

    def __init__(self, spec: Streams, source: Source, prefix: str, hidden_size: int) -> None:
        self._left = source.linear([f"{prefix}laurel.linear_left"], [spec.rank], hidden_size)
        self._right = source.linear([f"{prefix}laurel.linear_right"], [hidden_size], spec.rank)
        self._norm = make_norm(spec.path_norm, source, prefix, hidden_size)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self._norm(self._right(self._left(x))).add_(x)


class StreamLayer:
    """A layer over all streams: its attention and feed-forward see the active one alone."""

    def __init__(self, spec: ModelSpec, layer: Layer, source: Source, prefix: str) -> None:
        assert spec.streams is not None and layer.end is not None
        hidden = spec.hidden_size
        self._layer, self._end = layer, layer.end
        self._active = spec.streams.active
        self._altup = AltUp(spec.streams, source, prefix, hidden)
        self._laurel = Laurel(spec.streams, source, prefix, hidden)
        # The file has it in any case.
        scale = source.tensor(f"{prefix}altup.correct_output_scale", (hidden,))
        self._output_scale = scale if spec.streams.scaled else None

    def __call__(
        self, streams: list[Tensor], own: Tensor, table: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> list[Tensor]:
        """[T, hidden] of every stream -> the same. own: what every layer is given of the tokens."""
        layer = self._layer
        assert layer.attention_out_norm is not None and layer.mlp_out_norm is not None
        predicted = self._altup.predict(streams)
        active = predicted[self._active]
        x = layer.input_norm(active)
        beside = self._laurel(x)
        y = layer.attention_out_norm(layer.attention(x, table, positions, attention))
        y = (y + active).add_(beside).mul_(0.5**0.5)
        made = layer.mlp_out_norm(layer.mlp(layer.mlp_norm(y))).add_(y)
        corrected = self._altup.correct(predicted, made)
        first = corrected[self._active]
        if self._output_scale is not None:
            first = first * self._output_scale
        added = self._end.added(first, own)
        return [stream if index == 0 else stream.add_(added) for index, stream in enumerate(corrected)]


class StreamDecoder(Decoder):
    """Streams begin as projections of the embedding, as large as it, and end as the mean of such projections."""

    def __init__(self, spec: ModelSpec, source: Source, max_model_len: int) -> None:
        super().__init__(spec, source, max_model_len)
        assert spec.streams is not None and spec.layer_input is not None
        hidden, others = spec.hidden_size, range(spec.streams.count - 1)
        self._stream_layers = [
            StreamLayer(spec, each, source, PREFIX + spec.layer_names.format(index))
            for index, each in enumerate(self._layers)
        ]
        self._into = [source.linear([f"{PREFIX}altup_projections.{index}"], [hidden], hidden) for index in others]
        self._out = [
            source.linear([f"{PREFIX}altup_unembed_projections.{index}"], [hidden], hidden) for index in others
        ]

    def _through_layers(
        self, residual: Tensor, own: Tensor | None, positions: Tensor, attention: AttentionBackend
    ) -> Tensor | Normed:
        assert own is not None
        streams = [residual, *(_as_large(project(residual), residual) for project in self._into)]
        for layer, (_, table, _) in zip(self._stream_layers, self._steps, strict=True):
            streams = layer(streams, own, table, positions, attention)
        total = streams[0].clone()
        for project, stream in zip(self._out, streams[1:], strict=True):
            total = total.add_(_as_large(project(stream), streams[0]))
        return self._norm.later(total.mul_(1 / len(streams)))


def _as_large(x: Tensor, pattern: Tensor) -> Tensor:
    """x [T, hidden] with the root mean square of every row of `pattern`."""
    wanted, has = (each.float().square().mean(dim=-1, keepdim=True) for each in (pattern, x))
    return (x * (wanted / has.clamp_min(SMALLEST)).sqrt()).to(x.dtype)
