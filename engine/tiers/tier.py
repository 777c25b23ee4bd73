"""DiskTier: prompts' pages outlive the cache and the process. Its public half is the loop's, one thread does the rest.

When a prompt is computed, its whole pages are written to a PageStore, or to a HostStore above it, those that are not
there: of groups with a window what the end sees, of a recurrent state the snapshots on the way. When a prompt comes
whose pages are there and not in the cache, it is RECEIVING while they are read, and steps go on without it; what
arrived by the deadline enters the radix tree, and the rest is computed. Nothing that fails here fails a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from engine.cache.kv_cache import SequencePages
from engine.clock import Clock, Timer
from engine.config import TierOptions
from engine.executor.base import Executor
from engine.lending import Lending
from engine.request import Request
from engine.scheduling.sequence import Sequence
from engine.tiers.disk import PageStore
from engine.tiers.host import HostStore
from engine.tiers.names import TierNames
from engine.tiers.tally import TierTally
from engine.tiers.watch import DISK, HOST, TierWatch
from engine.tiers.worker import Job, Worker

logger = logging.getLogger("oneloop.tiers")

# A prompt is not worth the detour for fewer tokens.
LEAST_TOKENS = 128
# Of all pages, those that may be held to be written; prompts beyond that are not kept.
WRITTEN_SHARE = 0.25
# After the deadline, for the page that is just being read.
_GRACE_S = 0.5


class DiskTier:
    """See the module. received: called for a sequence that need not wait any more. weights: a name of what is in a
    directory, None for where the model came from. Raises StartupError."""

    def __init__(
        self,
        options: TierOptions,
        executor: Executor,
        lending: Lending,
        clock: Clock,
        *,
        received: Callable[[Sequence], None],
        wake: Callable[[], None],
        weights: Callable[[Path | None], str],
        worker: Worker | None = None,
        least_tokens: int = LEAST_TOKENS,
    ) -> None:
        self.is_paused = False
        self._executor, self._lending, self._clock = executor, lending, clock
        self._received, self._wake, self._weights = received, wake, weights
        self._timeout_s = options.timeout_s
        self._page_size = lending.limits.page_size
        self._most_held = int(lending.limits.num_pages * WRITTEN_SHARE)
        self._num_held = 0
        self._least_tokens = least_tokens
        if worker is None:
            disk = None if options.directory is None else PageStore(options.directory, options.max_bytes)
            host = HostStore(options.host_bytes, disk) if options.host_bytes else None
            worker = Worker(disk, host=host)
        self.store = worker.store
        self.worker = worker
        self.tally = TierTally(self.worker)
        self._watch: TierWatch | None = None
        self._idle = asyncio.Event()
        self._jobs: set[Job] = set()
        # By the name of the first page that is missing: who waits for it, the one first that reads it.
        self._reading: dict[bytes, list[Sequence]] = {}
        self._take_memory(None)

    def describe(self) -> dict[str, object]:
        """What a server says of its tiers: of each what it holds, and what there is room for."""
        host, disk, tally = self.worker.host, self.worker.disk, self.tally
        told: dict[str, object] = {
            "queried_tokens": tally.queried_tokens,
            "hit_tokens": tally.hit_tokens,
            "failures": dict(tally.failures),
            "is_paused": self.is_paused,
        }
        if host is not None:
            told["host"] = {
                "medium": HOST,
                "bytes": host.num_bytes,
                "max_bytes": host.max_bytes,
                "pages": host.num_rows,
                "evicted_pages": host.num_evicted,
            }
        if disk is not None:
            told["disk"] = {
                "medium": DISK,
                "bytes": disk.bytes,
                "max_bytes": disk.max_bytes,
                "files": len(disk),
                "hangs": self.worker.hangs,
            }
        return told

    def watch(self, watch: TierWatch) -> None:
        """Tell it of all pages that come to the tiers and go, from now on."""
        self._watch = watch
        self.worker.watch(watch)

    def _name(self, request: Request, chain: list[bytes]) -> None:
        if self._watch is not None:
            data = self._names.chain(request)[0].tobytes()
            self._watch.named(request.cache_root, data, self._names.told(chain))

    async def pause(self) -> None:
        """Nobody reads or writes the KV memory from here on, until `resume`. A file that hangs is waited for as long as
        for any prompt's pages, then given up."""
        self.is_paused = True
        for job in self._jobs:
            job.stopped = True
        try:
            async with asyncio.timeout(self._timeout_s + _GRACE_S):
                while self._jobs:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            logger.warning("%d prompts' pages are given up: the disk, or host memory, does not answer", len(self._jobs))
            jobs = list(self._jobs)
            self._give_up(jobs)

    def _give_up(self, jobs: list[Job]) -> None:
        """The disk hangs amid them, or is far behind: their pages are given back, and nobody waits for more till it has
        come back."""
        self.worker.give_up(jobs)
        for job in jobs:
            self.tally.failures["stuck"] += 1
            job.then(job)

    async def resume(self, directory: Path | None) -> None:
        """Go on, with the memory that there is now and the weights of a directory."""
        await asyncio.to_thread(self._take_memory, directory)
        self.is_paused = False

    def close(self) -> None:
        """The engine has ended. Blocks for a while, for what is yet to be written."""
        self.worker.close()

    def _take_memory(self, directory: Path | None) -> None:
        # First what may fail: the checkpoint may be gone.
        weights = self._weights(directory)
        memory = self._executor.page_memory()
        states = self._executor.state_memory()
        limits = self._lending.limits
        # Host memory is divided as the device's is.
        bytes_of = [memory.page_bytes * limits.num_pages]
        if states is not None:
            bytes_of.append(states.page_bytes * (limits.num_snapshots or 0))
        self.worker.use(memory, states, [part / sum(bytes_of) for part in bytes_of])
        layout = memory.layout if states is None else f"{memory.layout} {states.layout}"
        self._names = TierNames(f"{layout} weights {weights}", limits)

    # ---- what is there

    def promises(self, request: Request) -> bool:
        """Whether so much of a prompt is on the disk, and not in the cache, that it should wait for that."""
        if not self._serves(request) or request.sampling.prompt_logprobs is not None:
            return False
        self.tally.queried_tokens += len(request.prompt_token_ids)
        if not len(self.store):
            return False
        first, depth, _ = self._look_up(request)
        return (depth - first) * self._page_size >= max(1, self._least_tokens)

    def _serves(self, request: Request) -> bool:
        enough = len(request.prompt_token_ids) > max(self._least_tokens, self._page_size)
        return enough and not (self.is_paused or self.worker.hangs) and request.pooling is None

    def _look_up(self, request: Request) -> tuple[int, int, list[bytes]]:
        """How many pages are cached, how many would be with what is on the disk, and their chain of names."""
        tokens, chain = self._names.chain(request)
        first = self._lending.kv_cache.match_length(tokens, request.cache_root) // self._page_size
        return first, self._names.reach(self.store, chain, first), chain

    # ---- there and back

    def receive(self, sequence: Sequence) -> None:
        """Read what was promised. Calls `received` in any case, never before it returns."""
        first, depth, chain = self._look_up(sequence.request)
        if depth > first and not self.is_paused:
            if (others := self._reading.get(chain[first])) is not None:
                # What is being read is for all; then there is another look at what is missing.
                others.append(sequence)
                return
            pages = self._lending.receive(sequence, depth)
            if pages is not None:
                assert pages.num_shared == first
                self._read(sequence, pages, chain, depth)
                return
            self.tally.failures["room"] += 1
        self._clock.call_later(0.0, lambda: self._received(sequence))

    def _read(self, sequence: Sequence, pages: SequencePages, chain: list[bytes], depth: int) -> None:
        first, key = pages.num_shared, chain[pages.num_shared]
        self._name(sequence.request, chain[:depth])
        timer: Timer
        self._reading[key] = [sequence]

        def ended(job: Job) -> None:
            if job not in self._jobs:
                return  # it was given up just as it ended
            self._jobs.discard(job)
            timer.cancel()
            if not (job.is_whole or job.stopped):
                self.tally.failures["read"] += 1
            right = depth if job.is_whole else first if self._names.comes_whole else first + job.count
            self.tally.hit_tokens += (right - first) * self._page_size
            self._lending.give_back(pages, sequence, right * self._page_size)
            self._let_go(key, again=job.is_whole)
            self._settle()

        def is_late() -> None:
            if job.is_whole:
                return  # it is about to be told
            job.stopped = True
            self.tally.failures["timeout"] += 1
            logger.warning(
                "request %s: %d of %d pages came in time",
                *(sequence.request.request_id, job.count, len(job.items)),
            )
            # The file at hand is waited for, but not for ever.
            nonlocal timer
            timer = self._clock.call_later(_GRACE_S, lambda: self._give_up([job]))

        job = Job(self._names.to_read(chain, pages, depth), ended)
        timer = self._clock.call_later(self._timeout_s, is_late)
        self._jobs.add(job)
        if self._lending.is_unordered:
            self._lending.once_committed(lambda: self.worker.read(job))
        else:
            self.worker.read(job)

    def _let_go(self, key: bytes, *, again: bool) -> None:
        """Whoever waits for a page need not any more. again: the others may find more of theirs."""
        for number, sequence in enumerate(self._reading.pop(key, [])):
            if number and again and not sequence.is_finished:
                self.receive(sequence)
            else:
                self._received(sequence)

    def keep(self, sequence: Sequence) -> None:
        """A prompt is computed: its pages shall be written, those that are not there, and snapshots of its state."""
        if not self._serves(sequence.request):
            return
        lending, names = self._lending, self._names
        lent = [lending.keep(sequence)]
        if names.has_windows and sequence.num_cached_tokens:
            # There others went another way, and some will again; what is seen there is behind the prompt's windows.
            lent.append(lending.keep(sequence, sequence.num_cached_tokens))
        _, chain = names.chain(sequence.request)
        held = {item.name: item for pages in lent for item in names.to_write(chain, pages, lending.snapshots_of(pages))}
        new = [item for item in held.values() if item.name not in self.store]
        if self.worker.host is not None:
            # What is old there is what the device has used longest ago.
            self.worker.host.touch(held)

        if new:
            self._name(sequence.request, chain)

        def give_back() -> None:
            for pages in lent:
                lending.give_back(pages, sequence, 0)

        # A prompt that is longer than that may be written while nothing else is.
        if not new or (self._num_held and self._num_held + len(held) > self._most_held):
            self.tally.failures["busy"] += bool(new)
            give_back()
            return

        def ended(job: Job) -> None:
            if job not in self._jobs:
                return  # it was given up just as it ended
            self._jobs.discard(job)
            self._num_held -= len(held)
            if not (job.is_whole or job.stopped):
                self.tally.failures["write"] += 1
            give_back()
            self._settle()

        def begin() -> None:
            # A step that has failed may have been the one that was to compute them.
            job.stopped |= not all(map(lending.kv_cache.is_intact, lent))
            self.worker.write(job)

        job = Job(new, ended)
        self._num_held += len(held)
        self._jobs.add(job)
        if lending.is_unordered:
            lending.once_committed(begin)
        else:
            self.worker.write(job)

    def _settle(self) -> None:
        """Pages were given back: somebody may have waited for them."""
        if not self._jobs:
            self._idle.set()
        self._wake()
