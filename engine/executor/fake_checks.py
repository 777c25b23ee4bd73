"""What a fake device looks at before it computes: a step is in order by itself, and nobody touches it meanwhile."""

from __future__ import annotations

import operator
from itertools import accumulate

from engine.executor.tables import SlotTables
from engine.forward import FUTURE_TOKEN, NULL_SLOT, ForwardInput, Staging

# What `poison_staging` leaves behind; as a slot, a page or a token it is out of range everywhere.
POISON = -(2**30)


def poison_staging(staging: Staging) -> None:
    """Overwrite a set that nobody owns (after commit, before the next schedule), so that leftovers show."""
    for name in ("row_slot", "row_start", "row_len", "token_ids", "qo_indptr"):
        getattr(staging, name).fill(POISON)
    for name in (
        *("table_index", "table_page", "sampling_slot", "adapter"),
        *("save_slot", "save_snapshot", "load_slot", "load_snapshot"),
    ):
        getattr(staging, name).fill(POISON)
    staging.row_samples.fill(True)
    staging.sampling["temperature"] = 1.0
    staging.sampling["seed"] = 0xDEAD
    staging.sampling["min_length"] = 2**30


def check_step(forward_input: ForwardInput, tables: SlotTables) -> None:
    """What can be said of a step from itself."""
    staging, rows = forward_input.staging, forward_input.num_rows
    limits = staging.limits
    decode_rows, tokens = forward_input.num_decode_rows, forward_input.num_tokens
    assert 0 < rows <= limits.max_num_seqs and 0 <= decode_rows <= rows
    assert 0 < tokens <= limits.max_num_batched_tokens, f"{tokens} tokens are over the budget"
    slots: list[int] = staging.row_slot[:rows].tolist()
    assert len(set(slots)) == rows, f"a slot stands twice in {slots}"
    assert min(slots) >= 1 and max(slots) <= limits.max_num_seqs, f"slots out of range: {slots}"
    lengths: list[int] = staging.row_len[:rows].tolist()
    starts: list[int] = staging.row_start[:rows].tolist()
    assert min(lengths) >= 1 and sum(lengths) == tokens, f"{lengths} for {tokens} tokens"
    assert lengths[:decode_rows].count(1) == decode_rows, "a decode row is one token"
    speculating = lengths[decode_rows : decode_rows + forward_input.num_speculating_rows]
    assert len(speculating) == forward_input.num_speculating_rows, "rows speculate that are not there"
    assert max(speculating, default=0) <= 1 + limits.max_draft_tokens, "a row has too many drafts"
    assert min(starts) >= 0
    kv_lengths = list(map(operator.add, starts, lengths))
    assert max(kv_lengths) <= limits.max_model_len, f"contexts {kv_lengths} are too long"
    offsets: list[int] = staging.qo_indptr[: rows + 1].tolist()
    assert offsets == [0, *accumulate(lengths)], f"qo_indptr {offsets} for lengths {lengths}"
    token_ids: list[int] = staging.token_ids[:tokens].tolist()
    future = decode_rows + sum(speculating)
    assert token_ids[:future].count(FUTURE_TOKEN) == future, "decode rows read the relay"
    known = token_ids[future:]
    assert not known or 0 <= min(known) <= max(known) < limits.vocab_size, f"token ids out of range: {known}"
    continuing = decode_rows + len(speculating)
    assert False not in staging.row_samples[:continuing].tolist(), "a decode row that does not sample"
    if forward_input.pooled:
        pooled = [row.row for row in forward_input.pooled]
        assert pooled == sorted(set(pooled)), f"pooled rows {pooled}"
        assert continuing <= pooled[0] and pooled[-1] < rows, f"pooled rows {pooled} of {rows}"
        assert not staging.row_samples[pooled].any(), "a pooled row samples"
    count = forward_input.num_table_diffs
    if count:
        index: list[int] = staging.table_index[:count].tolist()
        # A scatter on a device has no order: an entry that stands twice is a race.
        assert len(set(index)) == count, "a page-table entry stands twice in one diff"
        assert min(index) >= 0 and max(index) < tables.page_tables.size
        rows_of = [place // limits.max_pages_per_seq % limits.num_slots for place in index]
        assert NULL_SLOT not in rows_of, "the page table of the null slot changes"
        pages = staging.table_page[:count]
        assert int(pages.min()) >= 0 and int(pages.max()) <= limits.num_pages, "page id out of range"
    count = forward_input.num_sampling_diffs
    if count:
        changed: list[int] = staging.sampling_slot[:count].tolist()
        assert len(set(changed)) == count, "a sampling row stands twice in one diff"
        assert min(changed) >= 1 and max(changed) <= limits.max_num_seqs


def fingerprint_of(forward_input: ForwardInput) -> tuple[object, ...]:
    """All that a step may read, by value."""
    staging, rows = forward_input.staging, forward_input.num_rows
    diffs, changed = forward_input.num_table_diffs, forward_input.num_sampling_diffs
    return (
        forward_input.step,
        rows,
        forward_input.num_decode_rows,
        forward_input.num_tokens,
        diffs,
        changed,
        staging.row_slot[:rows].tobytes(),
        staging.row_start[:rows].tobytes(),
        staging.row_len[:rows].tobytes(),
        staging.row_samples[:rows].tobytes(),
        staging.qo_indptr[: rows + 1].tobytes(),
        staging.token_ids[: forward_input.num_tokens].tobytes(),
        staging.table_index[:diffs].tobytes(),
        staging.table_page[:diffs].tobytes(),
        staging.sampling_slot[:changed].tobytes(),
        staging.sampling[:changed].tobytes(),
        staging.adapter[:changed].tobytes(),
        tuple(forward_input.adapter_loads),
        staging.save_slot[: forward_input.num_saves].tobytes(),
        staging.save_snapshot[: forward_input.num_saves].tobytes(),
        staging.load_slot[: forward_input.num_loads].tobytes(),
        staging.load_snapshot[: forward_input.num_loads].tobytes(),
        tuple((extras.slot, extras.history.tobytes()) for extras in forward_input.extras),
        forward_input.num_speculating_rows,
        tuple((given.slot, given.history.tobytes()) for given in forward_input.speculations),
        tuple(forward_input.pooled),
    )
