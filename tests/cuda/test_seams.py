"""A reduction between devices can stand behind the products that end attention and MLP; the executor needs no word."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F

from engine.ops.linear import Linear
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import SMALL, TINY, expected_tokens, make_executor, requests_of, serve, tiny_model


def shared(linear: Linear, device: FakeDevice, reduced: list[int]) -> type[Linear]:
    """A product of which each of two devices has half of what is summed over; then a library adds up the halves."""

    class Shared(Linear):
        def __call__(self, x: Tensor) -> Tensor:
            halves = zip(x.chunk(2, 1), self._weight.chunk(2, 1), strict=True)
            mine, other = (F.linear(x, weight) for x, weight in halves)

            def reduce() -> None:
                mine.add_(other)
                reduced.append(self.in_features)

            device.kernel(reduce)
            return mine

    return Shared


@pytest.mark.parametrize("cuda_graph", ["off", "lazy"])
@pytest.mark.parametrize("seed", [0, 1])
async def test_products_are_reduced_between_devices(cuda_graph: str, seed: int) -> None:
    """Eager, captured and replayed, in steps of prompts and of decode, with two steps in flight."""
    reduced: list[int] = []
    device, model = FakeDevice(seed), tiny_model.__wrapped__()
    ends = [linear for linear in model.linears if linear.out_features == TINY["hidden_size"]]
    assert len(ends) == 2 * TINY["num_hidden_layers"]
    for linear in ends:
        linear.__class__ = shared(linear, device, reduced)
    asked = requests_of(seed)
    executor = make_executor(SMALL, device=device, model=model, cuda_graph=cuda_graph)
    found = await serve(executor, asked)
    assert found == [expected_tokens(tiny_model(), request) for request in asked]
    # The same ones in the same order at every step: what other devices wait for.
    order = [linear.in_features for linear in ends]
    assert reduced == order * (len(reduced) // len(order)) and len(reduced) >= len(order) * 9
    assert (device.counts["replay"] > 0) == (cuda_graph == "lazy")
