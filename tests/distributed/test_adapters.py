"""Parts of LoRA adapters make the whole, for every kind of layer that ranks divide: products, tables, experts."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.distributed.adapters import FollowedAdapters, LeadingAdapters
from engine.distributed.ring import Ring
from engine.executor.reading import MAX_LINE
from engine.lora.base import base_bias
from engine.lora.reader import read_adapter
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers, Heads
from engine.models.loading.weights import OUTPUT
from engine.ops.ranks import Ranks, RanksEndedError
from tests.distributed.test_slices import FAMILIES, SIZES
from tests.distributed.together import load_part, together
from tests.lora.handmade import PREFIX, factors, write
from tests.models.support import Runner, load, make_checkpoint, prompts_of, relative_error

EXPERTS = ("experts", "shared experts", "clamped experts, sinks")


def adapter(layers: AdaptedLayers, folder: Path, name: str) -> Path:
    """Factors for all modules, magnitudes where the base's numbers can be had, and rows of an embedding."""
    torch.manual_seed(len(name))
    tensors = factors(layers, 3, len(name))
    places = layers.places.values()
    magnitudes = not any(isinstance(each.linear, Heads) or (each.is_table and each.site == OUTPUT) for each in places)
    for module, place in layers.places.items():
        if place.is_table:
            width, vocab = place.linear.in_features, place.count
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = torch.randn(3, vocab) * 0.1
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = torch.randn(width, 3)
        elif isinstance(place.linear, Heads):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(3, place.linear.in_features) * 0.3
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(place.count, 3)
        elif magnitudes:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.rand(place.count) + 0.5
    return write(folder / "adapter", tensors, r=3, lora_alpha=6, use_dora=magnitudes)


def whole_matrices(layers: AdaptedLayers, folder: Path, name: str) -> Path:
    """Matrices of the adapter's own for layers that ranks add up and others, with biases where the base has some."""
    draw = torch.Generator().manual_seed(len(name))
    tensors, kinds = {}, set()
    for module, place in layers.places.items():
        if place.is_table or isinstance(place.linear, Heads) or module == "lm_head":
            continue
        kinds.add(module.rpartition(".")[2])
        shape = place.count, place.linear.in_features
        tensors[f"{PREFIX}{module}.weight"] = torch.randn(*shape, generator=draw) * 0.1
        if name == "biases" and base_bias(place) is not None:
            tensors[f"{PREFIX}{module}.bias"] = torch.randn(place.count, generator=draw)
    return write(folder / "adapter", tensors, r=3, lora_alpha=6, modules_to_save=sorted(kinds))


def biases(layers: AdaptedLayers, folder: Path, name: str) -> Path:
    """Biases that replace the base's."""
    draw = torch.Generator().manual_seed(len(name))
    tensors = factors(layers, 3, len(name))
    for module, place in layers.places.items():
        if not place.is_table and not isinstance(place.linear, Heads) and base_bias(place) is not None:
            tensors[f"{PREFIX}{module}.base_layer.bias"] = torch.randn(place.count, generator=draw)
    return write(folder / "adapter", tensors, r=3, lora_alpha=6, bias="all")


def output_tokens(layers: AdaptedLayers, folder: Path, name: str) -> Path:
    """Two rows of the output layer, which one rank has."""
    place = layers.places["lm_head"]
    rows = torch.randn(2, place.linear.in_features, generator=torch.Generator().manual_seed(1))
    name = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"
    return write(folder / "adapter", {name: rows}, r=3, lora_alpha=6, trainable_token_indices={"lm_head": [1, 5]})


@pytest.mark.parametrize(
    ("make", "name", "expert_parallel"),
    [
        (whole_matrices, "biases", False),
        (whole_matrices, "fused", False),
        (whole_matrices, "experts", True),
        (biases, "biases", False),
        (biases, "clamped experts, sinks", False),
        (output_tokens, "biases", False),
    ],
)
def test_what_is_in_place_of_the_base(
    make: Callable[[AdaptedLayers, Path, str], Path], name: str, expert_parallel: bool, tmp_path: Path
) -> None:
    compare(name, 2, expert_parallel, tmp_path, make)


@pytest.mark.parametrize(
    ("name", "size", "expert_parallel"),
    [(name, sizes[-1], False) for name, (_, _, sizes) in FAMILIES.items()] + [(name, 2, True) for name in EXPERTS],
)
def test_parts_make_the_whole(name: str, size: int, expert_parallel: bool, tmp_path: Path) -> None:
    compare(name, size, expert_parallel, tmp_path, adapter)


