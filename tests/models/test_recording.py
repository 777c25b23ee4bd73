"""Steps made again by one call: the bits of those that Python makes, and never a stale one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.ops import native, recording
from engine.ops.lora import Branch, Factors
from tests.models.support import Runner, load, make_checkpoint

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")

DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "mamba"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "ssm_state_size": 20,
    "n_groups": 2,
    "head_dim": 16,
}
# Family, its sizes, and what the watch cannot answer for where rows are several.
FAMILIES = [
    ("Llama", {}, None),
    ("Mistral", {"sliding_window": 12}, None),
    ("Qwen2", {}, None),
    ("Qwen3", {"head_dim": 16}, None),
    ("Gemma3", {"head_dim": 16, "sliding_window": 12}, None),
    ("Qwen3_5", DELTA, None),
    ("NemotronH", NEMOTRON_H, None),
    ("Starcoder2", {}, "ol_layer_norm"),
]


def steps(runner: Runner, seed: int = 0) -> list[torch.Tensor]:
    """Hidden states of steps of one, three, two and nine tokens, each several times, in the order of a busy server."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 211, (count,), generator=generator).tolist()

    turn = [{0: 1}, {0: 1, 1: 1, 2: 1}, {0: 1, 2: 1}, {0: 1, 1: 7, 2: 1}]
    return [runner.step({sequence: ids(count) for sequence, count in rows.items()}) for rows in 4 * turn]


@pytest.mark.parametrize(("family", "sizes", "refused"), FAMILIES, ids=[row[0] for row in FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(
    tmp_path: Path, family: str, sizes: dict[str, Any], refused: str | None, dtype: torch.dtype
) -> None:
    make_checkpoint(tmp_path, family, **sizes)
    model = load(tmp_path, dtype, deterministic=True)
    recorded, plain = Runner(model, dtype=dtype), Runner(model, dtype=dtype)
    plain.attention.recordings = None
    assert all(torch.equal(one, other) for one, other in zip(steps(recorded), steps(plain), strict=True))
    recordings = recorded.attention.recordings
    assert recordings is not None and recordings.refused == refused
    if refused is None:
        assert len(recordings) == 4


def test_other_weights_and_other_memory(tmp_path: Path) -> None:
    """A model that is loaded anew is not run by the addresses of the old one, nor pools by those before a sleep."""
    runners = []
    for seed in (0, 1):
        make_checkpoint(tmp_path / str(seed), "Llama", seed=seed)
        runners.append(Runner(load(tmp_path / str(seed))))
    first, second = runners
    steps(first)
    first.model = second.model
    first.attention.release()
    first.attention.allocate()
    assert first.attention.recordings is not None and len(first.attention.recordings) == 0
    first.done = [0] * len(first.done)
    assert all(torch.equal(one, other) for one, other in zip(steps(first), steps(second), strict=True))
    # Without a sleep between them, too.
    make_checkpoint(tmp_path / "2", "Llama", seed=2)
    third = Runner(load(tmp_path / "2"))
    first.model, first.done = third.model, [0] * len(first.done)
    assert all(torch.equal(one, other) for one, other in zip(steps(first), steps(third), strict=True))


def test_adapters_are_not_passed_over(tmp_path: Path) -> None:
    """A step with an adapter is never a recorded one of none, nor the other way about."""
    make_checkpoint(tmp_path, "Llama")
    model = load(tmp_path, max_adapters=1)
    assert model.adapted is not None
    down, up = torch.randn(2, 48), torch.randn(48, 2)
    branch = Branch(96, 48, [Factors(0, torch.cat((down, down), 1), up)])
    model.adapted.put(1, {"model.layers.1.self_attn.o_proj": branch})
    recorded, plain = Runner(model), Runner(model)
    plain.attention.recordings = None
    differs = []
    for _ in range(3):
        for adapter in (0, 1):
            model.adapted.rows.use(adapter)
            one, other = (runner.step({0: [7], 1: [9]}) for runner in (recorded, plain))
            assert torch.equal(one, other)
            differs.append(one)
    assert recorded.attention.recordings is not None and len(recorded.attention.recordings) == 1
    assert not torch.equal(differs[-1], differs[-2])


def test_drafts_are_not_passed_over(tmp_path: Path) -> None:
    """A step that keeps what goes into states is never a recorded one of as many tokens, which would keep nothing."""
    make_checkpoint(tmp_path, "Qwen3_5", **DELTA)
    model = load(tmp_path)
    recorded, plain = Runner(model), Runner(model)
    plain.attention.recordings = None
    rows = {sequence: [5 + sequence] for sequence in range(3)}
    for _ in range(3):
        assert torch.equal(recorded.step(rows), plain.step(rows))
    assert recorded.attention.recordings is not None and len(recorded.attention.recordings) == 1
    for right in (2, 3, 1):
        assert torch.equal(recorded.step({1: [7, 8, 9]}, drafts=True)[:right], plain.step({1: [7, 8, 9][:right]}))
        states, expected = recorded.attention.states, plain.attention.states
        assert states is not None and expected is not None
        states.settle(np.array([right]))
        assert torch.equal(states._memory, expected._memory)
        recorded.done = plain.done.copy()
    assert torch.equal(recorded.step(rows), plain.step(rows))


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few numbers of tokens are kept, the latest ones; long steps and memory over the bound are not recorded."""
    make_checkpoint(tmp_path, "Llama")
    monkeypatch.setattr(recording, "MOST_RECORDINGS", 2)
    monkeypatch.setattr(recording, "MOST_TOKENS", 4)
    runner = Runner(load(tmp_path), max_model_len=128)
    recordings = runner.attention.recordings
    assert recordings is not None
    for tokens, kept in ((1, 1), (2, 2), (3, 2), (5, 2), (1, 2)):
        for _ in range(3):
            runner.step({0: [5] * tokens})
        assert len(recordings) == kept
    recordings.clear()
    monkeypatch.setattr(recording, "MOST_BYTES", 1000)
    for _ in range(3):
        runner.step({1: [5]})
    assert len(recordings) == 0


def test_memory_is_handed_out_again() -> None:
    memory = recording._Memory()
    first = memory.empty((4, 100), torch.float32)
    address = first.data_ptr()
    view = first[1:]
    del first
    second = memory.empty((4, 100), torch.float32)
    assert address % 64 == second.data_ptr() % 64 == 0 and second.data_ptr() != address, "a view still uses it"
    del view
    assert memory.empty((3, 100), torch.float32).data_ptr() == address and memory.num_bytes == 2 * 1600
    assert memory.empty((), torch.bfloat16).shape == ()
