"""Every family through the CUDA executor on the fake device: nothing synchronises, and graphs hold all of it, with
norms and residuals folded into products of one row or not.
"""

from __future__ import annotations

import pytest
import torch

from engine.models.parts import experts
from engine.ops import native
from engine.ops.skinny import BLOCKS
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import DenseAttention, one_thread
from tests.executor.driver import GREEDY, Driver, decode, prefill
from tests.gpu.support import OUR_ATTENTION, WITH_STATES, executor, families, load

PROMPT = [(37 * i + 11) % 990 + 3 for i in range(50)]


@pytest.mark.parametrize("architecture", [*families(), *sorted(OUR_ATTENTION)])
async def test_family(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with native.disabled(), one_thread():
        plain = load(architecture, torch.float32, torch.device("cpu"))
        monkeypatch.setattr(experts, "keeps_experts_stacked", lambda device: True)
        model = load(architecture, torch.float32, torch.device("cpu"))
    for linear in model.linears:  # decode steps of one row go by our products, norms and residuals folded into them
        linear.few = {1: BLOCKS[0]}
    device = FakeDevice(1)
    engine = executor(device, model, torch.float32, attention="torch")  # type: ignore[arg-type]
    engine.pieces._seen.update(
        (size, False) for size in engine.pieces.sizes
    )  # a chain of graphs for the first prompt already
    driver = Driver(engine)
    await driver.run([prefill(1, PROMPT[:40], samples=False)], {1: [5, 9, 2, 30]}, {1: GREEDY})
    tokens = await driver.run([prefill(1, PROMPT[40:], start=40)])
    for position in range(len(PROMPT), len(PROMPT) + 7):
        tokens += await driver.run([decode(1, position)])
    # Where layers differ in more than their window or have states, a prompt is launched operation by operation.
    in_pieces = architecture not in OUR_ATTENTION | WITH_STATES
    assert len(engine.pieces) == (2 if in_pieces else 0)
    engine.close()
    assert device.counts["replay"] > 0
    context = PROMPT + tokens
    with torch.inference_mode(), native.disabled(), one_thread():
        hidden = plain.forward(torch.tensor(context), torch.arange(len(context)), DenseAttention(plain, len(context)))
        expected = plain.logits(hidden).argmax(-1).tolist()
    assert tokens == expected[len(PROMPT) - 1 : -1]