def compare(
    name: str,
    size: int,
    expert_parallel: bool,
    tmp_path: Path,
    make: Callable[[AdaptedLayers, Path, str], Path],
) -> None:
    family, differing, _ = FAMILIES[name]
    sizes: dict[str, Any] = {**SIZES, **differing}
    if size == 3:
        sizes |= {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    if expert_parallel:
        sizes |= {key: 4 for key in ("num_experts", "num_local_experts") if key in sizes}
    make_checkpoint(tmp_path, family, **sizes)
    [text] = prompts_of([40])
    whole = load(tmp_path, max_adapters=1)
    layers = whole.adapted
    assert isinstance(layers, AdaptedLayers)
    base = Runner(whole).logits(text, 7)
    path = make(layers, tmp_path, name)
    layers.put(1, read_adapter(path, layers, 8).branches)
    layers.rows.use(1)
    expected = Runner(whole).logits(text, 7)

    def work(ranks: Ranks) -> torch.Tensor:
        model = load_part(tmp_path, ranks, expert_parallel=expert_parallel, max_adapters=1)
        own = model.own.adapted
        assert isinstance(own, AdaptedLayers) and own.whole is not None
        read = read_adapter(path, own.whole, 8, lambda vector: ranks.sum(vector[None])[0])
        own.put(1, read.branches)
        own.rows.use(1)
        return Runner(model).logits(text, 7)  # type: ignore[arg-type]

    parts = together(size, work)[0]
    assert relative_error(parts, expected) < 1e-4 < 0.01 < relative_error(base, expected)


class Readers:
    """Two ranks that read at once: rank 0, and another whose part comes of `read`, on a thread of its own."""

    def __init__(self, ranks: Ranks, read: Callable[[Path, Any], Any]) -> None:
        ring = Ring(ranks)
        self.lead = LeadingAdapters(ring, ring.exchange)
        self.others = FollowedAdapters(ring, ring.exchange, read)
        self.error: BaseException | None = None

    def follow(self) -> None:
        try:
            self.others.follow()
        except BaseException as error:
            self.error = error


def read_together(read: Callable[[Path, Any], Any], lead: Callable[[LeadingAdapters, FollowedAdapters], None]) -> Any:
    """The other's end. lead: what rank 0 does."""
    readers: list[Any] = [None, None]
    are_made = threading.Barrier(2)

    def work(ranks: Ranks) -> None:
        own = readers[ranks.rank] = Readers(ranks, read)
        are_made.wait()
        if ranks.rank:
            own.follow()
            return
        try:
            lead(own.lead, readers[1].others)
        finally:
            ranks.end()

    together(2, work, slot=4096, logits=4 << 20)
    return readers[1]


class Part:
    """Of an adapter."""

    digest = "as the others have it"


@pytest.mark.parametrize("where", [0, 1])
def test_what_a_rank_says_of_a_broken_file_can_be_said(where: int) -> None:
    """Names of tensors are any JSON's, of any length."""
    line = "\ud800 is broken" + "a" * (5 << 20)

    def part(rank: int, path: Path) -> Part:
        if path.name == "bad" and rank == where:
            raise AdapterError(line)
        return Part()

    def lead(adapters: LeadingAdapters, others: FollowedAdapters) -> None:
        kept = [adapters.read(Path("good"), lambda reading: part(0, Path("good")))]
        with pytest.raises(AdapterError, match=r"^\\ud800 is brokena+$") as caught:
            adapters.read(Path("bad"), lambda reading: part(0, Path("bad")))
        assert len(str(caught.value)) == MAX_LINE
        kept.append(adapters.read(Path("good"), lambda reading: part(0, Path("good"))))
        assert [adapters.of(each) for each in kept] == [1, 3]
        assert others.of(3) is not None

    other = read_together(lambda path, reading: part(1, path), lead)
    assert set(other.others.parts) == {1, 3} and isinstance(other.error, RanksEndedError)


def test_adapters_that_are_never_used_are_forgotten_by_all() -> None:
    """As those that are loaded in place of one another, while no step runs."""

    def lead(adapters: LeadingAdapters, others: FollowedAdapters) -> None:
        for number in range(1, 6):
            latest = adapters.read(Path("a"), lambda reading: Part())
            assert adapters.of(latest) == number and others.of(number) is not None
            assert set(others.parts) <= {number - 1, number}
            del latest
            gc.collect()

    read_together(lambda path, reading: Part(), lead)


def test_nobody_waits_for_an_adapter_that_does_not_come() -> None:
    def lead(adapters: LeadingAdapters, others: FollowedAdapters) -> None:
        waiting = threading.Thread(target=wait, args=(others,))
        waiting.start()
        adapters._ring.end()
        waiting.join(60)
        assert not waiting.is_alive() and raised

    def wait(others: FollowedAdapters) -> None:
        with pytest.raises(RanksEndedError):
            others.of(7)
        raised.append(True)

    raised: list[bool] = []
    read_together(lambda path, reading: Part(), lead)
