"""What must hold of a simulation: of everything at once between two ticks, and of the step that has just ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List
from typing import TYPE_CHECKING

from engine.books import check
from engine.executor.fake_oracle import expected_logprob
from engine.forward import ForwardOutput
from engine.groups import Chunk
from engine.scheduling.batch import StepResult
from engine.scheduling.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from tests.sim.simulator import Launched, Simulator


def check_all(simulator: Simulator) -> None:
    """Of pages, slots, sequences and counts, as they are between two ticks."""
    scheduler = simulator.scheduler
    live = scheduler.live_sequences()
    held = [sequence.pages for sequence in live if sequence.pages is not None]
    check(scheduler.kv_cache, [*held, *simulator.lending.lent])
    table = scheduler._table
    assert len(live) + table.num_free == simulator.options.max_num_seqs, "a slot was lost"
    assert len(set(table._free)) == table.num_free and 0 not in table._free
    running = 0
    for sequence in live:
        slot = sequence.slot
        assert table.sequences[slot] is sequence and slot not in table._free
        status = sequence.status
        running += status is SequenceStatus.RUNNING
        assert status is not SequenceStatus.WAITING and status is not SequenceStatus.FINISHED
        pages = sequence.pages
        assert pages is not None
        known, computed = sequence.num_tokens, sequence.num_computed_tokens
        assert known <= sequence.max_length and computed < sequence.max_length
        assert computed <= pages.num_pages * simulator.options.page_size, f"{sequence} outgrew its pages"
        if status is SequenceStatus.RUNNING:
            most = len(simulator.in_flight) * (1 + int(table.max_drafts[slot]))
            assert computed <= known + most, f"{sequence} runs ahead of its tokens"
            if not simulator.in_flight:
                assert computed <= known, f"{sequence}: rejected drafts count as computed"
    assert running == scheduler.num_running
    if scheduler._trials.pending:
        assert all(one.suspect_until for one in scheduler._running), "somebody runs beside those who are tried"
    _check_adapters(simulator, live)
    waiting = tokens = receiving = 0
    for sequence, client in simulator.open.items():
        assert not sequence.is_finished, f"{client.name} ended without a terminal event"
        if sequence.status is SequenceStatus.RECEIVING:
            receiving += 1
            assert sequence.pages is None
        elif not sequence.holds_slot:
            waiting += 1
            tokens += sequence.num_tokens
            assert sequence.status is SequenceStatus.WAITING and sequence.pages is None
    assert receiving == scheduler.num_receiving, f"{receiving} receive, {scheduler.num_receiving} are counted"
    for carrier in simulator._carriers:
        carrier.check()
    assert tokens == scheduler.num_waiting_tokens, "waiting tokens were counted wrongly"
    assert waiting == scheduler.num_waiting, f"{waiting} wait, the scheduler counts {scheduler.num_waiting}"


def _check_adapters(simulator: Simulator, live: List[Sequence]) -> None:
    """Who holds a slot pins its adapter's index, and nobody else does. No index is lost."""
    places = simulator.scheduler.adapters
    pins = Counter(one.request.adapter.version for one in live if one.request.adapter is not None)
    assert places.pinned == pins, f"{places.pinned} are pinned, and {dict(pins)} are in use"
    indices = sorted([*places._index.values(), *places._free])
    assert indices == [*range(1, simulator.options.max_adapters + 1)], f"{indices} are all indices"
    assert pins.keys() <= places._index.keys() and not pins.keys() & places._unpinned.keys()


def check_namespaces(simulator: Simulator, launched: Launched, failed: bool = False) -> None:
    """No row reads a page that another namespace wrote. (Equal tokens: no oracle would see it.)"""
    if simulator.options.namespaces == 1 and not (simulator.options.max_adapters or simulator.options.has_transfer):
        return
    forward, page_size = launched.batch.forward_input, simulator.options.page_size
    staging = forward.staging
    starts, lengths = staging.row_start.tolist(), staging.row_len.tolist()
    for row, slot in enumerate(launched.batch.slots.tolist()):
        start, end = starts[row], starts[row] + lengths[row]
        request = launched.owners[slot].request
        name = request.namespace, None if request.adapter is None else request.adapter.version
        for group, window in enumerate(simulator.options.windows):
            pages = simulator.executor.pages_of(slot, end, group)
            for page in pages[start // page_size :]:
                simulator.page_namespace[page] = name
            first = 0 if window is None else max(0, start - window + 1)
            if isinstance(window, Chunk):
                first = start - start % window
            for page in [] if failed else pages[first // page_size :]:
                assert simulator.page_namespace[page] == name, f"page {page} crosses a namespace"


def check_logprobs(simulator: Simulator, result: StepResult, output: ForwardOutput) -> None:
    """Each token whose log-probability was asked for has one, and it is that token's."""
    new = Counter(one for one in simulator.delivered_now if one.request.sampling.logprobs is not None)
    place = {sequence: len(simulator.clients[sequence].delivered) - count for sequence, count in new.items()}
    for sequence, index, token in result.logprobs:
        assert output.logprobs is not None
        client = simulator.clients[sequence]
        at = place[sequence]
        place[sequence] += 1
        if at >= len(client.delivered):  # beyond the stop string
            assert client.arrival.stop_after == len(client.delivered)
            continue
        assert client.delivered[at] == token
        expected = expected_logprob(token, sequence.num_prompt_tokens + at)
        assert output.logprobs.token_logprobs[index] == expected, f"{client.name}: another one's log-probability"
        new[sequence] -= 1
    assert not any(new.values()), "a token without its log-probability"
