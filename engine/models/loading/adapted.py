"""Layers that LoRA adapters can change: a source that puts an AdaptedLinear around every linear layer it gives.

Used at start, on the loading thread. Parts ask it as they ask any source, so every family goes through here alike; what
it notes (AdaptedLayers) is what adapters are read against (engine/lora/) and where the executor puts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.models.loading.weights import OUTPUT, PIECE
from engine.models.parts.decoder import embedding_name
from engine.models.parts.source import Source
from engine.models.spec import ModelSpec
from engine.ops.heads import HeadLinear
from engine.ops.linear import Linear
from engine.ops.lora import AdaptedHeads, AdaptedLinear, Branch, Rows, Site, StackedSites
from engine.ops.mxfp4 import Mxfp4Linear


@dataclass(frozen=True, slots=True)
class Heads:
    """A module that is never multiplied as a whole: for each of `count` heads it has `keys` rows, whose turned matrix
    has the site of `key_site`, and `values` rows, of which `value_site` is."""

    name: str
    in_features: int
    count: int
    keys: int
    values: int

    @property
    def out_features(self) -> int:
        return self.count * (self.keys + self.values)

    def key_site(self, head: int) -> str:
        """Its name."""
        return f"{self.name}.keys.{head}"

    def value_site(self, head: int) -> str:
        """Its name."""
        return f"{self.name}.values.{head}"


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """Of each of a layer's experts, which a GPU multiplies together."""

    in_features: int
    out_features: int


Layer = Linear | Mxfp4Linear | Heads | ExpertMatrix


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one of several ranks has of a place's layer. linear, order: its own, as in Place; None where it has nothing.
    rows int64 [outputs]: which outputs of the whole layer its own are, as the checkpoint orders them, ascending; None
    for all. columns: the inputs that it reads, [first, end), where products are added up over the ranks; None for all.
    tokens: of an embedding, those it has the rows of. heads: of Heads. bias: float32, what is added to the sum of all.
    is_first: what is added once in all is this rank's to add."""

    linear: Layer | None
    order: Tensor | None = None
    rows: Tensor | None = None
    columns: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    bias: Tensor | None = None
    is_first: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A module of the checkpoint in our layers: outputs [first, first + count) of `linear`, as the checkpoint orders
    them. site: by name, where its branches go. order: of all outputs, as Source.linear has it. is_table: an embedding.
    part: where this is one of several ranks, what it has; `linear` then has a shape and no numbers.
    """

    site: str
    linear: Layer
    first: int
    count: int
    order: Tensor | None = None
    is_table: bool = False
    part: Part | None = None


def site_of(name: str) -> str:
    """The module that the site of a layer is called by; a rank may have pieces of it (slices.py)."""
    return name.partition(PIECE)[0]


class AdaptedLayers:
    """All places of a model by the names of their modules, `model.layers.0.self_attn.q_proj` and so on.

    spec: of the model. capacity: adapters that may be in place at once, indices 1..capacity. rows: whose each row is.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        self.spec, self.capacity = spec, capacity
        self.rows = Rows()
        self.places: dict[str, Place] = {}
        self.sites: dict[str, Site] = {}
        # Of experts that are one tensor.
        self.stacks: list[StackedSites] = []
        # On a GPU the sites whose adapters it computes; None where the host does, and all.
        self.on_device: frozenset[str] | None = None
        # And of them those that may have whole matrices of an adapter.
        self.whole_on_device: frozenset[str] = frozenset()
        # Where this is one of several ranks: all places of the checkpoint, each with this rank's part (divided.py).
        self.whole: AdaptedLayers | None = None
        self._held: dict[int, Mapping[str, Branch]] = {}

    def site(self, name: str) -> Site:
        """A new one of that name."""
        assert name not in self.sites
        self.sites[name] = Site(self.capacity, self.rows)
        return self.sites[name]

    def put(self, index: int, branches: Mapping[str, Branch]) -> None:
        """An adapter takes an index: its branches by the names of their sites. Whoever had it is gone."""
        for name in self._held.get(index, {}):
            self.sites[name].put(index, None)
        self._held[index] = branches
        for name, branch in branches.items():
            self.sites[name].put(index, branch)

    def take_over(self, other: AdaptedLayers) -> None:
        """Hold what another model of the same spec held."""
        for index, branches in other._held.items():
            self.put(index, branches)


class AdaptedSource:
    """A Source whose layers are another's, each with places for adapters around it."""

    def __init__(self, source: Source, layers: AdaptedLayers) -> None:
        self._source, self.layers = source, layers
        self.adapters = layers.rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def linear(
        self, names: Sequence[str], rows: Sequence[int], columns: int, *, order: Tensor | None = None, **options: Any
    ) -> Linear:
        """See Source.linear."""
        base = self._source.linear(names, rows, columns, order=order, **options)
        return self._adapted(base, names, rows, order)

    def adapted(self, layer: Linear, name: str) -> Linear:
        """See Source.adapted."""
        return self._adapted(layer, [name], [layer.out_features], None)

    def adapted_heads(
        self, name: str, to_latent: HeadLinear, to_value: HeadLinear
    ) -> tuple[AdaptedHeads, AdaptedHeads]:
        """See Source.adapted_heads."""
        heads = Heads(name, to_latent.out_features, to_latent.heads, to_latent.in_features, to_value.out_features)
        self.layers.places[name] = Place(name, heads, 0, heads.out_features)
        keys, values = (
            [self.layers.site(name_of(head)) for head in range(heads.count)]
            for name_of in (heads.key_site, heads.value_site)
        )
        return AdaptedHeads(to_latent, keys), AdaptedHeads(to_value, values)

    def adapted_experts(
        self, names: Sequence[str], count: int, rows: int, columns: int, order: Tensor | None
    ) -> StackedSites:
        """See Source.adapted_experts."""
        layers, each = self.layers, len(names) // count
        matrix = ExpertMatrix(columns, each * rows)
        for place, name in enumerate(names):
            site, nth = site_of(names[place // each * each]), place % each
            layers.places[name] = Place(site, matrix, nth * rows, rows, order)
        stack = StackedSites(layers.rows, [site_of(name) for name in names[::each]])
        for name in stack.names:
            layers.site(name)
        layers.stacks.append(stack)
        return stack

    def embedding(self, name: str, count: int, width: int) -> Linear:
        """See Source.embedding."""
        return self._table(self._source.embedding(name, count, width), None, name.removesuffix(".weight"))

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """See Source.output_layer."""
        base = self._source.output_layer(vocab, hidden, tied=tied, bias=bias)
        if not tied:
            return self._adapted(base, [OUTPUT], [vocab], None)
        site = self.layers.site(OUTPUT)
        self.layers.places[OUTPUT] = Place(OUTPUT, base, 0, vocab)
        return self._table(base, site, embedding_name(self.layers.spec).removesuffix(".weight"))

    def _adapted(self, base: Linear, names: Sequence[str], rows: Sequence[int], order: Tensor | None) -> Linear:
        name_of_site = site_of(names[0])
        site, first = self.layers.site(name_of_site), 0
        for name, count in zip(names, rows, strict=True):
            self.layers.places[name] = Place(name_of_site, base, first, count, order)
            first += count
        return AdaptedLinear(base, site)

    def _table(self, base: Linear, product: Site | None, name: str) -> Linear:
        self.layers.places[name] = Place(name, base, 0, base.out_features, is_table=True)
        return AdaptedLinear(base, product, self.layers.site(name))
