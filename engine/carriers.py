"""Carrying: who brings pages of the KV cache elsewhere and back: other servers (transfer), the disk (tier).

The Engine is one. What comes for a sequence comes before it is queued; while the memory goes or means something else,
nobody carries anything.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine.clock import Clock
from engine.config import EngineConfig, StartupError
from engine.executor.base import Executor
from engine.lending import Lending
from engine.request import Request
from engine.scheduling.sequence import Sequence
from engine.tiers.tier import DiskTier
from engine.transfer.base import Connector
from engine.transfer.exchange import PageExchange
from engine.transfer.tally import TransferTally

if TYPE_CHECKING:
    import asyncio

    from engine.metrics import EngineMetrics
    from engine.publisher import Publisher

logger = logging.getLogger("oneloop.carriers")


class Carrying(ABC):
    """See the module. What is declared here is the Engine's."""

    config: EngineConfig
    executor: Executor
    lending: Lending
    clock: Clock
    metrics: EngineMetrics
    publisher: Publisher
    _wake: asyncio.Event
    transfer: PageExchange | None = None
    tier: DiskTier | None = None

    @abstractmethod
    def received(self, sequence: Sequence) -> None:
        """Nothing more comes for a sequence: it waits for its turn."""

    def enable_transfer(self, connector: Connector, weights: Callable[[Path | None], str]) -> PageExchange:
        """Keep pages for other servers, or read theirs, as the options say. See PageExchange. Raises StartupError."""
        tally = TransferTally([one for one in self.metrics.prefixes if one != "sglang"], self.metrics.model_name)
        self.transfer = PageExchange(
            self.config.transfer,
            connector,
            self.executor,
            self.lending,
            self.clock,
            received=self.received,
            wake=self._wake.set,
            weights=weights,
            tally=tally,
        )
        self.metrics.add_families(tally.collect)
        self.publisher.keep_pages = self.transfer.keep
        return self.transfer

    def enable_tier(self, weights: Callable[[Path | None], str]) -> DiskTier:
        """Keep prompts' pages on the disk, as the options say. See DiskTier. Raises StartupError."""
        self.tier = DiskTier(
            self.config.tiers,
            self.executor,
            self.lending,
            self.clock,
            received=self.received,
            wake=self._wake.set,
            weights=weights,
        )
        self.metrics.add_families(self.tier.tally.collect)
        self.publisher.on_prompt = self.tier.keep
        return self.tier

    def _carrier_of(self, request: Request) -> Callable[[Sequence], None] | None:
        """Who is to be told of a request's sequence, because pages of it come from elsewhere."""
        if request.transfer is not None and self.transfer is not None and request.transfer.source is not None:
            return partial(self.transfer.receive, source=request.transfer.source)
        return self.tier.receive if self.tier is not None and self.tier.promises(request) else None

    async def _halt_pages(self) -> None:
        """Nobody carries pages from here on: the memory goes, or means something else."""
        for carrier in (self.transfer, self.tier):
            if carrier is not None and not carrier.is_paused:
                await carrier.pause()

    async def _let_pages_go(self, weights: Path | None) -> None:
        """With the memory that there is now. weights: the directory they came from, None for the first."""
        for carrier in (self.transfer, self.tier):
            if carrier is not None and carrier.is_paused:
                try:
                    await carrier.resume(weights)
                except (OSError, StartupError) as error:
                    # The checkpoint may be gone, and pages without the name of their weights are worth nothing.
                    logger.warning("pages are not carried until weights are loaded again: %s", error)

    def _end_carriers(self) -> None:
        for carrier in (self.transfer, self.tier):
            if carrier is not None:
                carrier.close()
