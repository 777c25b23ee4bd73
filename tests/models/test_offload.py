"""Weights that go to the host and come back: nothing is left behind, nothing is lost, views stay views."""

from __future__ import annotations

import torch

from engine.models.offload import Offloaded, Weighed, _storages
from engine.request import SamplingParams
from tests.cuda.support import read_tiny_model, reference_next


def test_all_memory_goes_and_comes_back() -> None:
    model = read_tiny_model(None)
    before = {storage.data_ptr(): storage for storage in _storages(model)}
    sizes = [storage.nbytes() for storage in before.values()]
    assert sum(sizes) > 4 * (2 * 101 * 32 + 2 * 3 * 32 * 48)
    offloaded = Offloaded(model)
    assert all(storage.nbytes() == 0 for storage in before.values())
    offloaded.restore()
    offloaded.restore()  # what is back stays
    assert [storage.nbytes() for storage in before.values()] == sizes
    greedy = SamplingParams(temperature=0.0)
    assert reference_next(model, [5, 6, 7], greedy) == reference_next(read_tiny_model(None), [5, 6, 7], greedy)


def test_a_view_follows_its_storage() -> None:
    whole = torch.arange(12.0).view(3, 4)
    holder = {"whole": whole, "rows": [whole[1:]]}
    offloaded = Offloaded(holder)
    assert whole.untyped_storage().nbytes() == 0
    offloaded.restore()
    assert torch.equal(holder["rows"][0], torch.arange(4.0, 12.0).view(2, 4))
    assert holder["rows"][0].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_model_is_weighed_once_and_another_anew() -> None:
    weighed, model = Weighed(), read_tiny_model(None)
    whole = sum({one.data_ptr(): one.nbytes() for one in _storages(model)}.values())
    assert weighed(model) == whole == weighed(model) > 0
    assert weighed(None) == 0
    rows = torch.arange(12.0).view(3, 4)

    class Holder(dict[str, object]):
        """A dict has no weak references."""

    assert weighed(Holder(whole=rows, part=rows[1:])) == rows.nbytes
    assert weighed(model) == whole
