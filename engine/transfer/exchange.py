"""PageExchange: whose pages are kept for other servers, and which of theirs are fetched. Loop thread.

One server (P) answers a prompt with one token and keeps its pages under a name that nobody can guess. Another (D) gets
that name with the prompt, asks P over the side channel for those pages that it does not have itself, reads them by a
connector, and asks whether they were kept all the while: of groups with a window what the end sees, of a recurrent
state the snapshot there. Whatever goes wrong, D computes the prompt itself, counts it, and says why in one line.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.cache.kv_cache import SequencePages, TokenIds
from engine.cache.node import Snapshot
from engine.clock import Clock, Timer
from engine.config import StartupError, TransferOptions
from engine.executor.base import Executor
from engine.forward import Int32Array
from engine.lending import Lending
from engine.request import RemotePages
from engine.scheduling.sequence import Sequence
from engine.transfer.base import Connector, Json, TransferError, parse_networks
from engine.transfer.tally import TransferTally
from engine.transfer.wire import MAX_MESSAGE, Channel, WireError, connect, family_of, pack, read_message

logger = logging.getLogger("oneloop.transfer")

# Of the side channel's words.
VERSION = 2
MAX_CONNECTIONS = 256
MAX_READS_OF_ONE = 64
# A reader that was given pages has asked for them for a reason; the connection may be silent while it reads.
_GRACE_S = 5.0
_ROOM_POLL_S = 0.01


@dataclass(slots=True)
class _Kept:
    """A prompt whose pages wait for a reader. ids: in all groups. snapshot: of the recurrent state behind them, pinned
    where not too many are. settled: what they hold is right, or they were let go. reads: by ticket, what was described;
    one that ended takes them along."""

    sequence: Sequence
    pages: SequencePages
    num_pages: int
    ids: list[int]
    snapshot: Snapshot | None
    is_pinned: bool
    expires_at: float
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    reads: dict[str, Json] = field(default_factory=dict)
    timer: Timer | None = None

    @property
    def is_there(self) -> bool:
        """Not only its pages."""
        return self.snapshot is None or self.snapshot.is_there


class PageExchange:
    """See the module. received: called for a sequence that need not wait any more. weights: a name of what is in a
    directory, None for where the model came from: equal ones may exchange pages. Raises StartupError."""

    def __init__(
        self,
        options: TransferOptions,
        connector: Connector,
        executor: Executor,
        lending: Lending,
        clock: Clock,
        *,
        received: Callable[[Sequence], None],
        wake: Callable[[], None],
        weights: Callable[[Path | None], str],
        tally: TransferTally,
    ) -> None:
        self.options = options
        self.engine_id = options.engine_id or f"oneloop-{secrets.token_hex(8)}"
        self.is_paused = False
        self.tally = tally
        self._connector = connector
        self._executor = executor
        self._lending = lending
        self._clock = clock
        self._received = received
        self._wake = wake
        self._weights = weights
        self._networks = parse_networks(options.peers)
        self._page_size = lending.limits.page_size
        self._most_kept = int(lending.limits.num_pages * options.kept_share)
        self._kept: dict[str, _Kept] = {}
        # By page: for how many readers it is kept.
        self._kept_pages: Counter[int] = Counter()
        # By what they wait for: sequences whose pages are on their way, the first of which has asked for them.
        self._waiting: dict[tuple[RemotePages, str, bytes], list[Sequence]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Reads that did not end in time; their pages are lent until they do.
        self._overdue: set[asyncio.Future[int]] = set()
        self._room = asyncio.Lock()
        self._connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._layout = ""
        tally.num_kept_pages = lambda: len(self._kept_pages)
        self._take_memory(None)
        self._socket = _bind(options.host, options.port) if options.keeps else None
        # As readers are told: an address, for they resolve no names.
        self.host, self.port = options.host, 0
        if self._socket is not None:
            self.host, self.port = self._socket.getsockname()[:2]

    @property
    def page_size(self) -> int:
        return self._page_size

    def describe(self) -> dict[str, object]:
        """What a server says of its exchange: who it is, what it keeps, and what it has read."""
        tally, options = self.tally, self.options
        return {
            "kv_connector": options.connector,
            "kv_role": options.role,
            "engine_id": self.engine_id,
            "side_channel_port": self.port or None,
            "kept_requests": len(self._kept),
            "kept_pages": len(self._kept_pages),
            "hit_tokens": tally.hit_tokens,
            "recomputed_tokens": tally.recomputed_tokens,
            "failures": dict(tally.failures),
            "is_paused": self.is_paused,
        }

    async def start(self) -> None:
        """Answer readers."""
        if self._socket is not None and self._server is None:
            self._server = await asyncio.start_server(self._answer_peer, sock=self._socket, limit=MAX_MESSAGE)

    async def pause(self) -> None:
        """Nobody reads or writes the KV memory from here on, until `resume`. What is kept is let go."""
        self.is_paused = True
        for name in list(self._kept):
            self._let_go(name, "resting")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # This ends what does not end by itself.
        await asyncio.to_thread(self._connector.release, None)
        if self._overdue:
            # Who owned the memory now would be written to.
            await asyncio.wait(set(self._overdue))

    async def resume(self, directory: Path | None) -> None:
        """Go on, with the memory that there is now and the weights of a directory."""
        await asyncio.to_thread(self._take_memory, directory)
        self.is_paused = False

    def close(self) -> None:
        """The engine has ended."""
        for task in self._tasks:
            task.cancel()
        for writer in self._connections:
            writer.close()
        if self._server is not None:
            self._server.close()
        elif self._socket is not None:
            self._socket.close()
        for kept in self._kept.values():
            if kept.timer is not None:
                kept.timer.cancel()
        self._connector.close()

    def _take_memory(self, directory: Path | None) -> None:
        # First what may fail: the checkpoint may be gone.
        weights = self._weights(directory)
        memory, states = self._executor.page_memory(), self._executor.state_memory()
        self._connector.register([memory] if states is None else [memory, states])
        layout = memory.layout if states is None else f"{memory.layout} {states.layout}"
        self._layout = f"{layout} weights {weights}"

    # ---- pages that others read

    def keep(self, sequence: Sequence) -> Json | None:
        """Keep the pages of a prompt whose first token is there; what its reader must know, in vLLM's words. None where
        they cannot be kept."""
        if self.is_paused:
            self._not_kept(sequence, "resting")
            return None
        lending = self._lending
        pages, num_pages = lending.keep(sequence), 0
        snapshot = next((one for depth, one in lending.snapshots_of(pages) if depth == pages.num_shared), None)
        if snapshot is not None or lending.limits.num_snapshots is None:
            num_pages = pages.num_shared
        ids = [page for own in pages.lists for page in own[:num_pages] if page]
        if len(self._kept_pages.keys() | set(ids)) > self._most_kept:
            self._lending.give_back(pages, sequence, 0)
            self._not_kept(sequence, "room")
            return None
        name = secrets.token_hex(16)
        if num_pages:
            is_pinned = snapshot is not None and lending.pin(snapshot)
            expires_at = self._clock.now() + self.options.keep_timeout_s
            kept = _Kept(sequence, pages, num_pages, ids, snapshot, is_pinned, expires_at)
            self._kept[name] = kept
            self._kept_pages.update(ids)
            self._set_timer(name, kept)
            if lending.is_unordered:
                lending.once_committed(lambda: self._settle(name, kept))
            else:
                kept.settled.set()
            told = pages.pages[:num_pages]
        else:
            lending.give_back(pages, sequence, 0)
            told = []
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": told,
            "remote_engine_id": self.engine_id,
            "remote_request_id": name,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": 1,
        }

    def _settle(self, name: str, kept: _Kept) -> None:
        """What was in flight when they were kept has ended: one that failed may have been what was to compute them."""
        if name in self._kept and not self._lending.kv_cache.is_intact(kept.pages):
            self._let_go(name, "failed")
        kept.settled.set()

    def _not_kept(self, sequence: Sequence, reason: str) -> None:
        self.tally.not_kept[reason] += 1
        logger.warning("request %s: its pages are not kept (%s)", sequence.request.request_id, reason)

    def _set_timer(self, name: str, kept: _Kept) -> None:
        kept.timer = self._clock.call_later(kept.expires_at - self._clock.now(), lambda: self._on_timer(name, kept))

    def _on_timer(self, name: str, kept: _Kept) -> None:
        # Whoever is reading gets as long again, once.
        if kept.reads and self._clock.now() < kept.expires_at + self.options.keep_timeout_s:
            kept.timer = self._clock.call_later(self.options.keep_timeout_s, lambda: self._let_go(name, "expired"))
            kept.expires_at = -np.inf
        else:
            self._let_go(name, "expired")

    def _let_go(self, name: str, reason: str) -> None:
        kept = self._kept.pop(name, None)
        if kept is None:
            return
        kept.settled.set()
        if kept.timer is not None:
            kept.timer.cancel()
        for description in kept.reads.values():
            self._connector.release(description)
        self.tally.let_go[reason] += 1
        request_id = kept.sequence.request.request_id
        if reason == "expired":
            logger.warning("request %s: nobody has read its %d pages in time", request_id, kept.num_pages)
        elif reason in ("failed", "lost"):
            logger.warning("request %s: its pages are not to be had any more (%s)", request_id, reason)
        self._kept_pages.subtract(kept.ids)
        for page in kept.ids:
            if not self._kept_pages[page]:
                del self._kept_pages[page]
        if kept.is_pinned and kept.snapshot is not None:
            self._lending.unpin(kept.snapshot)
        self._lending.give_back(kept.pages, kept.sequence, 0)
        self._wake()

    async def _answer_peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: what is opened on it ends with it."""
        opened: dict[str, str] = {}
        try:
            if len(self._connections) >= MAX_CONNECTIONS:
                return
            self._connections.add(writer)
            # A reader is silent while it reads.
            silence = self.options.keep_timeout_s + _GRACE_S
            while True:
                async with asyncio.timeout(silence if opened else _GRACE_S):
                    message = await read_message(reader)
                if message is None:
                    return
                async with asyncio.timeout(silence):
                    try:
                        answer = await self._answer(message, opened)
                    except TransferError as error:
                        answer = {"error": str(error), "reason": error.reason}
                    writer.write(pack(answer))
                    await writer.drain()
        except (WireError, OSError, TimeoutError):
            pass  # the peer will see that nobody is here
        finally:
            self._connections.discard(writer)
            self._hang_up(opened)
            writer.close()

    def _hang_up(self, opened: dict[str, str]) -> None:
        for ticket, name in opened.items():
            if (kept := self._kept.get(name)) is not None and ticket in kept.reads:
                self._connector.release(kept.reads.pop(ticket))

    async def _answer(self, message: Json, opened: dict[str, str]) -> Json:
        """Raises TransferError for what the peer shall know."""
        if message.get("version") != VERSION:
            raise TransferError("mismatch", f"this side channel has version {VERSION}")
        if message.get("op") == "close":
            ticket = message.get("ticket")
            name = opened.pop(ticket, None) if isinstance(ticket, str) else None
            held = name is not None and name in self._kept and ticket in self._kept[name].reads
            if held:
                assert name is not None
                held = self._kept[name].is_there
                self._let_go(name, "read" if held else "lost")
            return {"held": held}
        if message.get("op") != "open":
            raise TransferError("mismatch", "open and close are what can be asked for")
        if message.get("engine_id") != self.engine_id:
            raise TransferError("unknown", "this is another engine")
        if message.get("layout") != self._layout:
            raise TransferError("mismatch", "its model, weights, dtype, page size or layout are others")
        asked = message.get("request_id")
        kept = self._kept.get(asked) if isinstance(asked, str) else None
        if kept is not None and isinstance(asked, str):
            await kept.settled.wait()
            if asked in self._kept and not kept.is_there:
                self._let_go(asked, "lost")
            kept = self._kept.get(asked)
        if kept is None or not isinstance(asked, str):
            raise TransferError("expired", "nothing is kept for this request (any more)")
        first, count = message.get("first"), message.get("count")
        if type(first) is not int or type(count) is not int or first < 0 or count < 1:
            raise TransferError("mismatch", "first and count say which pages are wanted")
        if first + count > kept.num_pages or (self._comes_whole and first + count < kept.num_pages):
            raise TransferError("mismatch", f"{kept.num_pages} pages are kept")
        if message.get("adapter") != _adapter_of(kept.sequence):
            raise TransferError("adapter", "they were computed with another adapter, or with one, or without")
        tokens = kept.sequence.request.prompt_token_ids
        if message.get("digest") != _digest(tokens, (first + count) * self._page_size):
            raise TransferError("mismatch", "it was another prompt")
        if len(kept.reads) >= MAX_READS_OF_ONE:
            raise TransferError("room", "too many read it")
        ticket = secrets.token_hex(16)
        snapshot = 0 if kept.snapshot is None else kept.snapshot.id
        description = self._connector.describe(self._places(kept.pages, first, first + count, snapshot))
        kept.reads[ticket] = description
        opened[ticket] = asked
        return {"ticket": ticket, "pages": description}

    @property
    def _comes_whole(self) -> bool:
        """What is kept serves at its end alone."""
        return self._lending.is_unordered

    def _places(self, pages: SequencePages, first: int, end: int, snapshot: int) -> list[Int32Array]:
        """What who has `first` pages lacks to go on behind `end` of them: pages group by group, and the snapshot."""
        limits, size = self._lending.limits, self._page_size
        begins = [max(first, group.behind(end * size, size)) for group in limits.groups]
        ids = [page for own, begin in zip(pages.lists, begins, strict=True) for page in own[begin:end]]
        assert all(ids), "a page is wanted that was given back"
        places: list[Int32Array] = [np.array(ids, np.int32)]
        if limits.num_snapshots is not None:
            places.append(np.array([snapshot], np.int32))
        return places

    # ---- pages of others

    def receive(self, sequence: Sequence, source: RemotePages) -> None:
        """Fetch what another server has of a prompt. Calls `received` in any case, never before it returns."""
        tokens = sequence.request.prompt_token_ids
        key = source, sequence.request.cache_root, hashlib.sha256(np.array(tokens, np.int32).tobytes()).digest()
        if key in self._waiting:
            # The choices of one request: what the first gets is for all.
            self._waiting[key].append(sequence)
            return
        self._waiting[key] = [sequence]
        task = asyncio.get_running_loop().create_task(self._receive_for(key, source))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive_for(self, key: tuple[RemotePages, str, bytes], source: RemotePages) -> None:
        sequence = self._waiting[key][0]
        try:
            await self._fetch(sequence, source)
        except TransferError as error:
            self._failed(sequence, source, error)
        except asyncio.CancelledError:
            self._failed(sequence, source, TransferError("resting", "this server comes to rest"))
            raise
        except Exception as error:
            logger.exception("request %s: a transfer failed in this server", sequence.request.request_id)
            self._failed(sequence, source, TransferError("internal", type(error).__name__))
        finally:
            for one in self._waiting.pop(key):
                self._received(one)

    def _failed(self, sequence: Sequence, source: RemotePages, error: TransferError) -> None:
        self.tally.failures[error.reason] += 1
        page_size, request = self._page_size, sequence.request
        known = self._lending.kv_cache.match_length(sequence.matchable_ids, request.cache_root)
        wanted = max(0, (sequence.num_prompt_tokens - 1) // page_size * page_size - known)
        self.tally.recomputed_tokens += wanted
        # All of where is a client's word: what is not printable is escaped.
        where = f"{str(source.engine_id)[:80]!a} at {str(source.host)[:80]!a}, port {source.port}"
        logger.warning(
            "request %s: pages of %s were not had (%s: %s); %d tokens are computed here",
            request.request_id,
            where,
            error.reason,
            error,
            wanted,
        )

    async def _fetch(self, sequence: Sequence, source: RemotePages) -> None:
        """Raises TransferError; what is in the cache then is as right as it was."""
        request, page_size = sequence.request, self._page_size
        end = (sequence.num_prompt_tokens - 1) // page_size
        if not end or request.sampling.prompt_logprobs is not None:
            return  # each of its tokens is computed here anyway
        if self.is_paused:
            raise TransferError("resting", "this server rests")
        if source.num_pages is not None and source.num_pages < end:
            end = source.num_pages
            if not end:
                self._comes_short(sequence, 0)
                return
        host, port, engine_id, name = source.host, source.port, source.engine_id, source.request_id
        if host is None or port is None or engine_id is None or name is None:
            raise TransferError("missing", "kv_transfer_params do not say where they are")
        self.tally.queried_tokens += sequence.num_prompt_tokens
        ends_at = self._clock.now() + self.options.receive_timeout_s
        if not self._lending.may_receive(sequence, end):
            raise TransferError("room", "it is more than may be received at once")
        try:
            async with asyncio.timeout(self.options.receive_timeout_s):
                async with self._room:
                    # Whatever ends may make room.
                    while (pages := self._lending.receive(sequence, end)) is None:  # noqa: ASYNC110
                        await asyncio.sleep(_ROOM_POLL_S)
        except TimeoutError:
            raise TransferError("room", "too few pages were free") from None
        first, num_right, lent_on = pages.num_shared, pages.num_shared, False
        future: asyncio.Future[int] | None = None
        channel = None
        try:
            if first >= end:
                return
            committed = self._committed()
            async with asyncio.timeout(ends_at - self._clock.now()):
                channel = await self._connect(host, port)
                opened = await channel.ask(
                    {
                        "op": "open",
                        "version": VERSION,
                        "engine_id": engine_id,
                        "layout": self._layout,
                        "request_id": name,
                        "first": first,
                        "count": end - first,
                        "digest": _digest(request.prompt_token_ids, end * page_size),
                        "adapter": _adapter_of(sequence),
                    }
                )
                await committed
            remote, ticket = opened.get("pages"), opened.get("ticket")
            if not isinstance(remote, dict) or not isinstance(ticket, str):
                raise TransferError("mismatch", "the peer does not describe its pages")
            started, left = self._clock.now(), ends_at - self._clock.now()
            own = self._places(pages, first, end, 0 if pages.kept is None else pages.kept[0])
            future = asyncio.wrap_future(self._connector.read(remote, own, max(left, 0.0)))
            await asyncio.wait({future}, timeout=left + _GRACE_S)
            if not future.done():
                raise TransferError("timeout", "its pages did not come in time")
            num_bytes = future.result()
            async with asyncio.timeout(_GRACE_S):
                closed = await channel.ask({"op": "close", "version": VERSION, "ticket": ticket})
            if closed.get("held") is not True:
                raise TransferError("expired", "it gave its pages away while they were read")
            num_right = end
            self._comes_short(sequence, end)
            self.tally.transferred(num_bytes, (end - first) * page_size, self._clock.now() - started)
        except TimeoutError:
            raise TransferError("timeout", "the peer did not answer in time") from None
        finally:
            if channel is not None:
                channel.close()
            if future is not None and not future.done():
                # Somebody may write to the pages yet, whatever becomes of the sequence.
                self._overdue.add(future)
                future.add_done_callback(lambda done: self._give_back_late(done, pages, sequence))
                lent_on = True
            if not lent_on:
                self._lending.give_back(pages, sequence, num_right * page_size)

    async def _connect(self, host: str, port: int) -> Channel:
        return await connect(host, port, self._networks)

    def _committed(self) -> asyncio.Future[None]:
        """When what is in flight now has ended, where that may yet touch what is lent."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def then() -> None:
            if not future.done():
                future.set_result(None)

        if self._lending.is_unordered:
            self._lending.once_committed(then)
        else:
            then()
        return future

    def _comes_short(self, sequence: Sequence, num_pages: int) -> None:
        """The other server says that it keeps less than all: the rest is computed here."""
        size, request = self._page_size, sequence.request
        known = self._lending.kv_cache.match_length(sequence.matchable_ids, request.cache_root)
        rest = (sequence.num_prompt_tokens - 1) // size * size - max(known, num_pages * size)
        if rest > 0:
            self.tally.recomputed_tokens += rest
            logger.warning(
                "request %s: %d tokens of its pages are kept nowhere: computed here", request.request_id, rest
            )

    def _give_back_late(self, future: asyncio.Future[int], pages: SequencePages, sequence: Sequence) -> None:
        self._overdue.discard(future)
        if not future.cancelled():
            future.exception()
        self._lending.give_back(pages, sequence, 0)
        self._wake()


def _adapter_of(sequence: Sequence) -> str | None:
    """By what is in its files: a version is a number of one process, and a name anybody's."""
    adapter = sequence.request.adapter
    return None if adapter is None else adapter.digest


def _digest(tokens: TokenIds, count: int) -> str:
    return hashlib.sha256(np.array(tokens[:count], np.int32).tobytes()).hexdigest()


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=family_of(host), backlog=MAX_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartupError(f"--kv-transfer-config: {host}:{port}: {reason}") from None
