"""The simulator must catch planted bugs. Each mutant is one edit of the source of scheduler or cache.

A mutant names the text that it replaces, so it fails loudly when that text has changed: then write it anew for
the new code, because a bug that cannot be planted proves nothing.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.cache.eviction.fifo import FIFO
from engine.cache.kv_cache import KVCache
from engine.cache.page_pool import PagePool
from engine.cache.radix_tree import RadixTree
from engine.executor.fake_memory import States
from engine.forward import Staging
from engine.grammar_masks import GrammarMasks
from engine.groups import MemoryGroup
from engine.lending import Lending
from engine.lora.places import AdapterPlaces
from engine.request import Request
from engine.scheduling.batch import Batch
from engine.scheduling.policy.fair import Fair
from engine.scheduling.policy.fcfs import FCFS
from engine.scheduling.policy.lpm import LPM
from engine.scheduling.policy.priority import Priority
from engine.scheduling.residents import Residents
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.slots import SlotTable
from engine.scheduling.trials import Trials
from engine.speculation.rows import Speculation
from engine.tiers.names import Item, TierNames
from engine.tiers.tier import DiskTier
from engine.tiers.worker import Worker
from tests.sim.simulator import SimulationError, simulate

# Seeds that a mutant may live through; the unmutated code passes each that catches one.
MAX_SEEDS = 60
# Tried without any mutant; beyond them a seed is tried so where it has caught one. `make sim` has time for more.
UNMUTATED_SEEDS = 10


# What has caught those that many seeds do not: tried first, and where it does no longer, what follows it.
CATCHING = {
    "a debt is doubled by the lift": 14,
    "a failed step's drafts count as computed": 19,
    "a failed step's rows deliver once more": 3,
    "a forced run goes on from drafts' state": 3,
    "a forced run passes a stop string": 2,
    "a forced run's drafts are another's": 3,
    "a mean forgets its earlier chunks": 11,
    "a prompt without a match starves": 3,
    "a run passes its grammar's end": 6,
    "a run passes its stop id": 5,
    "a snapshot that went meanwhile is kept": 2,
    "a state is left behind of which nobody knows where it is": 5,
    "a vector is another's": 36,
    "an aborted one that received is still counted": 3,
    "an aborted sequence shares a failed step's page": 12,
    "an aborted slot is never given back": 5,
    "an overrun's state is left behind": 4,
    "decode rows never retract": 19,
    "drafts go beyond the budget": 7,
    "groups end where many fail": 21,
    "log-probabilities are of the last token": 15,
    "log-probabilities behind the end are delivered": 38,
    "masks do not go on behind a draft": 2,
    "nobody makes room for a forced run": 12,
    "overruns of drafts are accepted": 8,
    "pages are kept before they are computed": 6,
    "stale drafts stand before a grammar": 3,
    "the device counts no forced tokens": 3,
    "the drafts of a prompt's end are not told": 2,
    "the host loses sight of a grammar's drafts": 3,
    "the other staging set is written too early": 4,
    "unseen drafts are another's": 2,
    "what failed alone is held against who passed": 11,
    "what windows leave stays locked": 11,
    "who fails alone is tried for ever": 47,
    "who shares a failed step's page goes on": 3,
    "who was cleared runs on beside suspects": 11,
}

# Of one server: prompts of others are in test_transfers.py, with mutants of their own.
ALONE = {"transfer_rate": 0.0}
# Options under which rare things are frequent: steps that fail under shared prefixes, and remapped pages in a
# pool that is too small.
FAILURES = {
    "depth": 2,
    "fail_rate": 0.1,
    "abort_rate": 0.1,
    "prefix_caching": True,
    "alphabet": 1,
    "page_size": 2,
    "burst": 4,
    "arrival_rate": 0.5,
    "vocab_size": 40,
    "windows": (None,),
    "num_snapshots": None,
}
# Requests that make every step fail which they are part of, and nothing else that goes wrong.
CULPRITS = FAILURES | {"fail_rate": 0.0, "culprit_rate": 0.15, "max_num_seqs": 8, "max_num_batched_tokens": 40}
# Many of them beside each other, and innocents between them.
CROWDS = CULPRITS | {
    "culprit_rate": 0.6,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 400,
    "burst": 32,
    "num_pages": 400,
}
SPOILS = FAILURES | {"fail_rate": 0.0, "culprit_rate": 0.0, "spoil_rate": 0.1}
REMAPS = {
    "page_size": 1,
    "max_model_len": 16,
    "num_pages": 18,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 20,
    "prefix_caching": True,
    "alphabet": 1,
    "burst": 4,
    "arrival_rate": 0.5,
    "watermark": 0.0,
    "eos_rate": 0.0,
    "vocab_size": 40,
    "constrained_rate": 0.0,
    "windows": (None,),
    "num_snapshots": None,
}
# Windows that are left behind all the time, by prompts longer than the pool, too.
WINDOWS = {
    "page_size": 2,
    "windows": (8,),
    "num_snapshots": None,
    "max_model_len": 64,
    "num_pages": 14,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 12,
    "prefix_caching": True,
    "alphabet": 1,
    "burst": 4,
    "arrival_rate": 0.5,
    "eos_rate": 0.0,
    "vocab_size": 40,
}
# A group that sees all beside two with a window, whose pages go when memory is needed.
GROUPS = WINDOWS | {"windows": (None, 8, 8), "num_pages": 56}
# Recurrent states, with fewer snapshots than are wanted.
STATES = GROUPS | {"windows": (None,), "num_pages": 40, "num_snapshots": 3}
# Long forced runs in a pool and a budget that are too small for them.
RUNS = {
    "page_size": 2,
    "max_model_len": 40,
    "num_pages": 26,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "burst": 4,
    "arrival_rate": 0.5,
    "watermark": 0.0,
    "eos_rate": 0.0,
    "constrained_rate": 0.8,
    "jump_ahead": True,
}
# Most drafts are right; beside that, under what is rare else.
DRAFTS = {"depth": 2, "max_draft_tokens": 4, "draft_accuracy": 0.8, "budgets": "all", "num_snapshots": None}
DRAFTED_RUNS = RUNS | DRAFTS
DRAFTED_CROWD = DRAFTS | {"max_num_seqs": 4, "max_num_batched_tokens": 6, "burst": 4, "arrival_rate": 0.5}
DRAFTED_FAILURES = FAILURES | DRAFTS
# Rows with drafts beside snapshots that are wanted all the time.
DRAFTED_STATES = STATES | DRAFTS | {"num_snapshots": 6, "max_num_batched_tokens": 24, "eos_rate": 0.05}
DRAFTED_STATE_RUNS = RUNS | DRAFTS | {"num_snapshots": 6, "windows": (None,)}
DRAFTED_WINDOWS = WINDOWS | DRAFTS | {"draft_accuracy": 0.3, "max_draft_tokens": 6}
# More waits than can run, under each policy that makes a choice.
CROWD = {
    "burst": 12, "arrival_rate": 0.5, "max_num_seqs": 2, "max_num_batched_tokens": 10, "abort_burst_rate": 0.0,
    "max_adapters": 0,
}  # fmt: skip
# More adapters than places, loaded again all the time, amid retractions.
ADAPTERS = REMAPS | {
    "max_adapters": 2, "adapter_rate": 0.9, "reload_rate": 0.1, "num_pages": 24, "max_model_len": 12, "pool_rate": 0.0,
}  # fmt: skip
# Prompts whose pages come from a tier, most of them after the cache has lost them.
TIERED = REMAPS | {
    "page_size": 2, "max_model_len": 24, "num_pages": 40, "max_adapters": 0, "namespaces": 2, "tier_pages": 200,
    "tier_eagerness": 0.5, "tier_timeout_s": 1.0, "depth": 2, "eagerness": 0.0, "pool_rate": 0.0,
    "host_pages": 0, "has_disk": True,
}  # fmt: skip
TIERED_SLOW = {"tier_timeout_s": 0.02, "abort_rate": 0.1, "tier_eagerness": 0.3}
TIERED_LATE = TIERED | TIERED_SLOW
TIERED_RUNS = TIERED | {"constrained_rate": 0.8, "jump_ahead": True, "tier_eagerness": 0.9}
TIERED_RUNS |= {"max_num_batched_tokens": 12}
TIERED_STATES = TIERED | {"num_snapshots": 4, "ticks": 100}
TIERED_WINDOWS = TIERED | {"windows": (None, 4, 4), "num_pages": 120, "ticks": 60}
TIERED_ADAPTERS = TIERED | {"ticks": 150, "max_adapters": 2, "adapter_rate": 0.8, "reload_rate": 0.1}
TIERED_ORDER = TIERED | {"policy": "fcfs", "max_num_seqs": 2, "burst": 12}
LONGEST, IMPORTANT, SHARES = ({**CROWD, "policy": policy} for policy in ("lpm", "priority", "fair"))


@dataclass(frozen=True)
class Mutant:
    """In owner.method, `old`, which must stand there exactly once, becomes `new`. changes: to every seed's options."""

    name: str
    owner: type
    method: str
    old: str
    new: str
    changes: dict[str, Any] = field(default_factory=dict)


