"""A directory that peft wrote -> what an executor puts into the layers of a model.

Called off the event loop, on any thread. Every tensor of the file is used, or is a copy of the base's, or is an error
that names it: an adapter is served as it was trained or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.lora.base import (
    base_bias,
    base_of,
    base_rows,
    factors_here,
    is_here,
    outputs_here,
    own_rows,
    tokens_here,
    vector_here,
)
from engine.lora.config import NAME as CONFIG
from engine.lora.config import AdapterConfig, read_config
from engine.lora.files import PICKLED, SAFETENSORS, Tensors
from engine.lora.names import OUTPUTS, Resolver, Stack, parse
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers, Heads, Place
from engine.models.loading.weights import OUTPUT
from engine.ops.linear import Linear
from engine.ops.lora import Branch, Factors, Replaced

ON_HOST = "is computed on the CPU alone so far (--device cpu)"
# Kinds of tensors that are in place of a layer's own.
WHOLE = ("weight", "tokens")
# Rows of a base weight that are held as float32 at once.
CHUNK = 1024
MAX_NAME = 100
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedWeights:
    """See words.AdapterWeights. branches: by the names of sites (AdaptedLayers). from_base: parts of them were made
    with the base's own weights (DoRA, biases), so other base weights need another reading."""

    rank: int
    num_bytes: int
    base_model_name: str
    branches: Mapping[str, Branch]
    from_base: bool
    digest: str


@dataclass(slots=True)
class _Parts:
    """What is gathered for a site, in the checkpoint's order of outputs."""

    place: Place
    factors: list[Factors] = field(default_factory=list)
    gain: Tensor | None = None
    offset: Tensor | None = None
    replaced: list[Replaced] = field(default_factory=list)
    table: dict[int, int] | None = None
    table_rows: Tensor | None = None
    magnitude: bool = False


# Of one of several ranks: vectors of all ranks, added up.
AddUp = Callable[[Tensor], Tensor]


def read_adapter(directory: Path, layers: AdaptedLayers, max_rank: int, add_up: AddUp | None = None) -> LoadedWeights:
    """The adapter of a directory for this model. max_rank: of any of its modules. add_up: where layers are those of a
    rank, of which the result is its part; all ranks read at once. Raises AdapterError."""
    name = directory.name if len(directory.name) <= MAX_NAME else directory.name[: MAX_NAME - 3] + "..."
    name = name.encode("unicode_escape").decode()
    if not directory.is_dir():
        raise AdapterError(f"adapter {name}: there is no such directory")
    before = _state(directory)
    config = read_config(directory, name)
    digest = _digest(directory)
    weights = _Reader(config, Tensors(directory, name), layers, max_rank, digest, add_up).read()
    if _state(directory) != before:
        raise AdapterError(f"adapter {name}: its files were changed while they were read; load it again")
    return weights


def _digest(directory: Path) -> str:
    """Of the bytes of those files."""
    digest = hashlib.sha256()
    for name in (CONFIG, SAFETENSORS, PICKLED):
        # What cannot be opened is said of the file when it is read.
        with contextlib.suppress(OSError), (directory / name).open("rb") as file:
            digest.update(f"{name} {os.fstat(file.fileno()).st_size} ".encode())
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def _state(directory: Path) -> list[tuple[int, int, int] | None]:
    """Of the files that an adapter is made of: half of an old one and half of a new one are no adapter."""
    found: list[tuple[int, int, int] | None] = []
    for name in (CONFIG, SAFETENSORS, PICKLED):
        try:
            state = (directory / name).stat()
            found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


