"""What every layer adds of the token itself at its end, and the factor on what it gives (Gemma 4).

Run by the executor's thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.parts.norm import make_norm
from engine.models.parts.source import PREFIX, Source
from engine.models.spec import LayerInput
from engine.ops.activation import GATED_ACTIVATIONS


class OwnInputs:
    """What each layer gets of a token, from a table of its own and from the embedding."""

    def __init__(self, spec: LayerInput, num_layers: int, source: Source, hidden_size: int) -> None:
        width = num_layers * spec.size
        self._size = spec.size
        self._table = source.embedding(f"{PREFIX}{spec.table}.weight", spec.vocab_size, width)
        self._scale = torch.tensor(spec.size**0.5, dtype=source.dtype).item()
        self._projection = source.linear([PREFIX + spec.table_projection], [width], hidden_size)
        self._factor = hidden_size**-0.5
        self._norm = make_norm(spec.table_norm, source, PREFIX, spec.size)

    def __call__(self, token_ids: Tensor, embedded: Tensor) -> Tensor:
        """[T] and the embedding [T, hidden] -> [layers, T, size]."""
        # The table may be the shorter one: what it lacks are tokens of images and sounds.
        known = token_ids.masked_fill(token_ids >= self._table.out_features, 0)
        told = self._table.rows(known) * self._scale
        made = self._projection(embedded) * self._factor
        made = self._norm(made.view(-1, self._size)).view(told.shape)
        return ((made + told) * 0.5**0.5).view(len(token_ids), -1, self._size).transpose(0, 1).contiguous()


class LayerEnd:
    """x + norm(projection(activation(gate(x)) * own)), where the model has those, then times a factor.

    index: of the layer. prefix: of its tensors.
    """

    def __init__(
        self, spec: LayerInput | None, scale: str | None, source: Source, index: int, prefix: str, hidden_size: int
    ) -> None:
        self._index, self._spec = index, spec
        self._scale = None if scale is None else source.tensor(prefix + scale, (1,))
        if spec is not None:
            self._gate = source.linear([prefix + spec.gate], [spec.size], hidden_size)
            self._projection = source.linear([prefix + spec.projection], [hidden_size], spec.size)
            self._norm = make_norm(spec.norm, source, prefix, hidden_size)
            self._activate = GATED_ACTIVATIONS[spec.activation]

    def __call__(self, x: Tensor, own: Tensor | None) -> Tensor:
        """[T, hidden] and [layers, T, size] -> [T, hidden], in x's memory."""
        if self._spec is not None:
            assert own is not None
            x = x.add_(self.added(x, own))
        return x if self._scale is None else x.mul_(self._scale)

    def added(self, x: Tensor, own: Tensor) -> Tensor:
        """[T, hidden] -> norm(projection(activation(gate(x)) * own)), as wide."""
        gated = self._activate(torch.cat((self._gate(x), own[self._index]), 1))
        return self._norm(self._projection(gated))
