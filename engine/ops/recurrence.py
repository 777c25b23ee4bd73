"""What layers with a recurrent state compute: short convolutions, gated delta nets, state spaces, and their gates.

Called by models/ on the executor's thread. The native kernels take a row's tokens one after another, so its bits depend
neither on its company nor on how a prompt was cut; Triton's (for CUDA tensors) do the same. torch's forms, where both
are missing, take prompts in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.forward import NULL_SLOT
from engine.ops import native
from engine.ops.activation import by_rows
from engine.ops.sampling.device import rows_that_count
from engine.ops.state import KernelRows, RowsOnDevice, StatePlan
from engine.ops.triton.runtime import on_gpu

# Tokens that torch's form takes at once: arXiv 2412.06464, as transformers does.
CHUNK = 64


def _library(x: Tensor) -> tuple[native.Library, int] | None:
    """The kernels and how they call x's dtype, where they can take it."""
    library, code = native.library(), native.type_code(x.dtype)
    return (library, code) if library is not None and code is not None and x.is_cpu else None


def _rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows lie in one piece each."""
    return x if x.stride(-1) == 1 else x.contiguous()


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, plan: StatePlan, *, silu: bool
) -> Tensor:
    """x [T, C] -> [T, C]: every channel's convolution over a token and those before it, and silu of that.

    weight float32 [taps, C], the newest token's last. bias float32 [C]. states [slots, taps - 1, C]: the tokens before
    a row's first; afterwards its last, but for rows that are held.
    """
    if on_gpu(x):
        from engine.ops.triton import recurrence

        return recurrence.causal_conv(x, weight, bias, states, _rows_on_device(plan), silu=silu)
    found = _library(x)
    if found is None:
        return torch_causal_conv(x, weight, bias, states, plan, silu=silu)
    library, code = found
    x = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    rows = plan.rows or KernelRows(plan)
    library.by_work(x.numel() * weight.shape[0] // 4).ol_convolve(
        rows.address,
        code,
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        states.data_ptr(),
        states.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        *weight.shape,
        silu,
        torch.get_num_threads(),
    )
    return out


def _rows_on_device(plan: StatePlan) -> RowsOnDevice:
    assert plan.device is not None, "a step on a GPU whose rows are on the host alone"
    return plan.device


def torch_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, plan: StatePlan, *, silu: bool
) -> Tensor:
    """The same by operations of torch."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    taps, indptr = weight.shape[0], plan.qo_indptr.tolist()
    first_row = 0
    if plan.device is not None and plan.device.drafts is not None:
        first_row = plan.num_decode_rows

        def convolve(row: int, state: Tensor) -> Tensor:
            columns = torch.cat([state, x[row : row + 1, None]], 1)
            out[row] = (columns[0].float() * weight).sum(0)
            return columns[:, 1:]

        _in_turn(plan.device, states, convolve)
    elif plan.device is not None and plan.num_decode_rows:
        # In fixed shapes, as a graph holds them.
        first_row = plan.num_decode_rows
        slots = plan.device.slots[:first_row].long()
        columns = torch.cat([states.index_select(0, slots), x[:first_row, None]], 1)
        states.index_copy_(0, slots, columns[:, 1:])
        out[:first_row] = (columns.float() * weight).sum(1)
    for row, slot in enumerate(plan.slots[first_row:].tolist(), first_row):
        first, last = indptr[row], indptr[row + 1]
        columns = torch.cat([states[slot], x[first:last]])
        if plan.held is None or not plan.held[row]:
            states[slot] = columns[last - first :]
        wide = columns.float()
        out[first:last] = sum(wide[tap : tap + last - first] * weight[tap] for tap in range(taps))
    if bias is not None:
        out += bias
    return (F.silu(out) if silu else out).to(x.dtype)


def _in_turn(rows: RowsOnDevice, states: Tensor, step: Callable[[int, Tensor], Tensor]) -> None:
    """Rows of sequences with drafts one after another, in fixed shapes. step(row, state [1, ...]) -> the state behind
    it."""
    drafts = rows.drafts
    assert drafts is not None
    begins = drafts < 0
    drafted = torch.cat((~begins[1:], begins.new_zeros(1)))  # the next row is a draft of the same sequence
    counting, keeps = torch.ones_like(begins), begins & ~drafted
    if rows.drawn is not None:
        counting, _ = rows_that_count(drafts, rows.drawn[: len(drafts)])
        keeps = ~begins & ~drafted
    state = states[:1]
    for row in range(len(drafts)):
        slot = rows.slots[row : row + 1]
        state = torch.where(begins[row], states.index_select(0, slot.long()), state)
        state = torch.where(counting[row], step(row, state), state)
        # What is not kept goes to the slot that is nobody's.
        states.index_copy_(0, torch.where(keeps[row], slot, NULL_SLOT).long(), state)


