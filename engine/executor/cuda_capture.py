"""When graphs of decode steps are captured: at a second use, while the device is idle, or at start; and what is tried
before, so that no client waits for a kernel to be built.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from engine.executor.cuda_attention import choose_attention
from engine.executor.cuda_buffers import Side
from engine.executor.cuda_decode import DecodeSteps
from engine.executor.cuda_graph import GraphKey
from engine.executor.cuda_products import (
    COUNTS,
    choose_codes,
    choose_experts,
    choose_products,
    choose_tiles,
    of_words,
    to_words,
)
from engine.forward import FUTURE_TOKEN
from engine.models.parts.decoder import CausalLM
from engine.ops.attention.device import DecodePlan


class Captures(DecodeSteps):
    """See the module."""

    def _warm_up(self, key: GraphKey, *, capture: bool) -> None:
        """Run a decode step of padding rows, then record it. Nothing of the key's parity may be in flight."""
        layer, side = self.layer, self._sides[key.side]
        with layer.on(self._compute):
            try:
                layer.launch(side.block.zero_)
                if side.has_drafts:  # each row begins a sequence
                    layer.launch(lambda: side.token_ids.fill_(FUTURE_TOKEN))
                if self.attention.decode_needs_plan(key.size):
                    self._plan_padding(side, key)
                self._prepare(key)
                layer.launch(lambda: self._decode(key))
                if capture:
                    self._capture(key)
            finally:
                # The next upload to this side must not overtake what was launched, also where the rest has failed.
                layer.record(side.computed)

    def _plan_padding(self, side: Side, key: GraphKey) -> None:
        indptr, ones = torch.arange(key.size + 1, dtype=torch.int32), torch.ones(key.size, dtype=torch.int32)
        indices = side.meta[: key.size]
        self.layer.launch(indices.zero_)
        plan = DecodePlan(indptr, ones, [indices] * len(self.limits.groups))
        self.attention.plan_decode(plan, key.size, key.width, side.parity)

    def _capture_when_idle(self) -> None:
        """Called by the loop a while after the last step. One graph at a time, then the loop gets its turn."""
        self._idle_timer = None
        key = self.graphs.next_wanted()
        if key is None or self._in_flight or self._lost is not None or self._closed:
            return
        if not self._moving.acquire(blocking=False):
            return
        try:
            self._tell_capture(key)
            self._warm_up(key, capture=True)
        except Exception as error:
            self._judge(error)
            self.graphs.give_up(key, error)
        finally:
            self._moving.release()
        if self._lost is None and self.graphs.next_wanted() is not None:
            self._capture_later(0.0)

    def _capture_later(self, seconds: float) -> None:
        self._idle_timer = asyncio.get_running_loop().call_later(seconds, self._capture_when_idle)

    def _tell_capture(self, key: GraphKey) -> None:
        """Where ranks compute together: a decode step of padding rows of this key comes next, and its capture."""

    def choose_attention(self) -> list[int]:
        """See cuda_attention.py; before anything is captured. Blocks."""
        graphs = self.graphs
        sizes = graphs.sizes if graphs.enabled else []  # else there are as many sizes as rows
        with self.layer.may_block(), self.layer.on(self._compute):
            found = choose_attention(self.attention, sizes, graphs.width, self.limits.max_model_len, self.layer)
            self.layer.synchronize_all()
        return found

    def choose_products(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """See cuda_products.py: what choose_products and choose_tiles return; before anything is captured. Blocks."""
        group, linears, mixtures = self._group, self.model.linears, self.model.mixtures
        if self._drafter is not None:
            drafting = self._drafter.net.weights
            linears, mixtures = [*linears, *drafting.linears], [*mixtures, *drafting.mixtures]
        found = tiles = (0, 0)
        codes = 0
        if group is None or group.rank == 0:
            most = self.limits.max_num_batched_tokens
            with self.layer.may_block(), self.layer.on(self._compute):
                found = choose_products(linears, self.layer)
                tiles = choose_tiles(linears, most, self.layer)
                codes = choose_codes(linears, most, self.layer) + choose_experts(mixtures, most, self.layer)
                self.layer.synchronize_all()
        if group is not None:
            # By one clock: a router must send a token to the same experts in every rank.
            said = group.of_first(
                [found, tiles, codes, *([to_words(one.ways) for one in of] for of in (linears, mixtures))]
            )
            found, tiles, codes, *ways = of_words(said)
            for one, way in zip([*linears, *mixtures], (*ways[0], *ways[1]), strict=True):
                one.ways = way
        # What was timed has left blocks in the graphs' pool that no graph of a step is as large as.
        self.graphs.clear()
        self._faster = [(linear.kind, linear.ways) for linear in self.model.linears]
        self._faster_mixtures = [(mixture.shape, mixture.ways) for mixture in self.model.mixtures]
        if (found[0] or codes) and not self.model.config.headless:
            for rows in COUNTS:  # a norm or a residual that they take along makes them other kernels
                self.decode_once(min(rows, self.limits.max_num_seqs))
        return found, tiles

    def _with_products(self, model: CausalLM) -> CausalLM:
        """Another model of the same shapes, with what was found faster for the first one, and its adapters."""
        if self._adapters is not None:
            self._adapters.attach(model)
        self._ask_for_aux(model)
        for linear, (kind, ways) in zip(model.linears, self._faster, strict=False):
            if linear.kind == kind:
                linear.ways = ways
        for mixture, (shape, found) in zip(model.mixtures, self._faster_mixtures, strict=False):
            if mixture.shape == shape:
                mixture.ways = found
        return model

    def decode_once(self, rows: int = 1) -> None:
        """A decode step of padding rows: its kernels are built and loaded before a client waits for them. Blocks."""
        kinds = [("plain", each) for each in self.graphs.families] + [("filtered", False)]
        with self.layer.may_block():
            for side in self._sides[::2]:  # steps with drafts have kernels of their own
                for draw, adapted in kinds:
                    key = self.graphs.key(rows, 1, side.number, draw)._replace(adapted=adapted)
                    if self.attention.decode_needs_plan(key.size):
                        for each in self._sides[::2]:  # see capture_at_start
                            self.layer.synchronize(each.computed)
                    self._warm_up(key, capture=False)
            self.layer.synchronize_all()

    def capture_at_start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Mode start: capture what is commonly used. Blocks."""
        keys = list(self.graphs.at_start())
        with self.layer.may_block():
            for number, key in enumerate(keys):
                if self.attention.decode_needs_plan(key.size):
                    # A plan writes to the pinned buffer that the copy of the parity's last one may still read.
                    for side in self._sides[key.side & 1 :: 2]:
                        self.layer.synchronize(side.computed)
                self._warm_up(key, capture=True)
                if progress is not None:
                    progress(number + 1, len(keys))
            with self.layer.on(self._compute):
                for size in reversed(self.pieces.sizes):
                    # Captures may be over by then.
                    if size in self.pieces.sizes:
                        for adapted in self.graphs.families:
                            self.pieces.capture(self.model, size, adapted)
            self.layer.synchronize_all()
