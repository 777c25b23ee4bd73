"""Steps with prompts: planned on the host; small ones a chain of graphs (cuda_pieces.py), others launch by launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.executor.cuda_adapters import SAMPLED
from engine.executor.cuda_buffers import CudaHandle, Side
from engine.executor.cuda_pieces import Chain
from engine.executor.cuda_state import DeviceState
from engine.executor.pooling import pooled_chunks, shape_of, token_types
from engine.forward import FUTURE_TOKEN, ForwardInput, ForwardOutput, Int32Array
from engine.ops.attention.device import DecodeStep, MixedStep, Ragged, StepAttention, decode_inputs
from engine.ops.sampling.device import accept
from engine.ops.sampling.device import draw as draw_tokens
from engine.ops.sampling.device_extras import prompt_figures, prompt_logprobs
from engine.ops.state import plan_of
from engine.request import Pooling


def padded(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Zeros behind it, up to `size`."""
    return array if len(array) == size else np.concatenate((array, np.zeros(size - len(array), array.dtype)))


class MixedSteps(DeviceState):
    """See the module."""

    def _launch_mixed(
        self, forward_input: ForwardInput, side: Side, handle: CudaHandle, draw: str
    ) -> Callable[[], Tensor] | None:
        """See `_launch_decode`."""
        layer, staging = self.layer, side.staging
        rows, tokens, decodes = forward_input.num_rows, forward_input.num_tokens, forward_input.num_decode_rows
        adapted = self._has_adapters(staging.row_slot[:rows])
        size = self.pieces.size(tokens)
        with layer.on(self._compute):
            chain = self.pieces.get(self.model, size, adapted) if size is not None else None
        # What a chain reads is padded, and lies in one piece.
        size = tokens if chain is None or size is None else size
        if adapted:
            self._note_adapters(staging.row_slot[:rows], staging.row_len[:rows], size, side)
        metadata, of_groups = side.metadata.build(forward_input, self._tables), side.metadata.of_groups
        sampled = np.flatnonzero(staging.row_samples[:rows])
        if adapted and self._adapters is not None:
            self._adapters.note(self._tables.adapter[staging.row_slot[:rows][sampled]], SAMPLED + side.parity)
        inputs = staging.token_ids[:tokens], metadata.positions, *(group.kv_slots for group in of_groups)
        first_page = metadata.kv_indptr[decodes]
        rest: dict[str, npt.NDArray[Any]] = {
            "qo_indptr": metadata.qo_indptr,
            "kv_indptr": metadata.kv_indptr,
            "last_page_len": metadata.last_page_len,
            "kv_len": metadata.kv_len,
            "sampled": sampled,
            "sampled_token": metadata.qo_indptr[1:][sampled] - 1,
            "sampled_slot": staging.row_slot[:rows][sampled],
            "sampled_at": metadata.kv_len[sampled],
            "prompts_qo_indptr": metadata.qo_indptr[decodes:] - decodes,
            "prompts_kv_indptr": metadata.kv_indptr[decodes:] - first_page,
            "prompts_kv_len": metadata.kv_len[decodes:],
        }
        # Of all rows, and once more of the prompts alone.
        pages = [*(group.kv_indices for group in of_groups), *(group.kv_indices[first_page:] for group in of_groups)]
        longest = int(metadata.kv_len[:decodes].max(initial=1))
        width = self.graphs.width(-(-longest // self.limits.page_size))
        parts = [*(padded(part, size) for part in inputs), *pages, *rest.values()]
        cuts, total = side.write_meta(parts, self._upload)
        inside = staging.table_index is side.first_index
        end = side.end_of(side.first_page, forward_input.num_table_diffs if inside else 0)
        if forward_input.num_sampling_diffs:
            end = side.end_of(staging.sampling, forward_input.num_sampling_diffs)
        self._send(side, end, total)
        token_ids, positions, *others = (side.meta[cut] for cut in cuts)
        kv_slots, others = others[: len(of_groups)], others[len(of_groups) :]
        indices, prompt_indices = others[: len(of_groups)], others[len(of_groups) : len(pages)]
        sent = dict(zip(rest, others[len(pages) :], strict=True))
        pinned = {name: side.meta_host[cut] for name, cut in zip(rest, cuts[-len(rest) :], strict=True)}
        with layer.on(self._compute):
            layer.wait(side.uploaded)
            self._apply_diffs(forward_input, side, handle)
            if handle.reading is not None:
                self._launch_drafts(side, handle)
            last_page_len, kv_len = pinned["last_page_len"], pinned["kv_len"]
            every = Ragged(indices, pinned["qo_indptr"], pinned["kv_indptr"], last_page_len, kv_len)
            starts, first_pages, lengths = (f"prompts_{name}" for name in ("qo_indptr", "kv_indptr", "kv_len"))
            of_prompts = pinned[starts], pinned[first_pages], last_page_len[decodes:], pinned[lengths]
            on_device = sent[starts], sent[first_pages], sent[lengths]
            prompts = Ragged(prompt_indices, *of_prompts, on_device)
            cells = [each[:tokens] for each in kv_slots]
            step = MixedStep(positions[:tokens], cells, every, prompts, decodes, side.parity)
            step.send = functools.partial(self._send_arrays, handle=handle)
            attention = self.attention.mixed(step)
            drafts, most = (
                (side.token_ids[:decodes], 1 + self.limits.max_draft_tokens) if side.has_drafts else (None, 1)
            )
            plan = plan_of(forward_input).on(side.row_slot[:rows], sent["qo_indptr"], drafts, most)

            chunks = []
            for row, first, at, targets, k in self._extras.prompts(forward_input):
                (wanted,) = self._send_arrays([targets], handle)
                owner = int(self._tables.adapter[staging.row_slot[row]])
                chunks.append((first, wanted, self._prompt_out(handle, row, at, targets, k), k, owner))
            pooled = pooled_chunks(forward_input)
            types: Tensor | None = None
            if self.model.config.embedding.num_types > 1 and (kinds := token_types(pooled, tokens)) is not None:
                (types,) = self._send_arrays([kinds.numpy().astype(np.int32)], handle)
            vectors = [
                self._vector_out(handle, row.row, chunk.pooling, chunk.start + chunk.length)
                for row, chunk in zip(forward_input.pooled, pooled, strict=True)
                if chunk.ends
            ]
            owners = {chunk.slot: int(self._tables.adapter[chunk.slot]) for chunk in pooled if adapted}
            found: list[Tensor] = []
            drafter = self._drafter
            before: Tensor | None = None
            if drafter is not None and drafter.reads_hidden:
                before = layer.zeros((tokens, drafter.net.width), self.attention.dtype)
                handle.keep.append(before)

            def enter(token_ids: Tensor) -> None:
                with torch.inference_mode():
                    if chain is not None:
                        read = self.pieces.inputs(size)
                        read.copy_(side.meta[: read.numel()].view_as(read))
                        if adapted and self._adapters is not None:
                            self._adapters.copy_to_chain(side.parity, size)
                    if decodes:
                        step.decode, known = self._decode_rows(side, decodes, width)
                        token_ids[:decodes].copy_(known)

            def leave(hidden: Tensor) -> None:
                with torch.inference_mode():
                    if drafter is not None and before is not None:
                        slots, starts = side.row_slot[:rows], side.row_start[:rows]
                        aux = self._aux(None if chain is None else tokens)
                        drafter.keep_step(hidden, aux, slots, starts, sent["qo_indptr"], before)
                    for first, targets, out, k, owner in chunks:
                        part = hidden[first : first + len(targets)]
                        with self._adapting_one(owner, len(targets)):
                            prompt_figures(part, self.model.logits, targets, k, self.limits.vocab_size, out)
                    self._pooled_by = owners, tokens
                    made = self._pooler.run(pooled, hidden, self.model, apart=any(owners.values()))
                    for out, vector in zip(vectors, made, strict=True):
                        out.copy_(vector)
                    if len(sampled) < rows:
                        side.out[:rows].fill_(FUTURE_TOKEN)
                    if not len(sampled):
                        return
                    with self._adapting_sampled(adapted, side, len(sampled)):
                        logits = self.model.raw_logits(hidden.index_select(0, sent["sampled_token"]))
                    if draw == "open":
                        found.append(logits.float())
                        return
                    given = logits, self._sampling, sent["sampled_slot"], sent["sampled_at"]
                    draw_tokens(*given, self._last_token, side.out, sent["sampled"], filtered=draw == "filtered")
                    if drafts is not None:
                        accept(drafts, side.out, side.row_slot, self._last_token)
                        if self._states is not None:
                            self._states.accept(side.out)

            def work() -> None:
                enter(token_ids)
                if self._states is not None:
                    self._states.expect(plan)
                with torch.inference_mode(), self._adapting(adapted, side, tokens):
                    hidden = self.model.forward(token_ids, positions, attention, types)
                leave(hidden)

            if chain is None:
                layer.launch(work)
            else:
                layer.launch(lambda: enter(self.pieces.inputs(size)[0]))
                self._replay(chain, attention, tokens)
                layer.launch(lambda: leave(self.pieces.hidden[:tokens]))
            if drafter is not None:
                sending = functools.partial(self._send_arrays, handle=handle)
                drafter.read_prompts(forward_input, side, self._tables, before, handle, sending)
        return found.pop if draw == "open" and len(sampled) else None

    def _replay(self, chain: Chain, attention: StepAttention, tokens: int) -> None:
        """The forward of a step whose inputs lie where the chain reads them."""
        q, out = self.pieces.q[:tokens], self.pieces.out[:tokens]

        def attend(number: int) -> None:
            with torch.inference_mode():
                attention.attend(number, q, out)

        for part, number in zip(chain.parts, chain.layers, strict=False):
            self.layer.replay(part)
            self.layer.launch(functools.partial(attend, number))
        self.layer.replay(chain.parts[-1])

    def _decode_rows(self, side: Side, count: int, width: int) -> tuple[DecodeStep, Tensor]:
        """The decode rows of a step with prompts, and their tokens; the step's diffs are applied."""
        positions, nothing = side.row_start[:count], side.table_index[:0]
        tokens, kv_len, kv_slots, tables = decode_inputs(
            self._page_tables,
            self._last_token,
            side.row_slot[:count],
            positions,
            nothing,
            nothing,
            width,
            self.limits.page_size,
            side.token_ids[:count] if side.has_drafts else None,
        )
        return DecodeStep(positions, kv_slots, tables, kv_len, side.parity), tokens

    def _prompt_out(self, handle: CudaHandle, row: int, first: int, targets: Int32Array, k: int) -> Tensor:
        """Where the log-probabilities of a prompt chunk go on the device; they come with the step's tokens."""
        out = self.layer.zeros((len(targets), 2 + 2 * k), torch.int32)
        self._bring(
            handle, out, lambda output, host: output.prompt_logprobs.append(prompt_logprobs(row, first, host, k))
        )
        return out

    def _vector_out(self, handle: CudaHandle, row: int, pooling: Pooling, num_tokens: int) -> Tensor:
        """Where a prompt's vector goes on the device, float32; it comes with the step's tokens."""
        shape = shape_of(pooling, self.model.config, num_tokens)
        out = self.layer.zeros((math.prod(shape[:-1]), shape[-1]), torch.int32)

        def read(output: ForwardOutput, host: Int32Array) -> None:
            vector = host.view(np.float32).reshape(shape).copy()
            output.pooled.append(vector)
            if np.isnan(vector).any():
                output.broken.append(row)

        self._bring(handle, out, read)
        return out.view(torch.float32).view(shape)

    def prompt_step(self, step: int, rows: int, length: int) -> ForwardInput:
        """A step of `rows` new prompts that are `length` tokens long and sample in the hungriest way."""
        limits, staging = self.limits, self.staging[step & 1]
        pages, groups = -(-length // limits.page_size), len(limits.groups)
        diffs = groups * rows * pages
        assert diffs <= limits.num_pages
        staging.reserve_table_diff(diffs)
        index = np.arange(rows, dtype=np.int32)
        staging.row_slot[:rows] = index + 1
        staging.row_start[:rows] = 0
        staging.row_len[:rows] = length
        staging.row_samples[:rows] = not self.model.config.headless
        staging.token_ids[: rows * length] = 0
        staging.qo_indptr[: rows + 1] = np.arange(rows + 1) * length
        entry = np.arange(diffs, dtype=np.int32)
        group, place = entry // (rows * pages), entry % (rows * pages)
        row = group * limits.num_slots + place // pages + 1
        staging.table_index[:diffs] = row * limits.max_pages_per_seq + place % pages
        staging.table_page[:diffs] = entry + 1
        staging.sampling_slot[:rows] = index + 1
        staging.adapter[:rows] = min(1, limits.max_adapters)
        staging.sampling[:rows] = np.zeros((), staging.sampling.dtype)
        staging.sampling["temperature"][:rows] = 1.0
        staging.sampling["top_p"][:rows] = 0.9
        return ForwardInput(step, staging, rows, 0, rows * length, diffs, rows)