@dataclass(frozen=True, slots=True, eq=False)
class Recurrence:
    """S = decay S + k (x) d and o = S^T q for every head, S [key_dim, value_dim] in float32.

    decay = exp(-rate * step), step = softplus(input + step_bias), within `steps`. delta (a gated delta net): q and k
    are brought to length 1, q to 1 / sqrt(key_dim), and d = sigmoid(share) (v - decay S^T k). Else (a state space):
    d = step * v, and skip * v is added to o. rate, step_bias, skip: float32 [heads]. Key heads serve equal numbers of
    neighbouring heads.
    """

    delta: bool
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    rate: Tensor
    step_bias: Tensor
    skip: Tensor | None = None
    steps: tuple[float, float] = (0.0, math.inf)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, share: Tensor | None, states: Tensor, plan: StatePlan
    ) -> Tensor:
        """q, k [T, key_heads * key_dim], v [T, heads * value_dim], step and share [T, heads] -> [T, heads * value_dim].

        states: float32 [slots, heads, key_dim, value_dim]; those of held rows stay as they are.
        """
        if on_gpu(v):
            from engine.ops.triton import recurrence

            return recurrence.recur(self, q, k, v, step, share, states, _rows_on_device(plan))
        found = _library(v)
        if found is None:
            return self.by_torch(q, k, v, step, share, states, plan)
        library, code = found
        q, k, v, step = map(_rows, (q, k, v, step))
        out = torch.empty(v.shape, dtype=v.dtype)
        share = step if share is None else _rows(share)
        rows = plan.rows or KernelRows(plan)
        library.by_work(v.numel() * self.key_dim // 2).ol_recur(
            rows.address,
            code,
            self.delta,
            *(word for x in (q, k, v, step, share) for word in (x.data_ptr(), x.stride(0))),
            self.rate.data_ptr(),
            self.step_bias.data_ptr(),
            None if self.skip is None else self.skip.data_ptr(),
            states.data_ptr(),
            states.stride(0),
            out.data_ptr(),
            self.key_heads,
            self.heads,
            self.key_dim,
            self.value_dim,
            self.key_dim**-0.5,
            *self.steps,
            torch.get_num_threads(),
        )
        return out

    def by_torch(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, share: Tensor | None, states: Tensor, plan: StatePlan
    ) -> Tensor:
        """The same by operations of torch."""
        tokens = len(v)
        # [heads, T, dim] in float32.
        q, k = (x.reshape(tokens, self.key_heads, -1).float() for x in (q, k))
        if self.delta:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
            q = q * self.key_dim**-0.5
        q, k = (x.repeat_interleave(self.heads // self.key_heads, dim=1).transpose(0, 1) for x in (q, k))
        values = v.reshape(tokens, self.heads, -1).float().transpose(0, 1)
        steps = F.softplus(step.float() + self.step_bias).clamp(*self.steps)
        log_decay = (-self.rate * steps).T
        shares = (steps if share is None else share.float().sigmoid()).T
        out = torch.empty_like(values)
        indptr = plan.qo_indptr.tolist()
        first_row = 0
        if plan.device is not None and plan.device.drafts is not None:
            first_row = plan.num_decode_rows

            def recur(row: int, state: Tensor) -> Tensor:
                own, state = slice(row, row + 1), state.clone()
                of_row = (x[:, own] for x in (q, k, values, log_decay, shares))
                out[:, own] = _one_token(*of_row, state=state, delta=self.delta)
                return state

            _in_turn(plan.device, states, recur)
        elif plan.device is not None and plan.num_decode_rows:
            first_row = plan.num_decode_rows
            slots = plan.device.slots[:first_row].long()
            state = states.index_select(0, slots)
            of_rows = (x[:, :first_row] for x in (q, k, values, log_decay, shares))
            out[:, :first_row] = _one_token(*of_rows, state=state, delta=self.delta)
            states.index_copy_(0, slots, state)
        for row, slot in enumerate(plan.slots[first_row:].tolist(), first_row):
            own = states[slot] if plan.held is None or not plan.held[row] else states[slot].clone()
            for first in range(indptr[row], indptr[row + 1], CHUNK):
                part = slice(first, min(first + CHUNK, indptr[row + 1]))
                out[:, part] = _chunk(
                    *(x[:, part] for x in (q, k, values, log_decay, shares)), state=own, delta=self.delta
                )
        if self.skip is not None:
            out += self.skip[:, None, None] * values
        return out.transpose(0, 1).reshape(v.shape).to(v.dtype)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, share: Tensor, *, state: Tensor, delta: bool
) -> Tensor:
    """A token each of n sequences: q, k, v [heads, n, dim], the rest [heads, n] -> [heads, n, dim] of v.

    state [n, heads, key_dim, value_dim] is that before the tokens, and then that after them.
    """
    state.mul_(log_decay.T.exp()[:, :, None, None])
    if delta:
        v = v - torch.einsum("hnk,nhkv->hnv", k, state)
    state.add_(torch.einsum("hnk,hnv->nhkv", k, v * share[:, :, None]))
    return torch.einsum("hnk,nhkv->hnv", q, state)


def _chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, share: Tensor, *, state: Tensor, delta: bool) -> Tensor:
    """A chunk of one sequence by matrix products: q, k, v [heads, n, dim], the rest [heads, n] -> [heads, n, dim] of v.

    state [heads, key_dim, value_dim] is that before the chunk, and then that after it. The d of a delta net's tokens
    depend on each other by a triangular system (the UT transform of arXiv 2406.06484).
    """
    since = log_decay.cumsum(-1)  # of the decay since before the chunk
    later = torch.ones(since.shape[-1], since.shape[-1], dtype=torch.bool, device=q.device).triu(1)
    between = (since[:, :, None] - since[:, None, :]).masked_fill(later, -torch.inf).exp()
    faded = since.exp()[:, :, None]
    d = v * share[:, :, None]
    if delta:
        own = k * share[:, :, None]
        d = torch.linalg.solve_triangular(
            own @ k.mT * between, d - (own * faded) @ state, upper=False, unitriangular=True
        )
    out = (q * faded) @ state + (q @ k.mT * between) @ d
    last = since[:, -1:, None]
    state.mul_(last.exp()).add_((k * (last - since[:, :, None]).exp()).mT @ d)
    return out


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x sigmoid(gate), [T, width] each."""
    return _gate(x, gate, silu=False)


def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x silu(gate), [T, width] each."""
    return _gate(x, gate, silu=True)