MUTANTS = [
    # What the device is told.
    Mutant("a page is not told", Batch, "write_page", "count + 1\n", "count + 1 - (page % 8 == 0)\n"),
    Mutant("one page of an admission is not told", Batch, "write_pages", "+ len(ids)\n", "+ max(0, len(ids) - 1)\n"),
    Mutant("a remap is lost", Scheduler, "_write_remaps", "batch.write_page(", "(lambda *_: 0)("),
    Mutant(
        "a remap outlives its sequence", Scheduler, "_write_remaps",
        "if sequence.pages is pages and", "if sequence.holds_slot and", REMAPS,
    ),
    Mutant("a sampling row is not told", Batch, "write_sampling", "count + 1\n", "count + (sequence.slot != 2)\n"),
    Mutant("the seed is lost", Scheduler, "_admit", "request.sampling.seed or 0", "0"),
    Mutant("min_tokens is lost", Batch, "write_sampling", "= sequence.min_length", "= 0"),
    Mutant(
        "positions are one too high", Batch, "write_decodes",
        "row_start[:count] = starts", "row_start[:count] = starts + 1",
    ),
    Mutant("a chunk starts one too early", Batch, "write_prefill", "= start\n", "= start - (start > 0)\n"),
    Mutant("a chunk has the wrong tokens", Scheduler, "_write_chunk", "tokens[start:end]", "tokens[: end - start]"),
    Mutant(
        "the other staging set is written too early", Scheduler, "schedule",
        "self._next_step += 1", "self._next_step += 1; self._batches[self._next_step & 1].staging.row_start[0] += 1",
    ),
    Mutant(
        "the staging sets do not alternate", Scheduler, "schedule",
        "self._batches[self._next_step & 1]", "self._batches[0]",
    ),
    Mutant(
        "no room for the table diff is made", Batch, "write_pages",
        "staging.reserve_table_diff", "(lambda n: None)",
    ),
    Mutant("extras are not told", Batch, "write_sampling", "if params.has_extras:", "if False:"),
    Mutant("extras stay with the batch", Batch, "begin", "forward.extras.clear()", "pass"),
    Mutant(
        "penalties count from the prompt alone after a retraction", Batch, "write_sampling",
        "sequence.token_ids.copy()", "sequence.token_ids[: sequence.num_prompt_tokens].copy()", REMAPS,
    ),
    Mutant(
        "log-probabilities of overruns are delivered", Scheduler, "_attribute_logprobs",
        "if live[slots[row]] and", "if",
    ),
    # Vectors.
    Mutant(
        "a mean takes its beginning from the cache", Sequence, "matchable_ids",
        "request.pooling.needs_all", "False",
    ),
    Mutant("a mean forgets its earlier chunks", Batch, "write_pooled", "ends or pooling.needs_all", "ends"),
    Mutant(
        "who shares a failed step's page gets a vector of it", Scheduler, "commit",
        "if table.live[sequence.slot]:", "if not sequence.is_finished:", {**FAILURES, "pool_rate": 0.6},
    ),
    Mutant("an aborted one gets its vector", Scheduler, "commit", "if table.live[sequence.slot]:", "if True:"),
    Mutant("a vector is another's", Scheduler, "commit", "append((sequence, place))", "append((sequence, 0))"),
    Mutant("a pooled row samples", Scheduler, "_write_chunk", "end == known and not pools", "end == known"),
    # Slots.
    Mutant(
        "slots and pages go back while in flight", Scheduler, "_release_if_idle",
        "if self._in_flight(sequence):", "if False:",
    ),
    Mutant(
        "a slot is in flight one step too short", Scheduler, "_in_flight",
        "> self._committed_step", "> self._committed_step + 1",
    ),
    Mutant("an aborted slot is never given back", Scheduler, "finish", "self._release_if_idle(sequence)", "pass"),
    Mutant("stop ids stay with the slot", SlotTable, "vacate", "self.stop_ids[:, slot] = -1", "pass"),
    # Tokens.
    Mutant("overruns are delivered", Scheduler, "finish", "self._table.live[sequence.slot] = False", "pass"),
    Mutant("rows that do not sample are delivered", Scheduler, "commit", "if not batch.all_sample:", "if False:"),
    Mutant("a length is one too long", Scheduler, "commit", "np.greater_equal(known, limit", "np.greater(known, limit"),
    Mutant("all but the first stop id is ignored", Scheduler, "commit", "[: table.max_stop_ids]", "[:1]"),
    Mutant(
        "retraction forgets the last token", Sequence, "leave_slot",
        "int(table.known[slot])]",
        "max(self.num_prompt_tokens, int(table.known[slot]) - (self.finish_reason is None))]",
    ),
    Mutant(
        "a retracted sequence samples anew", Scheduler, "_retract",
        "self._leave(sequence)",
        "self._leave(sequence); self._table.known[sequence.slot] = sequence.num_prompt_tokens",
    ),
    # Forced tokens.
    Mutant("a forced run's sample is delivered", Scheduler, "jump", "batch.drop_sample(row, known - 1)", "pass", RUNS),
    Mutant("a forced run loses its last token", Scheduler, "jump", "[slot] = end", "[slot] = end - 1", RUNS),
    Mutant("a forced run is too long", Scheduler, "jump", "[: limit - known]", "[: limit - known + 1]", RUNS),
    Mutant(
        "a forced run hides a stop id", Scheduler, "jump",
        "token not in sequence.stop_ids", "True", RUNS | {"vocab_size": 8},
    ),
    Mutant("the device counts no forced tokens", Scheduler, "jump", "params.has_extras or", "", RUNS),
    Mutant("a forced run passes a stop string", Scheduler, "jump", "or params.stop", "", RUNS),
    Mutant("a forced run is decoded as well", Scheduler, "jump", "self._decoding.remove(sequence)", "pass", RUNS),
    Mutant("a forced run is never computed", Scheduler, "jump", "self._jumping.append(sequence)", "pass", RUNS),
    Mutant("a forced run ends without an end", Scheduler, "jump", "if end == limit:", "if False:", RUNS),
    Mutant(
        "a page of a row that grows is not told", Scheduler, "_reserve_one",
        "batch.write_page(", "(lambda *_: 0)(", RUNS,
    ),
    Mutant(
        "a forced run outgrows its pages", Scheduler, "_schedule_jumps",
        "end = min(end, int", "end = max(end, int", RUNS,
    ),
    Mutant("a forced run breaks the budget", Scheduler, "_schedule_jumps", "- batch.num_tokens", "+ 1", RUNS),
    Mutant("a cut run samples", Scheduler, "_schedule_jumps", "start:end], end == known", "start:end], True", RUNS),
    Mutant("a cut run decodes on", Scheduler, "_schedule_jumps", "if end == known:", "if True:", RUNS),
    Mutant(
        "nobody makes room for a forced run", Scheduler, "_pages_of_jumps",
        "return sum(", "return 0 * sum(",
        RUNS | {"page_size": 1, "num_pages": 40, "max_num_batched_tokens": 40, "max_draft_tokens": 0},
    ),
    Mutant("a forced run outlives its sequence", Scheduler, "_leave", "self._jumping.remove(sequence)", "pass", RUNS),
    # Order.
    Mutant("a retracted sequence is lost", Scheduler, "_release_if_idle", "self._policy.push_front(sequence)", "pass"),
    Mutant("an aborted sequence is admitted", FCFS, "peek", "queue[0].is_finished", "False"),
    Mutant("the newest goes first", FCFS, "push", "self._queue.append", "self._queue.appendleft"),
    Mutant(
        "the longest match goes last", LPM, "peek",
        "self._choice = self._ranked[-1]", "self._choice = self._ranked[0]", LONGEST,
    ),
    Mutant(
        "matches are of an earlier turn", LPM, "peek",
        "if turn != self._ranked_in:", "if not self._ranked:", LONGEST,
    ),
    Mutant("matches are of another namespace", LPM, "_match_length", "sequence.request.cache_root", "'b'", LONGEST),
    Mutant(
        "ties go to the newest", LPM, "peek",
        "in reversed(self._queue)", "in self._queue", LONGEST,
    ),
    Mutant(
        "a prompt without a match starves", LPM, "pop",
        "self._num_passed +=", "_ =",
        LONGEST | {"burst": 110, "max_model_len": 8, "prefix_caching": True, "alphabet": 1, "arrival_rate": 1.0},
    ),
    Mutant(
        "retracted sequences queue by match", LPM, "peek",
        "or oldest.is_retracted", "or False", {**REMAPS, "policy": "lpm"},
    ),
    Mutant(
        "the most important goes last", Priority, "push",
        "(sequence.request.priority,", "(-sequence.request.priority,", IMPORTANT,
    ),
    Mutant("equals go newest first", Priority, "push", "sequence.order,", "-sequence.order,", IMPORTANT),
    Mutant("an aborted important one is admitted", Priority, "peek", "heap[0][2].is_finished", "False", IMPORTANT),
    Mutant("the most important is retracted", Priority, "victim", "max(", "min(", {**REMAPS, "policy": "priority"}),
    Mutant(
        "idling earns credit", Fair, "push",
        "max(self._served.get(key, 0), self._floor)", "self._served.get(key, 0)", SHARES,
    ),
    Mutant("a debt is doubled by the lift", Fair, "push", "self._charge_outputs()", "pass", SHARES),
    Mutant("prompts are free", Fair, "pop", "PROMPT_WEIGHT *", "0 *", SHARES),
    Mutant("cached prompts are charged", Fair, "pop", "- sequence.num_cached_tokens", "", SHARES),
    Mutant("output is free", Fair, "_charge_output", "OUTPUT_WEIGHT *", "0 *", SHARES),
    Mutant("output is charged twice", Fair, "_charge_output", "self._charged[sequence] = count", "pass", SHARES),
    Mutant(
        "what an ended sequence owes is forgiven", Fair, "finished",
        "self._charge_output(sequence)", "pass", SHARES,
    ),
    Mutant(
        "output is charged in the first turn alone", Fair, "peek",
        "self._turn, self._is_charged = turn, False", "pass", SHARES,
    ),
    Mutant("the key that was served most is next", Fair, "_next_key", "min(", "max(", SHARES),
    Mutant("an aborted sequence is counted as waiting", Scheduler, "finish", "self.num_waiting -= 1", "pass"),
    Mutant(
        "the budget is exceeded by one", Scheduler, "_write_chunk",
        "self.limits.max_num_batched_tokens - batch", "1 + self.limits.max_num_batched_tokens - batch",
    ),
    Mutant(
        "capacity is one token too big", SlotTable, "set_capacity",
        "num_pages * self.page_size", "num_pages * self.page_size + 1",
    ),
    Mutant("decode rows never retract", Scheduler, "_make_room", "while len(self._running) > 1:", "while False:"),
    # Adapters.
    Mutant("an adapter is not sent", AdapterPlaces, "pin", "self._loads[index] = adapter", "pass", ADAPTERS),
    Mutant(
        "a slot has the wrong index", Scheduler, "_admit",
        "self.adapters.pin(sequence)", "min(1, self.adapters.pin(sequence))", ADAPTERS,
    ),
    Mutant("a slot keeps its old index", Batch, "write_sampling", "staging.adapter[count] = adapter", "pass", ADAPTERS),
    Mutant(
        "an adapter is sent to another index", AdapterPlaces, "take_loads",
        "[(index, adapter.weights)", "[(3 - index, adapter.weights)", ADAPTERS,
    ),
    Mutant(
        "what is sent is sent no more", AdapterPlaces, "_evict",
        "return self._index.pop(oldest)", "return self._index[oldest]", ADAPTERS,
    ),
    Mutant(
        "a retracted sequence's adapter is never unpinned", Residents, "_release_if_idle",
        "self.adapters.unpin(sequence.request.adapter)",
        "self.adapters.unpin(sequence.request.adapter if sequence.finish_reason else None)", ADAPTERS,
    ),
    Mutant(
        "an adapter is unpinned while in flight", Residents, "_leave",
        "self._leaving.append(sequence)",
        "self._leaving.append(sequence); self.adapters.unpin(sequence.request.adapter)", ADAPTERS,
    ),
    Mutant("a pinned adapter is evicted", AdapterPlaces, "pin", "self._unpinned.pop(version, None)", "pass", ADAPTERS),
    Mutant("one sequence unpins for all", AdapterPlaces, "unpin", "if self._pins[version]:", "if False:", ADAPTERS),
    Mutant(
        "versions of a name are one", AdapterPlaces, "pin",
        "version = adapter.version", "version = hash(adapter.name)", ADAPTERS,
    ),
    Mutant(
        "a cache root without the version", Request, "cache_root",
        "{self.adapter.version}:", "{self.adapter.name}:", ADAPTERS,
    ),
    Mutant("adapters share the cache", Request, "cache_root", "if self.adapter is not None:", "if False:", ADAPTERS),
    Mutant(
        "an unloaded adapter goes while it is in use", AdapterPlaces, "unload",
        "if version in self._pins:", "if False:", ADAPTERS,
    ),
    Mutant(
        "an unloaded index is lost", AdapterPlaces, "unload",
        "self._free.append(self._index.pop(version))", "self._index.pop(version)", ADAPTERS,
    ),
    Mutant(
        "another index counts as nobody's", AdapterPlaces, "unload",
        "self._loads[self._index[version]] = None", "self._loads[3 - self._index[version]] = None", ADAPTERS,
    ),
    Mutant(
        "who waits for an adapter is passed for ever", AdapterPlaces, "_is_starving",
        ">= self.max_passed", "> 10**9", ADAPTERS,
    ),
    Mutant(
        "who waits for an adapter is forgotten", AdapterPlaces, "_review",
        "policy.put_back(sequence)", "pass", ADAPTERS,
    ),
    Mutant("nobody is looked at again", AdapterPlaces, "unpin", "self._changed = True", "pass", ADAPTERS),
    Mutant(
        "who waits comes back as the newest", FCFS, "put_back",
        "queue.insert(index, sequence)", "queue.append(sequence)", ADAPTERS | {"policy": "fcfs"},
    ),
    Mutant(
        "a share is charged for waiting", Fair, "set_aside",
        "self._queues[key].popleft()",
        "self._queues[key].popleft(); self._served[key] += 1", ADAPTERS | {"policy": "fair"},
    ),
    # Pages from a tier.
    Mutant(
        "a page is filled that a step in flight writes", Residents, "may_write",
        "self._named_until.get(page, committed) > committed", "False", TIERED,
    ),
    Mutant(
        "pages are kept before they are computed", Lending, "keep",
        "if page in cache.unconfirmed", "if False", TIERED_RUNS,
    ),
    Mutant(
        "a kept page is not held", Lending, "keep",
        "self.lent[pages] = 0", "cache.release(pages, (), 0)", TIERED,
    ),
    Mutant("lent pages are forgotten", Lending, "give_back", "self.kv_cache.release(", "(lambda *_: 0)(", TIERED),
    Mutant("who is told stays where it was", Residents, "received", "self.num_receiving -= 1", "pass", TIERED),
    Mutant(
        "what was received goes before what is older", Residents, "received",
        "sequence.order = self._next_order", "pass", TIERED_ORDER,
    ),
    Mutant(
        "an aborted one that received is still counted", Residents, "finish",
        "self.num_receiving -= 1", "pass", TIERED_LATE,
    ),
    Mutant(
        "half of what came enters the tree as all", DiskTier, "_read",
        "else first + job.count", "else depth", TIERED_LATE,
    ),
    Mutant(
        "tenants share a tier", TierNames, "_root_of", "root_name(self._layout, request.cache_root)",
        "root_name(self._layout)", TIERED,
    ),
    Mutant(
        "adapters share a tier", TierNames, "_root_of", "f\"adapter {request.adapter.digest}\"", "\"adapter\"",
        TIERED_ADAPTERS,
    ),
    Mutant("a name is of its own page alone", TierNames, "chain", "0, count)", "0, count)[::-1]", TIERED),
    Mutant(
        "pages come one place too far", TierNames, "to_read", "own[index]", "own[min(index + 1, depth - 1)]", TIERED
    ),
    Mutant("a page counts before it has come", Worker, "turn", "count = self._read(job)", "count = 1", TIERED),
    Mutant("the wrong page is kept", TierNames, "to_write", "own[index]", "own[::-1][index]", TIERED),
    # States and windows from a tier.
    Mutant(
        "a snapshot is filled that a step in flight names", Residents, "once_committed",
        "self._committed_step == self._next_step - 1", "True", TIERED_STATES,
    ),
    Mutant(
        "a snapshot that went meanwhile is kept", Item, "is_there", "self.snapshot.is_there", "True", TIERED_STATES,
    ),
    Mutant(
        "a state is kept as that of another place", TierNames, "to_write",
        "chain[depth - 1]), one.id", "chain[0]), one.id", TIERED_STATES,
    ),
    Mutant("groups share a name", TierNames, "_page", "if group else name", "if False else name", TIERED_WINDOWS),
    Mutant(
        "a window comes short of a page", TierNames, "_begin",
        "self._groups[group].behind(", "1 + self._groups[group].behind(", TIERED_WINDOWS,
    ),
    Mutant(
        "what windows leave stays locked", KVCache, "skip",
        "self._leave_behind(", "(lambda *_: 0)(", TIERED_WINDOWS,
    ),
    Mutant(
        "a part of what came enters a tree with windows", DiskTier, "_read",
        "first if self._names.comes_whole", "first if False", TIERED_WINDOWS | TIERED_SLOW,
    ),
    # Failures.
    Mutant(
        "who was cleared runs on beside suspects", Scheduler, "_make_cleared_wait",
        "self._retract(sequence)", "pass", CULPRITS | DRAFTS,
    ),
    Mutant(
        "a failed step's pages stay", Scheduler, "fail",
        "cache.take_back(sequence.pages, first_page)", "pass", FAILURES,
    ),
    Mutant(
        "who shares a failed step's page goes on", Scheduler, "_distrust_heirs",
        "not self.kv_cache.is_intact(sequence.pages)", "False", FAILURES,
    ),
    Mutant(
        "an aborted sequence shares a failed step's page", Scheduler, "fail",
        "else starts)", "else table.computed[slots])", FAILURES,
    ),
    Mutant("a failed step's rows deliver once more", Scheduler, "fail", "table.live[slots] = False", "pass", FAILURES),
    Mutant("all of a failed step are guilty", Trials, "judge", "if is_alone and ", "if True or ", CULPRITS),
    Mutant("groups end where many fail", Trials, "judge", "if is_alone and ", "if are_many or is_alone and ", CROWDS),
    Mutant("who fails alone once is guilty", Trials, "judge", "else TRIES_ALONE)", "else 1)", FAILURES),
    Mutant("who fails alone is tried for ever", Trials, "judge", "else TRIES_ALONE)", "else 10**9)", CULPRITS),
    Mutant(
        "what failed alone is held against who passed", Trials, "succeeded",
        "sequence.suspect_until = sequence.failed_alone = 0", "sequence.suspect_until = 0", FAILURES,
    ),
    Mutant("suspects are never tried", Trials, "next", "return next(waiting, None)", "return None", CULPRITS),
    Mutant("half of the suspects are forgotten", Trials, "judge", "range(0, len(suspects),", "range(0, 1,", CULPRITS),
    Mutant(
        "a suspect waits in two places", Residents, "_release_if_idle",
        "if not sequence.suspect_until:", "if True:", CULPRITS,
    ),
    Mutant(
        "a row without numbers delivers", Scheduler, "_end_broken", "if self._table.live[slot]:", "if False:", SPOILS
    ),
    Mutant(
        "a row without numbers is another's", Scheduler, "_end_broken",
        "batch.slots[rows]", "batch.slots[::-1][rows]", SPOILS,
    ),
    # Pages.
    Mutant(
        "overruns enter the tree", Scheduler, "_release_if_idle",
        "min(sequence.num_computed_tokens, len(tokens))",
        "len(tokens) // self.limits.page_size * self.limits.page_size",
    ),
    Mutant("a match may be the whole prompt", KVCache, "begin", "(len(token_ids) - 1)", "len(token_ids)"),
    Mutant("namespaces share", RadixTree, "open", "namespace.encode(errors=\"surrogatepass\")", "b\"\""),
    Mutant("a match locks nothing", RadixTree, "_lock", "node.lock_count += 1", "pass"),
    Mutant("a matched page is still evictable", RadixTree, "_lock", "self.policy.remove(node)", "pass"),
    Mutant("a split loses the locks", RadixTree, "_split", "node.lock_count, node.hits", "0, node.hits"),
    Mutant("an evicted page stays in the tree", RadixTree, "_remove", "del parent.children[node.key]", "pass"),
    Mutant(
        "a locked leaf is evicted", FIFO, "victim",
        "if _may_go(node):", "if not node.children and not node.detached:",
    ),
    Mutant("a leaf gives up its front", RadixTree, "_evict_leaf", "in run[left:] if page", "in run[:taken] if page"),
    Mutant("duplicates are freed twice", KVCache, "end_step", "self._deferred, []", "self._deferred, self._deferred"),
    Mutant("duplicates are never freed", KVCache, "end_step", "self._pool.free(duplicates)", "pass"),
    Mutant(
        "duplicates are freed too early", KVCache, "enter",
        "self._deferred += duplicates", "self._pool.free(duplicates)",
    ),
    Mutant("a sequence keeps its duplicate", KVCache, "_insert", "= theirs\n", "= mine[: len(theirs)]\n"),
    Mutant(
        "a failed page is freed under its reader", RadixTree, "detach",
        "if not node.lock_count:", "if True:", FAILURES,
    ),
    # Windows and groups.
    Mutant(
        "a match forgets the first token of its window", MemoryGroup, "behind",
        "- self.window + 1", "- self.window + 2", GROUPS,
    ),
    Mutant(
        "a page is given back too early", KVCache, "_leave_behind",
        ".behind(num_tokens,", ".behind(num_tokens + 2 * self.page_size,", WINDOWS,
    ),
    Mutant(
        "no page that left the window is given back", Scheduler, "_give_back",
        "if self.kv_cache.has_windows:", "if False:", WINDOWS,
    ),
    Mutant(
        "the device still names what was given back", KVCache, "_leave_behind",
        "range(old, new)", "range(0)", WINDOWS,
    ),
    Mutant(
        "a shared page that left the window is freed", KVCache, "_leave_behind",
        "pages[max(old, seq.num_shared) : new]", "pages[old:new]", WINDOWS,
    ),
    Mutant(
        "shared pages that left the window stay locked", KVCache, "_leave_behind",
        "if old < seq.num_shared:", "if False:", WINDOWS,
    ),
    Mutant("a match ignores a hole", RadixTree, "_usable", "if part.hole:", "if False:", GROUPS),
    Mutant(
        "a hole reaches into a window that is needed", RadixTree, "_evict_part",
        "min(part.free_to - part.hole,", "min(part.node.length - part.hole,", GROUPS,
    ),
    Mutant("a split doubles no lock", RadixTree, "_split_part", "above.locks[first] = count", "pass", GROUPS),
    Mutant("a hole is filled with another group's pages", RadixTree, "_fill", "own[group]", "own[0]", GROUPS),
    Mutant("a hole is filled and still a hole", RadixTree, "_fill", "min(part.hole, first)", "part.hole", GROUPS),
    Mutant(
        "windows of a failed step's readers are lost", RadixTree, "detach",
        "freed += self._punch(part, part.free_to - part.hole)", "pass", FAILURES | {"windows": (None, 4)},
    ),
    Mutant(
        "pages go to the first group's table", Batch, "write_page",
        "(group * self._num_slots + slot)", "slot", GROUPS,
    ),
    Mutant(
        "all groups are told the first one's pages", Scheduler, "_admit",
        "write_pages(group, slot, 0, ids)", "write_pages(group, slot, 0, pages.pages)", GROUPS,
    ),
    Mutant("remaps are the first group's", KVCache, "_insert", "((group, index,", "((0, index,", GROUPS),
    Mutant(
        "a release forgets all groups but the first", KVCache, "release",
        "in self._own(seq):", "in self._own(seq)[:1]:", GROUPS,
    ),
    Mutant(
        "a prompt is not told the pages of its next chunk", Scheduler, "_grow",
        "batch.write_pages(group, slot, first, ids[first:])", "pass", WINDOWS,
    ),
    Mutant(
        "one that is alone waits for a good chunk", Scheduler, "_admit",
        "self._good_chunk if others else 0", "self._good_chunk", GROUPS | {"num_pages": 44},
    ),
    Mutant("a window is promised a page less", MemoryGroup, "most_pages", "+ 2", "+ 1", WINDOWS | {"num_pages": 5}),
    # Recurrent states.
    Mutant("a load is not told", Scheduler, "_admit", "batch.write_load(slot, pages.snapshot)", "pass", STATES),
    Mutant(
        "a save is not told", Scheduler, "_write_saves", "batch.write_save(sequence.slot, snapshot)", "pass", STATES
    ),
    Mutant("a save that no step carried is lost", Scheduler, "schedule", "= batch.saves()", "= {}", STATES),
    Mutant("a match ends amid a node", RadixTree, "_usable", "or size < node.length", "", STATES),
    Mutant("a match needs no snapshot", RadixTree, "_usable", "node.snapshot is None or", "", STATES),
    Mutant("a leaf keeps its end's snapshot", RadixTree, "_evict_leaf", "self._lose_snapshot(node)", "pass", STATES),
    Mutant(
        "a failed step's snapshot stays", RadixTree, "detach", "self._lose_snapshot(node)", "pass", FAILURES | STATES
    ),
    Mutant("what is left behind hangs too deep", RadixTree, "attach", "if at < depth:", "if False:", STATES),
    Mutant(
        "an overrun's state is left behind", KVCache, "release",
        "known = at <= min(num_tokens, seq.num_shared * self.page_size)", "known = True", STATES,
    ),
    Mutant(
        "two states go to one snapshot", Batch, "write_save",
        "if not count or", "if True or", STATES | {"num_snapshots": 1},
    ),
    Mutant("a snapshot not wanted is lost", KVCache, "release", "self._free_snapshots([snapshot])", "pass", STATES),
    # Recurrent states of rows with drafts; the first two are of the device.
    Mutant("a rejected draft's state is kept", States, "settle", "after[count - 1]", "after[-1]", DRAFTED_STATES),
    Mutant("the state before the drafts is kept", States, "settle", "after[count - 1]", "after[0]", DRAFTED_STATES),
    Mutant(
        "a state is left behind of which nobody knows where it is", Scheduler, "_serve_drafts",
        "if table.drafted_in[slot] > self._committed_step:", "if False:", DRAFTED_STATES,
    ),
    Mutant(
        "drafts go beyond a state that is to be left behind", Scheduler, "_serve_drafts",
        "return min(budget, end - computed - 1)", "self._save_decoded(batch, slot, pages, end)", DRAFTED_STATES,
    ),
    Mutant(
        "a forced run goes on from drafts' state", GrammarMasks, "_constrain",
        "for draft in drafts:", "for draft in []:", DRAFTED_STATE_RUNS,
    ),
    Mutant(
        "a forced run's drafts are another's", GrammarMasks, "_constrain",
        "speculation.drafts_of(sequence.slot, 1)", "[]", DRAFTED_STATE_RUNS,
    ),
    Mutant(
        "a state that drafts have passed is left behind", KVCache, "release",
        "known = at <= min(num_tokens, seq.num_shared * self.page_size)", "known = True",
        DRAFTED_STATES | {"fail_rate": 0.1},
    ),
    # Drafts. The grammar's own are seen where its tokens are rarely what the model would draw.
    Mutant("rejected drafts count as computed", Speculation, "accept", "-= lengths - counts", "-= 0", DRAFTS),
    Mutant(
        "one right draft too few counts as computed", Speculation, "accept",
        "-= lengths - counts", "-= lengths - counts + (counts > 1)", DRAFTS,
    ),
    Mutant("a run passes its stop id", Speculation, "accept", "ends |= new", "ends &= new", DRAFTS),
    Mutant("a run loses a token", Speculation, "accept", "known + kept - 1", "known + (kept - 1) // 2", DRAFTS),
    Mutant(
        "a run's tokens stand one place too far", Speculation, "accept",
        "known[where] + column", "known[where] + column + 1", DRAFTS,
    ),
    Mutant("overruns of drafts are accepted", Speculation, "accept", "table.live[batch.slots[rows]]", "True", DRAFTS),
    Mutant("a forced run's drafts are accepted", Speculation, "accept", " & batch.samples[rows]", "", DRAFTED_RUNS),
    Mutant("a run passes its grammar's end", Speculation, "accept", "counts[place] > end", "False", DRAFTED_RUNS),
    Mutant("drafts go beyond the length", Speculation, "split", "- 2, out", "+ 2, out", DRAFTS),
    Mutant("drafts go beyond the budget", Speculation, "split", "room - ahead", "room", DRAFTED_CROWD),
    Mutant(
        "a length that nobody knows is believed", Speculation, "split",
        "(table.drafted_in[slots] > committed)", "False", DRAFTS | {"budgets": "random"},
    ),
    Mutant(
        "the host loses sight of a grammar's drafts", Speculation, "split",
        "table.constrained[slots] & (most > 0)", "False", DRAFTED_RUNS | {"budgets": "random", "jump_ahead": False},
    ),
    Mutant(
        "the drafts of a prompt's end are not told", Speculation, "told",
        ": len(drafts)] = drafts", ": len(drafts)] = -1", DRAFTED_RUNS,
    ),
    Mutant(
        "unseen drafts are not told", GrammarMasks, "provided", "speculation.told(int(batch.slots[row]), drafts)",
        "pass", DRAFTED_RUNS | {"unseen_drafts": True},
    ),
    Mutant(
        "unseen drafts are another's", GrammarMasks, "provided", "int(batch.slots[row])", "int(batch.slots[0])",
        DRAFTED_RUNS | {"unseen_drafts": True},
    ),
    Mutant(
        "stale drafts stand before a grammar", Speculation, "accept", "= accepted.drafts[wanted]",
        "= np.roll(accepted.drafts[wanted], 1, axis=1)", DRAFTED_RUNS,
    ),
    Mutant(
        "a grammar is not rolled back", GrammarMasks, "_look_ahead", "constraint.copy()", "constraint", DRAFTED_RUNS
    ),
    Mutant(
        "masks do not go on behind a draft", GrammarMasks, "_look_ahead", "ahead.accept(token)", "pass", DRAFTED_RUNS
    ),
    Mutant(
        "nobody looks ahead", GrammarMasks, "_constrain", "if len(bits) > 1:", "if False:", DRAFTED_RUNS
    ),
    Mutant(
        "a forced run starts behind drafts", Scheduler, "jump",
        "table.computed[slot], table.drafted_in[slot] = known, table.NO_STEP", "pass", DRAFTED_RUNS,
    ),
    Mutant(
        "a window is given back by what may be computed", Scheduler, "_give_back",
        "min(computed, int(table.known[slot]) - 1)", "computed", DRAFTED_WINDOWS,
    ),
    Mutant(
        "drafts outgrow their pages", Scheduler, "_serve_drafts", "return min(budget, capacity - computed - 1)",
        "return budget", DRAFTS | REMAPS,
    ),
    Mutant(
        "a row leaves before its drafts are judged", Scheduler, "_serve_drafts",
        "if table.drafted_in[slot] <= self._committed_step:", "if True:", DRAFTS,
    ),
    Mutant(
        "a failed step's drafts count as computed", Scheduler, "_starts", "self._table.known[batch.slots] - 1", "2**30",
        DRAFTED_FAILURES,
    ),
    Mutant(
        "log-probabilities behind the end are delivered", Scheduler, "_attribute_logprobs",
        "place < counts[row]", "True", DRAFTS,
    ),
    Mutant(
        "log-probabilities are of the last token", Scheduler, "_attribute_logprobs",
        "[row - first, place]", "[row - first, counts[row] - 1]", DRAFTS,
    ),
    Mutant("a slot's speculation is not told", Batch, "write_sampling", "if drafts:", "if False:", DRAFTS),
    Mutant(
        "a retracted sequence drafts from its prompt", Batch, "write_sampling",
        "np.array(sequence.token_ids, np.int32)",
        "np.array(sequence.token_ids[: sequence.num_prompt_tokens], np.int32)", DRAFTS | REMAPS,
    ),
    Mutant("speculations stay with the batch", Batch, "begin", "forward.speculations.clear()", "pass", DRAFTS),
    Mutant(
        "draft rows begin at the batch's front", Batch, "write_speculating",
        "+= token", "+= 0", DRAFTS | {"budgets": "random"},
    ),
    Mutant("a page is handed out twice", PagePool, "allocate_one", "self._free.pop()", "self._free[-1]"),
    Mutant("growing the staging loses what is there", Staging, "reserve_table_diff", "new[: len(old)] = old", "pass"),
]  # fmt: skip


