"""Decode steps of the CUDA executor: one token a row, drafts too, replayed from graphs where there are any.

Shapes depend on the batch size and the width of the page tables alone, so that a graph can hold all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executor.cuda_buffers import CudaHandle, Side
from engine.executor.cuda_graph import GraphKey
from engine.executor.cuda_state import DeviceState
from engine.forward import FUTURE_TOKEN, NULL_PAGE, NULL_SLOT, ForwardInput
from engine.ops.attention.device import DecodePlan, DecodeStep, decode_inputs
from engine.ops.sampling.device import accept
from engine.ops.sampling.device import draw as draw_tokens
from engine.ops.state import StatePlan


class DecodeSteps(DeviceState):
    """See the module."""

    def _launch_decode(
        self, forward_input: ForwardInput, side: Side, handle: CudaHandle, draw: str
    ) -> Callable[[], Tensor] | None:
        """How an open step's logits are had on the device; None where the step draws by itself."""
        layer, staging, rows = self.layer, side.staging, forward_input.num_rows
        count, changed = forward_input.num_table_diffs, forward_input.num_sampling_diffs
        longest = int(staging.row_start[:rows].max()) + 1
        key = self.graphs.key(rows, -(-longest // self.limits.page_size), side.number, draw)
        size = key.size
        inside = self._pad(side, rows, size, count)
        if self._has_adapters(staging.row_slot[:rows]):
            key = key._replace(adapted=True)
            self._note_adapters(staging.row_slot[:rows], 1, size, side)
        num_meta, plan = 0, None
        if self.attention.decode_needs_plan(size):
            num_meta, plan = self._decode_plan(forward_input, side, size)
        end = side.end_of(side.first_page, max(inside, size))
        if changed:
            end = side.end_of(staging.sampling, changed)
        self._send(side, end, num_meta)
        with layer.on(self._compute):
            layer.wait(side.uploaded)
            if changed or count > min(inside, size) or handle.reading is not None:
                # More than a graph has room for, or sooner. It applies its share again, which changes nothing.
                self._apply_diffs(forward_input, side, handle)
            if handle.reading is not None:
                self._launch_drafts(side, handle)
            if plan is not None:
                self.attention.plan_decode(plan, size, key.width, side.parity)
            graph = self.graphs.get(key)
            # States follow what is drawn, by what their layers were given, which a graph would write over.
            whole = draw != "open" or not side.has_drafts or self._states is None
            if graph is None and whole and self.graphs.note_use(key):
                graph = self._capture(key)
            if graph is not None:
                self.graphs.replay(graph)
            else:
                self._prepare(key)
                layer.launch(lambda: self._decode(key))
        room = self._open
        return (lambda: room[:rows]) if room is not None and draw == "open" else None

    def _prepare(self, key: GraphKey) -> None:
        """Memory that steps of a key need beside their own, and that graphs hold on to; compute stream."""
        self.attention.prepare_decode(key.size, key.width)
        if key.draw == "open" and self._open is None:
            # For all graphs: each would keep its own.
            self._open = self.layer.zeros((self._most_rows, self.limits.vocab_size), torch.float32)

    @staticmethod
    def _pad(side: Side, rows: int, size: int, num_diffs: int) -> int:
        """Fill up a decode batch: rows of slot 0, and changes of its first page-table entry to what it is.

        Returns how many of the table diffs stand where graphs look for them.
        """
        staging = side.staging
        staging.row_slot[rows:size] = NULL_SLOT
        staging.row_start[rows:size] = 0
        staging.token_ids[rows:size] = FUTURE_TOKEN
        inside = num_diffs if staging.table_index is side.first_index else 0
        side.first_index[inside:size] = 0
        side.first_page[inside:size] = NULL_PAGE
        return inside

    def _decode(self, key: GraphKey) -> None:
        """The whole of a decode step on the device. Shapes depend on the key alone."""
        size, width, number, draw, adapted = key
        side, page_size = self._sides[number], self.limits.page_size
        with torch.inference_mode():
            positions = side.row_start[:size]
            slots = side.row_slot[:size]
            known = side.token_ids[:size] if side.has_drafts else None
            token_ids, kv_len, kv_slots, tables = decode_inputs(
                self._page_tables,
                self._last_token,
                slots,
                positions,
                side.table_index[:size],
                side.table_page[:size],
                width,
                page_size,
                known,
            )
            if (states := self._states) is not None:
                most = 1 + self.limits.max_draft_tokens if side.has_drafts else 1
                states.expect(StatePlan.of_decodes(slots, known, most))
            attention = self.attention.decode(DecodeStep(positions, kv_slots, tables, kv_len, side.parity))
            with self._adapting(adapted, side, size):
                if (drafter := self._drafter) is None or not drafter.reads_hidden:
                    logits = self.model.decode(token_ids, positions, attention)
                else:
                    hidden = self.model.forward(token_ids, positions, attention)
                    drafter.keep(hidden, self._aux(), slots, positions)
                    logits = self.model.raw_logits(hidden)
            if draw == "open":
                assert self._open is not None
                self._open[:size].copy_(logits)
                return
            given = logits, self._sampling, slots, kv_len
            draw_tokens(*given, self._last_token, side.out[:size], filtered=draw == "filtered")
            if known is not None:
                accept(known, side.out[:size], slots, self._last_token)
                if states is not None:
                    states.accept(side.out[:size])

    def _decode_plan(self, forward_input: ForwardInput, side: Side, size: int) -> tuple[int, DecodePlan]:
        """Host metadata of a decode step, padded to `size` rows of one page. Returns its length in words."""
        rows, of_groups = forward_input.num_rows, side.metadata.of_groups
        metadata = side.metadata.build(forward_input, self._tables)
        pages, padding = len(metadata.kv_indices), size - rows
        head, each = 2 * size + 1, pages + padding
        total = head + len(of_groups) * each
        with self.layer.on(self._upload):
            side.reserve_meta(total)
        host = side.meta_host.numpy()
        host[: rows + 1] = metadata.kv_indptr
        host[rows + 1 : size + 1] = pages + np.arange(1, padding + 1)
        host[size + 1 : size + 1 + rows] = metadata.last_page_len
        host[size + 1 + rows : head] = 1
        indices = []
        for start, group in zip(range(head, total, each), of_groups, strict=True):
            host[start : start + pages] = group.kv_indices
            host[start + pages : start + each] = NULL_PAGE
            indices.append(side.meta[start : start + each])
        return total, DecodePlan(side.meta_host[: size + 1], side.meta_host[size + 1 : head], indices)

    def _capture(self, key: GraphKey) -> Any:
        """Record the decode step of a key; compute stream."""
        self._prepare(key)
        with self.layer.range(f"capture {key.size}"):
            return self.graphs.capture(key, lambda: self._decode(key))