class _Reader:
    def __init__(
        self,
        config: AdapterConfig,
        tensors: Tensors,
        layers: AdaptedLayers,
        max_rank: int,
        digest: str,
        add_up: AddUp | None,
    ) -> None:
        self._config, self._tensors, self._layers, self._max_rank = config, tensors, layers, max_rank
        self._digest, self._add_up = digest, add_up
        self._resolver = Resolver(layers)
        self._sites: dict[str, _Parts] = {}
        self._branches: dict[str, Branch] = {}
        self._rank = 0
        self._from_base = False
        self._told_of_output: set[str] = set()

    def read(self) -> LoadedWeights:
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._tensors.names:
            parsed = parse(name)
            if parsed is None:
                reason = "is cut from the base's own weights (KaSA)" if name.endswith(".lora_diag") else "is not known"
                raise self._tensors.fail(name, reason)
            path, kind = parsed
            if kind in modules[path]:
                raise self._tensors.fail(name, f"stands twice, beside {modules[path][kind]!r:.200}")
            modules[path][kind] = name
        # peft writes what is tied twice, for both layers that have it.
        self._told_of_output = {kind for path in modules if path in OUTPUTS for kind in modules[path]}
        for path, kinds in modules.items():
            self._module(path, kinds)
        if not self._sites and not self._branches:
            raise AdapterError(f"adapter {self._config.adapter}: changes nothing")
        here = {site: parts for site, parts in self._sites.items() if is_here(parts.place)}
        branches = {site: self._branch(parts) for site, parts in here.items()} | self._branches
        size = sum(branch.num_bytes for branch in branches.values())
        base = self._config.base_model_name
        return LoadedWeights(self._rank, size, base, branches, self._from_base, self._digest)

    def _module(self, path: str, kinds: dict[str, str]) -> None:
        """All tensors of one module."""
        kinds = {kind: name for kind, name in kinds.items() if kind != "copy"}
        if not kinds:
            return
        first = next(iter(kinds.values()))
        place = self._resolver.find(path)
        if place is None:
            stack = self._resolver.stack(path)
            if stack is None:
                raise self._tensors.fail(first, self._why_unknown(path))
            self._stack(path, stack, kinds)
            return
        self._check_device(path, place, kinds)
        for one, other in (("down", "up"), ("looked-up down", "looked-up up")):
            for has, lacks in ((one, other), (other, one)):
                if has in kinds and lacks not in kinds:
                    raise self._tensors.fail(kinds[has], "its other factor is missing")
        for kind, needs in (("up bias", "down"), ("magnitude", "down"), ("magnitude", "looked-up down")):
            if kind in kinds and "down" not in kinds and "looked-up down" not in kinds:
                raise self._tensors.fail(kinds[kind], f"there are no factors beside it ({needs})")
        if place.is_table:
            self._table(path, place, kinds)
            return
        others = set(kinds) - {"down", "up"}
        if isinstance(place.linear, Heads) and others:
            kind = others.pop()
            raise self._tensors.fail(kinds[kind], f"{kind} is not computed for what latent attention splits into heads")
        if any(kind.startswith("looked-up") for kind in kinds):
            raise self._tensors.fail(first, "is of an embedding, and the module is none")
        if "weight" in kinds:
            self._replace(place, kinds)
        elif "bias" in kinds:
            self._bias(place, kinds["bias"])
        if "down" in kinds:
            self._factors(path, place, kinds)
        elif self._config.dora and "magnitude" in kinds:
            raise self._tensors.fail(kinds["magnitude"], "there are no factors beside it")
        if "tokens" in kinds:
            self._token_outputs(path, place, kinds["tokens"])

    def _check_device(self, path: str, place: Place, kinds: dict[str, str]) -> None:
        """A GPU takes whole matrices of some layers, and nothing for others."""
        served = self._layers.on_device
        if served is None:
            return
        for kind, name in kinds.items():
            if place.site not in served:
                raise self._tensors.fail(name, f"what is added to {path!r:.200} {ON_HOST}")
            if kind in WHOLE and place.site not in self._layers.whole_on_device:
                raise self._tensors.fail(name, f"a whole matrix in a layer of the decoder {ON_HOST}")

    def _why_unknown(self, path: str) -> str:
        outside = self._layers.spec.outside
        if any(f"{each}" in path for each in outside):
            return "is of a part that is not served here (other inputs than text, a pooler, layers that draft)"
        if self._resolver.is_known_layer(path):
            return "the layer has no such part that an adapter can change here"
        return "the model has no such module; is the adapter of another base?"

    # ---- linear layers

    def _factors(self, path: str, place: Place, kinds: dict[str, str]) -> None:
        """B A of one module, and its magnitudes and bias."""
        inputs = place.linear.in_features
        down = self._matrix(kinds["down"], (None, inputs))
        up = self._matrix(kinds["up"], (place.count, len(down)))
        scaling = self._scaling(path, kinds["down"], len(down))
        if isinstance(place.linear, Heads):
            self._heads(place, down, up.mul_(scaling))
            return
        self._add_factors(place, kinds, down, up.mul_(scaling), scaling)

    def _heads(self, place: Place, down: Tensor, up: Tensor) -> None:
        """B A of a module that latent attention multiplies head by head, its rows for keys turned."""
        heads = place.linear
        assert isinstance(heads, Heads)
        by_head = up.view(heads.count, heads.keys + heads.values, -1)
        if place.part is not None and place.part.heads is not None:
            by_head = by_head[slice(*place.part.heads)]
        turned = down.T.contiguous()
        for head, own in enumerate(by_head):
            keys, values = own.split_with_sizes([heads.keys, heads.values])
            key = Factors(0, keys.T.contiguous(), turned)
            self._branches[heads.key_site(head)] = Branch(heads.keys, heads.in_features, [key])
            value = Factors(0, down, values.contiguous())
            self._branches[heads.value_site(head)] = Branch(heads.in_features, heads.values, [value])

    def _add_factors(self, place: Place, kinds: dict[str, str], down: Tensor, up: Tensor, scaling: float) -> None:
        parts = self._parts(place)
        added = None
        if "up bias" in kinds:
            added = self._vector(kinds["up bias"], place.count) * scaling
        if "magnitude" in kinds:
            magnitude = self._vector(kinds["magnitude"], place.count)
            factor = magnitude / self._norms(kinds["magnitude"], place, down, up)
            if not bool(factor.isfinite().all()):
                raise self._tensors.fail(kinds["magnitude"], "is for a row of weights that are all 0")
            up = up * factor[:, None]
            added = None if added is None else added * factor
            self._add(place, "gain", factor - 1)
            bias = base_bias(place) if is_here(place) else None
            if bias is not None:
                self._add(place, "offset", (1 - factor) * bias)
            self._from_base = True
        elif self._config.dora:
            raise self._tensors.fail(kinds["down"], "use_dora is set, and its lora_magnitude_vector is missing")
        parts.factors.append(Factors(place.first, down, up))
        if added is not None:
            self._add(place, "offset", added)

    def _norms(self, name: str, place: Place, down: Tensor, up: Tensor) -> Tensor:
        """float32 [count]: of the rows of W + B A. up: scaled."""
        # Of those that another rank has: anything.
        norms = torch.ones(place.count)
        if not is_here(place):
            return norms
        ours, theirs = own_rows(place)
        columns = None if place.part is None else place.part.columns
        if columns is not None:
            down = down[:, slice(*columns)]
        for at in range(0, len(ours), CHUNK):
            rows = base_rows(base_of(place), ours[at : at + CHUNK])
            if rows is None:
                raise self._tensors.fail(name, "DoRA needs the base's weights, and this layer's cannot be read back")
            norms[theirs[at : at + CHUNK]] = (rows + up[theirs[at : at + CHUNK]] @ down).norm(dim=1)
        if columns is None:
            return norms
        assert self._add_up is not None
        return self._add_up(norms.square()).sqrt()

    def _bias(self, place: Place, name: str) -> None:
        """One that replaces the base's."""
        bias = self._vector(name, place.count)
        part = place.part
        before: Tensor | None
        if part is not None and part.bias is not None:
            before = part.bias.cpu()
        elif not is_here(place) or (part is not None and part.columns is not None and not part.is_first):
            before = torch.zeros(place.count)  # another rank's to add
        else:
            before = base_bias(place)
        if before is None:
            raise self._tensors.fail(name, "the base has no bias there; is the adapter of another base?")
        self._from_base = True
        self._add(place, "offset", bias - before)

    def _replace(self, place: Place, kinds: dict[str, str]) -> None:
        """A whole matrix of the adapter's own (modules_to_save)."""
        weight = self._matrix(kinds["weight"], (place.count, place.linear.in_features))
        own = self._vector(kinds["bias"], place.count) if "bias" in kinds else None
        parts, part = self._parts(place), place.part
        if not is_here(place):
            return
        bias = base_bias(place) if own is None else own
        if part is not None and part.columns is not None:  # a part of a sum, beside which a bias is added once
            weight = weight[:, slice(*part.columns)]
            if not part.is_first:
                bias = None
            elif part.bias is not None:
                bias = None if own is None else own - part.bias.cpu()
        self._from_base = self._from_base or (bias is not None and bias is not own)
        ours, theirs = own_rows(place)
        linear = Linear(weight[theirs].contiguous(), None if bias is None else bias[theirs].contiguous())
        linear.prepare(deterministic=True)
        parts.replaced.append(Replaced(ours, linear))

    def _token_outputs(self, path: str, place: Place, name: str) -> None:
        """Rows of the output layer (trainable tokens)."""
        ids = self._ids_of(path, name, place.count)
        rows = self._matrix(name, (len(ids), place.linear.in_features))
        self._replace_outputs(place, ids, rows)

    def _replace_outputs(self, place: Place, ids: tuple[int, ...], rows: Tensor) -> None:
        parts = self._parts(place)  # also where other ranks have all of these tokens
        own, rows = outputs_here(place, torch.tensor(ids), rows)
        if not len(own):
            return
        linear = Linear(rows.contiguous())
        linear.prepare(deterministic=True)
        parts.replaced.append(Replaced(own, linear))

    # ---- embeddings

    def _table(self, path: str, place: Place, kinds: dict[str, str]) -> None:
        """What is of an embedding; a tied output layer follows where peft has it so."""
        width, count = place.linear.in_features, place.count
        output = self._layers.places.get(OUTPUT)
        spec = self._layers.spec
        tied = output if spec.tie_word_embeddings else None
        unused = set(kinds) - {"weight", "looked-up down", "looked-up up", "tokens"}
        if unused:
            kind = unused.pop()
            raise self._tensors.fail(kinds[kind], f"{kind} is not computed for an embedding here")
        parts = self._parts(place)
        if "weight" in kinds:
            parts.table_rows = self._matrix(kinds["weight"], (count, width))
            if tied is not None and self._config.ensure_tying and "weight" not in self._told_of_output:
                self._replace_outputs(tied, tuple(range(count)), parts.table_rows.clone())
        if "looked-up down" in kinds:
            down = self._matrix(kinds["looked-up down"], (None, count))
            up = self._matrix(kinds["looked-up up"], (width, len(down)))
            up = up.mul_(self._scaling(path, kinds["looked-up down"], len(down)))
            parts.factors.append(Factors(0, down, up))
            if tied is not None and self._config.ensure_tying and "down" not in self._told_of_output:
                self._parts(tied).factors.append(Factors(0, up.T.contiguous(), down.T.contiguous()))
        if "tokens" in kinds:
            ids = self._ids_of(path, kinds["tokens"], count)
            parts.table = {token: row for row, token in enumerate(ids)}
            parts.table_rows = self._matrix(kinds["tokens"], (len(ids), width))
            listed = [module for module in self._config.token_ids if module]
            own = {self._config.token_ids[module] for module in listed}
            if (
                "tokens" not in self._told_of_output
                and tied is not None
                and (len(own) < 2 or self._config.ensure_tying)
            ):
                self._replace_outputs(tied, ids, parts.table_rows)

    def _ids_of(self, path: str, name: str, count: int) -> tuple[int, ...]:
        """The token ids that rows are of."""
        by_module = self._config.token_ids
        ids = next((ids for module, ids in by_module.items() if module and f".{path}".endswith(f".{module}")), None)
        ids = by_module.get("") if ids is None else ids
        if ids is None:
            raise self._tensors.fail(name, "trainable_token_indices names no tokens for it")
        if max(ids) >= count:
            raise self._tensors.fail(name, f"is for token {max(ids)}, and the vocabulary has {count}")
        return ids

    # ---- experts

    def _stack(self, path: str, stack: Stack, kinds: dict[str, str]) -> None:
        """Factors of all experts of a layer: A [experts * rank, in], B [out, rank * experts]."""
        extra = set(kinds) - {"down", "up"}
        if extra:
            raise self._tensors.fail(kinds[extra.pop()], "is not computed for experts that are stacked")
        for has, lacks in (("down", "up"), ("up", "down")):
            if lacks not in kinds:
                raise self._tensors.fail(kinds[has], "its other factor is missing")
        down, up = self._tensors.get(kinds["down"]), self._tensors.get(kinds["up"])
        count = stack.count
        rank = len(down) // count if down.dim() == 2 else 0
        if down.dim() != 2 or up.dim() != 2 or not rank or len(down) != count * rank or up.shape[1] != count * rank:
            raise self._tensors.fail(
                kinds["down"], f"{list(down.shape)} beside B {list(up.shape)} is not of {count} experts"
            )
        which, turned = self._which(path, stack, kinds["down"], down.shape[1], len(up))
        parameter = stack.parameters[which]
        module = f"{path.removesuffix('.base_layer')}.{parameter}"
        wanted = self._config.rank_of(module)
        # Gate and up that were adapted apart, each with the rank asked for, become one of twice that.
        twice = which == 0 and rank == 2 * wanted
        if rank != wanted and not twice:
            raise self._tensors.fail(kinds["down"], f"has rank {rank}, and {wanted} is asked for")
        scaling = self._config.scaling_of(module, wanted)
        self._check_rank(kinds["down"], wanted)
        downs = down.view(count, rank, -1)
        ups = up.view(len(up), rank, count).permute(2, 0, 1) * scaling
        places = stack.down if which else stack.gate_up
        for own, a, b in zip(places, downs, ups, strict=True):
            if turned:
                a, b = b.T, a.T
            self._one_expert(own, a.contiguous(), b.contiguous())

    def _one_expert(self, places: tuple[Place, ...], down: Tensor, up: Tensor) -> None:
        together = places[0].site == places[-1].site
        if together and sum(each.count for each in places) == len(up):
            self._parts(places[0]).factors.append(Factors(places[0].first, down, up))
            return
        at = 0
        for place in places:
            self._parts(place).factors.append(Factors(place.first, down, up[at : at + place.count]))
            at += place.count

    def _which(self, path: str, stack: Stack, name: str, inputs: int, outputs: int) -> tuple[int, bool]:
        """0 for gate and up, 1 for down; and whether the parameter has inputs before outputs, and was taken turned."""
        fits = []
        for which, places in enumerate((stack.gate_up, stack.down)):
            if not places:
                continue
            into, out = places[0][0].linear.in_features, sum(each.count for each in places[0])
            if (inputs, outputs) == (into, out):
                fits.append((which, False))
            elif (inputs, outputs) == (out, into):
                fits.append((which, True))
        if not fits:
            raise self._tensors.fail(name, f"a factor of {inputs} inputs and {outputs} outputs fits no expert's matrix")
        if len({which for which, _ in fits}) > 1:
            named = {parameter.rsplit(".", 1)[-1] for parameter in self._config.targets}
            only = [which for which, parameter in enumerate(stack.parameters) if parameter in named]
            inner = path.endswith(".base_layer")
            wanted = only[0] if len(only) == 1 and not inner else 0 if inner else 1
            fits = [each for each in fits if each[0] == wanted]
        return fits[0]

    # ---- what all share

    def _scaling(self, path: str, name: str, rank: int) -> float:
        wanted = self._config.rank_of(path)
        if rank != wanted:
            raise self._tensors.fail(name, f"has rank {rank}, and {wanted} is asked for")
        self._check_rank(name, rank)
        return self._config.scaling_of(path, rank)

    def _check_rank(self, name: str, rank: int) -> None:
        if rank > self._max_rank:
            raise self._tensors.fail(name, f"LoRA rank {rank} is greater than max_lora_rank {self._max_rank}")
        self._rank = max(self._rank, rank)

    def _parts(self, place: Place) -> _Parts:
        return self._sites.setdefault(place.site, _Parts(place))

    def _add(self, place: Place, what: str, values: Tensor) -> None:
        """To `gain` or `offset` of the outputs of a place."""
        parts = self._parts(place)
        vector = getattr(parts, what)
        if vector is None:
            vector = torch.zeros(place.linear.out_features)
            setattr(parts, what, vector)
        vector[place.first : place.first + place.count] += values

    def _matrix(self, name: str, shape: tuple[int | None, int]) -> Tensor:
        """A tensor of that shape; None is any number of rows, at least one and not more than a rank may be."""
        has = self._tensors.shape(name)
        fits = len(has) == 2 and has[1] == shape[1] and (has[0] == shape[0] if shape[0] is not None else has[0] > 0)
        if not fits:
            wanted = ", ".join("rank" if each is None else str(each) for each in shape)
            raise self._tensors.fail(
                name, f"has shape {list(has)}, and the base has room for [{wanted}]; is the adapter of another base?"
            )
        return self._tensors.get(name)

    def _vector(self, name: str, count: int) -> Tensor:
        values = torch.atleast_1d(self._tensors.get(name).squeeze())
        if values.shape != (count,):
            raise self._tensors.fail(
                name, f"has shape {list(self._tensors.shape(name))}, and the base has room for [{count}]"
            )
        return values

    def _branch(self, parts: _Parts) -> Branch:
        place, part = parts.place, parts.place.part
        linear, order = (place.linear, place.order) if part is None else (base_of(place), part.order)
        table, table_rows = tokens_here(place, parts.table, parts.table_rows)
        return Branch(
            linear.in_features,
            linear.in_features if place.is_table else linear.out_features,
            factors_here(place, parts.factors),
            gain=vector_here(place, parts.gain),
            offset=vector_here(place, parts.offset) if part is None or part.is_first else None,
            order=order,
            replaced=parts.replaced,
            looked_up=place.is_table,
            table=table,
            table_rows=table_rows,
        )
