"""Open steps: their logits are drawn from by operations of their own, for penalties, grammars and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.executor.cuda_buffers import CudaHandle
from engine.executor.cuda_state import DeviceState
from engine.executor.speculator import mask_places
from engine.forward import FUTURE_TOKEN, ForwardInput
from engine.ops.sampling.device import accept, draw, process
from engine.ops.sampling.device_extras import allow, figures_of


class OpenSteps(DeviceState):
    """See the module."""

    def _draw_open(
        self, forward_input: ForwardInput, handle: CudaHandle, logits: Callable[[], Tensor], *, filtered: bool
    ) -> None:
        """Launch the sampling of a step whose logits are there; compute stream."""
        layer, side, extras = self.layer, handle.side, self._extras
        staging, num_rows, decodes = side.staging, forward_input.num_rows, forward_input.num_decode_rows
        rows = np.flatnonzero(staging.row_samples[:num_rows])
        slots_host = staging.row_slot[:num_rows][rows]
        lengths = (staging.row_start + staging.row_len)[:num_rows][rows]

        def send(arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
            return self._send_arrays(arrays, handle)

        plan = extras.plan(slots_host, send)
        where, slots, positions = send([rows.astype(np.int32), slots_host, lengths.astype(np.int32)])
        masks, masked, bits = forward_input.masks, None, None
        if masks is not None:
            words = masks.bits
            if handle.positions is None:
                index = np.searchsorted(rows, masks.rows)
            else:
                counting, index = mask_places(masks.rows, handle.positions)
                words = words[counting]
            masked, bits = send([index.astype(np.int32), words.reshape(-1).view(np.int32)])
            bits = bits.view(len(index), -1)
        figures = asked = None
        if plan is not None and len(plan.logprob_rows):
            figures = layer.zeros((len(plan.logprob_rows), plan.figures()), torch.int32)
            (asked,) = send([plan.logprob_rows.astype(np.int32)])
            self._bring(
                handle,
                figures,
                lambda output, host: setattr(output, "logprobs", extras.step_logprobs(host, plan, rows)),
            )

        # All rows that continue sequences draw, and stand first.
        drafts = side.token_ids[:decodes] if side.has_drafts else None

        def work() -> None:
            with torch.inference_mode():
                raw, wide = logits(), slots.long()
                x = raw if plan is None else extras.adjust(raw, wide, plan, drafts)
                if masked is not None and bits is not None:
                    x = allow(x, masked, bits)
                if len(rows) < num_rows:
                    side.out[:num_rows].fill_(FUTURE_TOKEN)
                given = x, self._sampling, slots, positions, self._last_token, side.out, where
                draw(*given, filtered=filtered, masked=True)
                if drafts is not None:
                    accept(drafts, side.out, side.row_slot, self._last_token)
                    if self._states is not None:
                        self._states.accept(side.out)
                if plan is None:
                    return
                if drafts is not None:
                    tokens = side.out.index_select(0, where.long()).clamp(min=0)
                else:
                    tokens = self._last_token.index_select(0, wide)  # `out` may say that a row has none
                extras.note(wide, tokens, drafts)
                if figures is not None and asked is not None:
                    index = asked.long()
                    own, drawn = raw.index_select(0, index), tokens.index_select(0, index)
                    if self.limits.processed_logprobs:
                        given = self._sampling.index_select(0, wide.index_select(0, index))
                        at = positions.index_select(0, index)
                        own = process(x.index_select(0, index), given, at, drawn, filtered=filtered)
                    figures.copy_(figures_of(own, drawn, plan.num_top))

        layer.launch(work)