def test_mutants_of_whose_seeds_something_is_known_are_there() -> None:
    assert CATCHING.keys() <= {mutant.name for mutant in MUTANTS}
    assert max(CATCHING.values()) < MAX_SEEDS


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = inspect.getattr_static(mutant.owner, mutant.method)
    if isinstance(found, property):
        found = found.fget
    function: Callable[..., Any] = found.__func__ if isinstance(found, staticmethod) else found
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) == 1, f"write this mutant anew: {mutant.old!r} is not in\n{source}"
    edited = "from __future__ import annotations\n" + source.replace(mutant.old, mutant.new)
    defined: dict[str, Any] = {}
    exec(compile(edited, f"<mutant: {mutant.name}>", "exec"), function.__globals__, defined)
    monkeypatch.setattr(mutant.owner, mutant.method, defined[mutant.method])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    first = CATCHING.get(mutant.name, 0)
    for seed in (*range(first, MAX_SEEDS), *range(first)):
        try:
            simulate(seed, **ALONE, **mutant.changes)
        except SimulationError:
            if seed >= UNMUTATED_SEEDS:
                monkeypatch.undo()
                simulate(seed, **ALONE, **mutant.changes)
            return
    pytest.fail(f"no simulation out of {MAX_SEEDS} saw that {mutant.name}")