def _gate(x: Tensor, gate: Tensor, *, silu: bool) -> Tensor:
    if on_gpu(x):
        from engine.ops.triton import recurrence

        return recurrence.gate(x, gate, silu=silu)
    found = _library(x)
    if found is None:
        return torch_gate(x, gate, silu=silu)
    library, code = found
    x, gate = _rows(x), _rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype)
    library.by_work(2 * x.numel()).ol_gate(
        code,
        x.data_ptr(),
        x.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        out.data_ptr(),
        *x.shape,
        silu,
        torch.get_num_threads(),
    )
    return out


def torch_gate(x: Tensor, gate: Tensor, *, silu: bool) -> Tensor:
    """silu_gate or sigmoid_gate by operations of torch."""
    return (x.float() * by_rows(F.silu if silu else torch.sigmoid, gate)).to(x.dtype)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, parts: int, *, gate_first: bool = False) -> Tensor:
    """The RMS norm of each of `parts` parts of a row [T, width] and silu(gate): of the norm, or (gate_first) within it.

    weight: float32, of one part, or of a whole row.
    """
    width = x.shape[1] // parts
    if on_gpu(x):
        from engine.ops.triton import recurrence

        return recurrence.gated_norm(x, gate, weight, eps, parts, gate_first=gate_first)
    found = _library(x)
    if found is None:
        return torch_gated_norm(x, gate, weight, eps, parts, gate_first=gate_first)
    library, code = found
    x, gate = _rows(x), _rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype)
    library.by_work(2 * x.numel()).ol_gated_norm(
        code,
        x.data_ptr(),
        x.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        weight.data_ptr(),
        0 if len(weight) == width else width,
        out.data_ptr(),
        len(x),
        parts,
        width,
        eps,
        gate_first,
        torch.get_num_threads(),
    )
    return out


def torch_gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, parts: int, *, gate_first: bool = False
) -> Tensor:
    """gated_norm by operations of torch."""
    width = x.shape[1] // parts
    gated = F.silu(gate.float())
    wide = x.float() * gated if gate_first else x.float()
    wide = wide.unflatten(1, (parts, width))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.view(-1, width)
    wide = wide.flatten(1)
    return (wide if gate_first else wide * gated).to(x.dtype)
