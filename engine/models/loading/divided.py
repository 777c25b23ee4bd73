"""Which part of every layer that adapters can change one of several ranks has, so that a rank takes its part of them.

Used at start, on the loading thread. The places are those of the whole model, by which an adapter's files are read.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.models.loading.adapted import AdaptedLayers, Heads, Part, Place, site_of
from engine.models.loading.slices import Plan
from engine.models.loading.weights import OUTPUT
from engine.models.parts.decoder import embedding_name


def divide(
    whole: AdaptedLayers, own: AdaptedLayers, plan: Plan, biases: Mapping[str, Tensor], *, is_first: bool
) -> None:
    """Give `whole`'s places this rank's parts, which are in `own`, and have `own` know them. biases: what is added to
    sums, by module."""
    ours = {(place.site, place.is_table): place for place in own.places.values()}
    of_site: dict[tuple[str, bool], list[tuple[str, Place]]] = defaultdict(list)
    for name, place in whole.places.items():
        of_site[place.site, place.is_table].append((name, place))
    for key, places in of_site.items():
        part = _part(places, ours.get(key), plan, biases, is_first=is_first)
        for name, place in places:
            whole.places[name] = dataclasses.replace(place, part=part)
    own.whole = whole


def _part(
    places: list[tuple[str, Place]], mine: Place | None, plan: Plan, biases: Mapping[str, Tensor], *, is_first: bool
) -> Part:
    """Of a site, given its modules."""
    if mine is None:  # of an expert that another rank has
        return Part(None)
    module, first = places[0]
    if isinstance(heads := first.linear, Heads):
        rows_of_heads = plan.tensors[f"{module}.weight"]
        begin, end = (row // (heads.keys + heads.values) for row in rows_of_heads)
        return Part(mine.linear, heads=(begin, end))
    if first.is_table:
        is_divided = f"{module}.weight" == embedding_name(plan.spec)
        return Part(mine.linear, tokens=plan.vocabulary if is_divided else None)
    rows = [
        torch.arange(place.first + begin, place.first + end)
        for name, place in sorted(places, key=lambda each: each[1].first)
        for begin, end in ([plan.vocabulary] if name == OUTPUT else plan.rows.get(name, [(0, place.count)]))
    ]
    held = torch.cat(rows)
    columns = plan.columns.get(module)
    part = Part(
        mine.linear,
        mine.order,
        None if len(held) == first.linear.out_features else held,
        None if columns is None else columns[:2],
        bias=biases.get(module),
        is_first=is_first or columns is None,
    )
    inputs = first.linear.in_features if columns is None else columns[1] - columns[0]
    assert (len(held), inputs) == (mine.linear.out_features, mine.linear.in_features), f"parts of {site_of(module)}"
    return part
