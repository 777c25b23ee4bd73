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

from engine.executor.cuda_buffers import CudaHandle, Side
from engine.executor.cuda_pieces import Chain
from engine.executor.cuda_state import DeviceState
from engine.executor.pooling import pooled_chunks, shape_of
from engine.forward import FUTURE_TOKEN, ForwardInput, Int32Array
from engine.ops.attention.device import DecodeStep, MixedStep, Ragged, StepAttention, decode_inputs
from engine.ops.sampling.device import draw as draw_tokens
from engine.ops.sampling.device_extras import prompt_figures, prompt_logprobs
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
        size = self.pieces.size(tokens)
        with layer.on(self._compute):
            chain = self.pieces.get(self.model, size) if size is not None else None
        # What a chain reads is padded, and lies in one piece.
        size = tokens if chain is None or size is None else size
        metadata = side.metadata
        metadata.build(forward_input, self._tables)
        sampled = np.flatnonzero(staging.row_samples[:rows])
        parts: list[npt.NDArray[Any]] = [
            *(padded(part, size) for part in (staging.token_ids[:tokens], metadata.positions, metadata.kv_slots)),
            metadata.qo_indptr,
            metadata.kv_indptr,
            metadata.last_page_len,
            metadata.kv_indices,
            sampled,
            metadata.qo_indptr[1:][sampled] - 1,
            staging.row_slot[:rows][sampled],
            metadata.kv_len[sampled],
            metadata.kv_len,
            # The prompts alone.
            metadata.qo_indptr[decodes:] - decodes,
            metadata.kv_indptr[decodes:] - metadata.kv_indptr[decodes],
            metadata.kv_indices[metadata.kv_indptr[decodes] :],
        ]
        longest = int(metadata.kv_len[:decodes].max(initial=1))
        width = self.graphs.width(-(-longest // self.limits.page_size))
        cuts, total = side.write_meta(parts, self._upload)
        inside = staging.table_index is side.first_index
        end = side.end_of(side.first_page, forward_input.num_table_diffs if inside else 0)
        if forward_input.num_sampling_diffs:
            end = side.end_of(staging.sampling, forward_input.num_sampling_diffs)
        self._send(side, end, total)
        meta, pinned = side.meta, side.meta_host
        token_ids, positions, kv_slots, indices, where, last, sample_slots, sample_at = (
            meta[cuts[part]] for part in (0, 1, 2, 6, 7, 8, 9, 10)
        )
        with layer.on(self._compute):
            layer.wait(side.uploaded)
            self._apply_diffs(forward_input, side, handle)
            qo_indptr, kv_indptr, last_page_len, kv_len, qo_prompts, kv_prompts = (
                pinned[cuts[part]] for part in (3, 4, 5, 11, 12, 13)
            )
            every = Ragged(indices, qo_indptr, kv_indptr, last_page_len, kv_len)
            pages = meta[cuts[14]]
            prompts = Ragged(pages, qo_prompts, kv_prompts, last_page_len[decodes:], kv_len[decodes:])
            step = MixedStep(positions[:tokens], kv_slots[:tokens], every, prompts, decodes, side.parity)
            attention = self.attention.mixed(step)

            chunks = []
            for row, first, at, targets, k in self._extras.prompts(forward_input):
                (sent,) = self._send_arrays([targets], handle)
                chunks.append((first, sent, self._prompt_out(handle, row, at, targets, k), k))
            pooled = pooled_chunks(forward_input)
            vectors = [
                self._vector_out(handle, chunk.pooling, chunk.start + chunk.length) for chunk in pooled if chunk.ends
            ]
            found: list[Tensor] = []

            def enter(token_ids: Tensor) -> None:
                with torch.inference_mode():
                    if chain is not None:
                        self.pieces.inputs(size).copy_(meta[: 3 * size].view(3, size))
                    if decodes:
                        step.decode, known = self._decode_rows(side, decodes, width)
                        token_ids[:decodes].copy_(known)

            def leave(hidden: Tensor) -> None:
                with torch.inference_mode():
                    for first, targets, out, k in chunks:
                        part = hidden[first : first + len(targets)]
                        prompt_figures(part, self.model.logits, targets, k, self.limits.vocab_size, out)
                    for out, vector in zip(vectors, self._pooler.run(pooled, hidden, self.model), strict=True):
                        out.copy_(vector)
                    if len(sampled) < rows:
                        side.out[:rows].fill_(FUTURE_TOKEN)
                    if not len(sampled):
                        return
                    logits = self.model.raw_logits(hidden.index_select(0, last))
                    if draw == "open":
                        found.append(logits.float())
                        return
                    given = logits, self._sampling, sample_slots, sample_at
                    draw_tokens(*given, self._last_token, side.out, where, filtered=draw == "filtered")

            def work() -> None:
                enter(token_ids)
                with torch.inference_mode():
                    hidden = self.model.forward(token_ids, positions, attention)
                leave(hidden)

            if chain is None:
                layer.launch(work)
            else:
                layer.launch(lambda: enter(self.pieces.inputs(size)[0]))
                self._replay(chain, attention, tokens)
                layer.launch(lambda: leave(self.pieces.hidden[:tokens]))
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
            self._page_table,
            self._last_token,
            side.row_slot[:count],
            positions,
            nothing,
            nothing,
            width,
            self.limits.page_size,
        )
        return DecodeStep(positions, kv_slots, tables, kv_len, side.parity), tokens

    def _prompt_out(self, handle: CudaHandle, row: int, first: int, targets: Int32Array, k: int) -> Tensor:
        """Where the log-probabilities of a prompt chunk go on the device; they come with the step's tokens."""
        out = self.layer.zeros((len(targets), 2 + 2 * k), torch.int32)
        self._bring(
            handle, out, lambda output, host: output.prompt_logprobs.append(prompt_logprobs(row, first, host, k))
        )
        return out

    def _vector_out(self, handle: CudaHandle, pooling: Pooling, num_tokens: int) -> Tensor:
        """Where a prompt's vector goes on the device, float32; it comes with the step's tokens."""
        shape = shape_of(pooling, self.model.config, num_tokens)
        out = self.layer.zeros((math.prod(shape[:-1]), shape[-1]), torch.int32)
        self._bring(handle, out, lambda output, host: output.pooled.append(host.view(np.float32).reshape(shape).copy()))
        return out.view(torch.float32).view(shape)

    def prompt_step(self, step: int, rows: int, length: int) -> ForwardInput:
        """A step of `rows` new prompts that are `length` tokens long and sample in the hungriest way."""
        limits, staging = self.limits, self.staging[step & 1]
        pages = -(-length // limits.page_size)
        assert rows * pages <= limits.num_pages
        staging.reserve_table_diff(rows * pages)
        index = np.arange(rows, dtype=np.int32)
        staging.row_slot[:rows] = index + 1
        staging.row_start[:rows] = 0
        staging.row_len[:rows] = length
        staging.row_samples[:rows] = not self.model.config.headless
        staging.token_ids[: rows * length] = 0
        staging.qo_indptr[: rows + 1] = np.arange(rows + 1) * length
        entry = np.arange(rows * pages, dtype=np.int32)
        staging.table_index[: rows * pages] = (entry // pages + 1) * limits.max_pages_per_seq + entry % pages
        staging.table_page[: rows * pages] = entry + 1
        staging.sampling_slot[:rows] = index + 1
        staging.sampling[:rows] = np.zeros((), staging.sampling.dtype)
        staging.sampling["temperature"][:rows] = 1.0
        staging.sampling["top_p"][:rows] = 0.9
        return ForwardInput(step, staging, rows, 0, rows * length, rows * pages, rows)
