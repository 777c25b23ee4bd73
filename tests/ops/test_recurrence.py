"""Short convolutions, gated recurrences, their gates and norms: native and torch against float64; native rows have the
same bits in any company and any chunks. And where states are kept."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.forward import ForwardInput, Limits, Staging
from engine.ops import native
from engine.ops.recurrence import Recurrence, causal_conv, gated_norm, sigmoid_gate, silu_gate
from engine.ops.state import StatePlan, States, held_bytes, state_bytes

DTYPES = [torch.float32, torch.bfloat16]
# Delta net?, key heads, heads, key_dim, value_dim: with whole vectors, with none, and more than one tile.
SHAPES = [(True, 2, 4, 32, 64), (True, 3, 3, 12, 20), (True, 1, 2, 7, 129), (False, 1, 4, 16, 32), (False, 2, 6, 20, 7)]


def plan_of(lengths: dict[int, int]) -> StatePlan:
    """slot -> tokens."""
    return StatePlan(np.array(list(lengths), np.int32), np.cumsum([0, *lengths.values()]).astype(np.int32), 0)


@dataclass
class Case:
    recurrence: Recurrence
    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor
    share: Tensor | None

    def run(self, rows: dict[int, slice], states: Tensor) -> Tensor:
        """slot -> tokens of the case."""
        taken = [None if x is None else torch.cat([x[part] for part in rows.values()]) for x in self._tensors()]
        lengths = {slot: len(range(*part.indices(len(self.v)))) for slot, part in rows.items()}
        q, k, v, step, share = taken
        assert q is not None and k is not None and v is not None and step is not None
        return self.recurrence(q, k, v, step, share, states, plan_of(lengths))

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.step, self.share

    def states(self, count: int = 5) -> Tensor:
        r = self.recurrence
        return torch.zeros(count, r.heads, r.key_dim, r.value_dim)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Token by token in float64: outputs and the state behind them."""
        r = self.recurrence
        state = torch.zeros(r.heads, r.key_dim, r.value_dim, dtype=torch.float64)
        rate, bias = r.rate.double(), r.step_bias.double()
        out = []
        for t in range(len(self.v)):
            q, k = (x[t].double().view(r.key_heads, -1) for x in (self.q, self.k))
            if r.delta:
                q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
                q = q / math.sqrt(r.key_dim)
            q, k = (x.repeat_interleave(r.heads // r.key_heads, 0) for x in (q, k))
            v = self.v[t].double().view(r.heads, -1)
            step = F.softplus(self.step[t].double() + bias).clamp(*r.steps)
            state = state * torch.exp(-rate * step)[:, None, None]
            d = v * step[:, None]
            if self.share is not None:
                d = self.share[t].double().sigmoid()[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
            state = state + k[:, :, None] * d[:, None]
            o = torch.einsum("hkv,hk->hv", state, q)
            if r.skip is not None:
                o = o + r.skip.double()[:, None] * v
            out.append(o.flatten())
        return torch.stack(out), state


def make(shape: tuple[bool, int, int, int, int], tokens: int, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(1)
    delta, key_heads, heads, key_dim, value_dim = shape
    recurrence = Recurrence(
        delta=delta,
        key_heads=key_heads,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        rate=torch.rand(heads) * 2,
        step_bias=torch.randn(heads),
        skip=None if delta else torch.randn(heads),
        steps=(0.0, math.inf) if delta else (0.4, 1.5),
    )
    # Parts of a wider tensor, as a product gives them.
    sizes = (key_heads * key_dim, key_heads * key_dim, heads * value_dim, heads, heads)
    q, k, v, step, share = (2 * torch.randn(tokens, sum(sizes))).to(dtype).split(sizes, 1)
    return Case(recurrence, q, k, v, step, share if delta else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_recurrence(mode: str, shape: tuple[bool, int, int, int, int]) -> None:
    """More than a chunk of torch's, and several of the kernels' stretches of tokens."""
    case = make(shape, 101)
    states = case.states()
    out, state = case.run({2: slice(None)}, states), states[2]
    expected, expected_state = case.exact()
    tolerance = 2e-5 * expected.abs().max()
    assert (out - expected).abs().max() <= tolerance and (state - expected_state).abs().max() <= tolerance
    assert not states[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_in_any_chunks_and_company(
    kernels: native.Library, shape: tuple[bool, int, int, int, int], dtype: torch.dtype
) -> None:
    case = make(shape, 90, dtype)
    alone = case.states()
    expected = case.run({1: slice(None)}, alone)
    for cuts in ([0, 1, 2, 40, 90], [0, 33, 64, 89, 90], [0, 32, 90]):
        states = case.states()
        parts = []
        for first, last in itertools.pairwise(cuts):
            # Beside a decode row and a prompt, as the third of them.
            beside = {3: slice(5, 6), 4: slice(7, 30)}
            torch.set_num_threads(2)
            parts.append(case.run({**beside, 1: slice(first, last)}, states)[24:])
        assert torch.equal(torch.cat(parts), expected) and torch.equal(states[1], alone[1]), cuts


def test_large_steps_and_small_keys(mode: str) -> None:
    """A state that is forgotten at once, one that is kept for good, and keys that are zero."""
    case = make((True, 1, 2, 8, 16), 70)
    case.recurrence = replace(case.recurrence, rate=torch.tensor([0.0, 50.0]), step_bias=torch.tensor([0.0, 30.0]))
    case.k = case.k.clone()
    case.k[10:20] = 0.0
    expected, _ = case.exact()
    out = case.run({1: slice(None)}, case.states())
    assert torch.isfinite(out).all() and (out - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("taps", "channels"), [(4, 64), (3, 21), (2, 1), (6, 700)])
def test_convolution(mode: str, dtype: torch.dtype, taps: int, channels: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(30, channels + 3).to(dtype)[:, 3:]
    weight, bias = torch.randn(taps, channels), torch.randn(channels)
    for has_bias, silu in ((False, True), (True, False)):
        given = bias if has_bias else None
        states = torch.zeros(4, taps - 1, channels, dtype=dtype)
        # In chunks that are shorter than what it sees, too.
        parts, at = [], 0
        for count in (1, 1, 2, 20, 6):
            rows = torch.cat([x[:2], x[at : at + count]])
            parts.append(causal_conv(rows, weight, given, states, plan_of({3: 2, 1: count}), silu=silu)[2:])
            at += count
        whole = torch.zeros(4, taps - 1, channels, dtype=dtype)
        out = causal_conv(x, weight, given, whole, plan_of({1: 30}), silu=silu)
        expected = F.conv1d(x.T.double()[None], weight.T.double()[:, None], padding=taps - 1, groups=channels)
        expected = expected[0, :, :30].T + (bias.double() if has_bias else 0.0)
        expected = F.silu(expected) if silu else expected
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * expected.abs() + 1e-2
        assert ((out.double() - expected).abs() <= tolerance).all()
        if mode == "native":
            assert torch.equal(torch.cat(parts), out)
        assert torch.equal(states[1], x[30 - taps + 1 :]) and torch.equal(whole[1], states[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "width"), [(4, 32), (3, 20), (1, 7), (2, 129)])
def test_gates_and_their_norm(mode: str, dtype: torch.dtype, parts: int, width: int) -> None:
    torch.manual_seed(3)
    both = torch.randn(9, 2 * parts * width).to(dtype)
    x, gate = both.split(parts * width, 1)
    wide, wide_gate = x.double(), gate.double()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    for ours, theirs in ((sigmoid_gate, torch.sigmoid), (silu_gate, F.silu)):
        torch.testing.assert_close(ours(x, gate).double(), wide * theirs(wide_gate), **close)
    for weight in (torch.rand(width) + 0.5, torch.rand(parts * width) + 0.5):
        for gate_first in (False, True):
            value = (wide * F.silu(wide_gate) if gate_first else wide).view(9, parts, width)
            value = value / torch.sqrt(value.square().mean(-1, keepdim=True) + 1e-5)
            value = (value * weight.double().view(-1, width)).view(9, -1)
            value = value if gate_first else value * F.silu(wide_gate)
            out = gated_norm(x, gate, weight, 1e-5, parts, gate_first=gate_first)
            torch.testing.assert_close(out.double(), value, **close)
            if mode == "native":
                rows = [
                    gated_norm(x[i : i + 1], gate[i : i + 1], weight, 1e-5, parts, gate_first=gate_first)
                    for i in range(9)
                ]
                assert torch.equal(torch.cat(rows), out)


@dataclass(frozen=True)
class Shape:
    shape: tuple[int, ...]
    wide: bool = False


def test_states_are_saved_and_loaded_before_rows_begin() -> None:
    spec = ((Shape((2, 3)), Shape((4,), wide=True)), (), (Shape((5,)),))
    limits = Limits(3, 16, 32, 4, 8, 10, num_snapshots=2)
    states = States(spec, limits, torch.bfloat16, torch.device("cpu"))
    assert state_bytes(spec, torch.bfloat16) == 3 * 64 == states._memory.shape[1]
    assert states.of(1) == () and [each.dtype for each in states.of(0)] == [torch.bfloat16, torch.float32]
    for tensor in (*states.of(0), *states.of(2)):
        # Slots 0 to 3, snapshots 1 and 2.
        assert len(tensor) == 6
        tensor.copy_(torch.arange(1, 7).view(6, *[1] * (tensor.dim() - 1)).expand_as(tensor))
    staging = Staging(limits)
    staging.save_slot[0], staging.save_snapshot[0] = 1, 2
    staging.load_slot[:2], staging.load_snapshot[:2] = (3, 1), (2, 1)
    staging.row_slot[:3], staging.row_start[:3] = (1, 2, 3), (4, 0, 8)
    step = ForwardInput(0, staging, 3, 1, 6, 0, 0, num_saves=1, num_loads=2)
    for _ in range(2):
        states.begin(step)
        # Slot 1's went to snapshot 2 and from there to slot 3; slot 1 has that of snapshot 1; slot 2 begins.
        for tensor in (*states.of(0), *states.of(2)):
            assert tensor.flatten(1)[:, 0].tolist() == [1, 5, 0, 2, 5, 2]
            assert (tensor.flatten(1) == tensor.flatten(1)[:, :1]).all()
        staging.save_slot[0], staging.save_snapshot[0] = 3, 2
    states.release()
    states.allocate()
    assert not states._memory.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_with_drafts_leave_their_state_until_it_is_known_which_are_right(
    mode: str, shape: tuple[bool, int, int, int, int], dtype: torch.dtype
) -> None:
    """A convolution and a recurrence of 40 tokens behind 20, of which 1 to 40 are right; beside them a row that is not
    held, and one of which all are right."""
    case, taps = make(shape, 60, dtype), 4
    r, part = case.recurrence, slice(20, 60)
    spec = (
        (Shape((taps - 1, case.v.shape[1])), Shape((r.heads, r.key_dim, r.value_dim), wide=True)),
        (Shape((taps - 1, 5)),),
    )
    assert held_bytes(spec, dtype) == (case.v.shape[1] + 2 * r.heads + 5) * dtype.itemsize
    states = States(spec, Limits(4, 160, 64, 4, 64, 10, num_snapshots=0), dtype, torch.device("cpu"))
    weight, narrow = torch.randn(taps, case.v.shape[1]), torch.randn(taps, 5)

    def mixed(q: Tensor, k: Tensor, v: Tensor, step: Tensor, share: Tensor, plan: StatePlan) -> Tensor:
        columns, matrices = states.of(0)
        v = causal_conv(v, weight, None, columns, plan, silu=True)
        return r(q, k, v, step, share if r.delta else None, matrices, plan)

    def short(x: Tensor, plan: StatePlan) -> Tensor:
        return causal_conv(x, narrow, None, *states.of(1), plan, silu=False)

    def run(rows: dict[int, slice], held: list[bool] | None = None) -> list[Tensor]:
        share = case.step if case.share is None else case.share
        given = [torch.cat([x[one] for one in rows.values()]) for x in (case.q, case.k, case.v, case.step, share)]
        plan = plan_of({slot: len(range(*one.indices(60))) for slot, one in rows.items()})
        states.run(replace(plan, held=None if held is None else np.array(held)))
        return [states.advance(mixed, *given), states.advance(short, given[2][:, :5])]

    for right in (1, 2, 33, 40):
        states._memory.zero_()
        run({1: slice(20), 2: slice(20), 3: slice(20), 4: slice(20)})
        run({1: slice(20, 20 + right), 2: part, 3: part})
        wanted = states._memory.clone()
        expected = run({4: part})
        wanted[4].zero_()
        states._memory.zero_()
        run({1: slice(20), 2: slice(20), 3: slice(20)})
        before = states._memory.clone()
        found = run({2: part, 1: part, 3: part}, [False, True, True])
        for one, other in zip(found, expected, strict=True):
            if mode == "native":
                assert torch.equal(one[40:80], other)
        assert torch.equal(states._memory[[1, 3]], before[[1, 3]])
        states.settle(np.array([40, right, 40]))
        if mode == "native":
            assert torch.equal(states._memory, wanted)
        for layer, tensor in ((0, 0), (0, 1), (1, 0)):
            mine = states.of(layer)[tensor].float().clone()
            kept = states._memory.clone()
            states._memory.copy_(wanted)
            torch.testing.assert_close(mine, states.of(layer)[tensor].float(), rtol=1e-4, atol=1e-4)
            states._memory.copy_(kept)
        with pytest.raises(AssertionError, match="tokens are right"):
            run({1: part}, [True])
            states.settle(np.array([41]))