@pytest.mark.parametrize(
    "changes",
    [
        *(FAILURES, CULPRITS, CROWDS, REMAPS, WINDOWS, GROUPS, STATES, RUNS, LONGEST, IMPORTANT, SHARES, ADAPTERS),
        *(TIERED, TIERED_LATE, TIERED_RUNS, TIERED_STATES, TIERED_WINDOWS, TIERED_ADAPTERS, TIERED_ORDER),
        *(DRAFTS, DRAFTED_RUNS, DRAFTED_FAILURES, DRAFTED_WINDOWS, DRAFTED_STATES, DRAFTED_STATE_RUNS),
    ],
    ids=[
        *("failures", "culprits", "crowds", "remaps", "windows", "groups", "states", "runs", "longest", "important"),
        "shares",
        *("adapters", "tiered", "tiered-late", "tiered-runs", "tiered-states", "tiered-windows"),
        *("tiered-adapters", "tiered-order"),
        *("drafts", "drafted-runs", "drafted-failures", "drafted-windows", "drafted-states", "drafted-state-runs"),
    ],
)
def test_unmutated_code_passes(changes: dict[str, Any], record_property: Callable[[str, object], None]) -> None:
    """Under the changed options, too; the plain ones are in test_runs.py."""
    record_property(
        "simulated_ticks", sum([simulate(seed, **ALONE, **changes).ticks for seed in range(UNMUTATED_SEEDS)])
    )
