"""What rank 0 tells the other ranks, as flat arrays in shared memory: what states a step begins with, and which of
their tokens were right, a forward, a wish for rows of the embedding or for logits, or a command.

Every message begins with HEADER int32 numbers, of which the first is its kind. Read and written by the executors'
threads. Imports no torch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from engine.executor.tables import PagedMetadata
from engine.forward import BoolArray, ForwardInput

FORWARD, LOGITS, COMMAND, STATES, EMBEDDED, SETTLED = 1, 2, 3, 4, 5, 6
HEADER = 16
# Bytes of a message that any model's are given.
LEAST_BYTES = 2 << 20

Bytes = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]


def message_bytes(max_num_seqs: int, max_num_batched_tokens: int, max_pages_per_seq: int, num_groups: int) -> int:
    """What the largest forward takes."""
    arrays = num_groups * (2 * max_num_batched_tokens + max_num_seqs * max_pages_per_seq)
    arrays += 5 * max_num_batched_tokens + 4 * (max_num_seqs + 1)
    arrays = max(arrays, 16 * (max_num_seqs + 1))  # saves and loads of states: of all that run, and of all that leave
    return max(LEAST_BYTES, 4 * (HEADER + arrays + 2 * num_groups))


class StepMetadata(PagedMetadata):
    """A PagedMetadata whose arrays lie in a message."""

    def __init__(self) -> None:
        pass


def write_forward(
    message: Bytes,
    token_ids: Int32,
    groups: tuple[PagedMetadata, ...],
    types: Any | None,
    adapters: Int32 | None = None,
) -> None:
    """A forward of these tokens. types: int64 [tokens], or None. adapters: whose each is, or nobody's."""
    first = groups[0]
    rows, tokens = first.num_rows, len(token_ids)
    header = np.zeros(HEADER, np.int32)
    header[:5] = FORWARD, rows, tokens, len(groups), types is not None
    counts = [len(group.kv_indices) for group in groups]
    header[5 : 5 + len(counts)] = counts
    header[-1] = adapters is not None
    # What is eight bytes wide comes first, where its place is a multiple of eight.
    parts = [header, *(group.kv_slots.view(np.int32) for group in groups)]
    if types is not None:
        parts.append(types.view(np.int32))
    parts += [token_ids, first.positions, first.kv_len, first.last_page_len, first.qo_indptr, first.kv_indptr]
    parts += [group.kv_indices for group in groups]
    if adapters is not None:
        parts.append(adapters)
    numbers = message.view(np.int32)
    np.concatenate(parts, out=numbers[: sum(map(len, parts))])


def read_forward(message: Bytes) -> tuple[Int32, list[StepMetadata], Any | None, Int32 | None]:
    """The same, as views of the message."""
    numbers = message.view(np.int32)
    _, rows, tokens, num_groups, typed, *counts = numbers[:HEADER].tolist()
    at = HEADER

    def take(count: int) -> Int32:
        nonlocal at
        at += count
        return numbers[at - count : at]

    slots = [take(2 * tokens).view(np.int64) for _ in range(num_groups)]
    types = take(2 * tokens).view(np.int64) if typed else None
    token_ids, positions, kv_len, last_page_len = take(tokens), take(tokens), take(rows), take(rows)
    qo_indptr, kv_indptr = take(rows + 1), take(rows + 1)
    groups = []
    for own_slots, count in zip(slots, counts[:num_groups], strict=True):
        group = StepMetadata()
        group.num_rows, group.positions, group.kv_slots = rows, positions, own_slots
        group.kv_len, group.last_page_len = kv_len, last_page_len
        group.qo_indptr, group.kv_indptr, group.kv_indices = qo_indptr, kv_indptr, take(count)
        groups.append(group)
    return token_ids, groups, types, take(tokens) if numbers[HEADER - 1] else None


def write_states(message: Bytes, step: ForwardInput, held: BoolArray | None = None, *, moved: bool = False) -> None:
    """What `States.begin` does with a step. held: see StatePlan. moved: but for what it saves and loads, which was told
    of the step as it was given."""
    staging, rows = step.staging, step.num_rows
    saves, loads = (0, 0) if moved else (step.num_saves, step.num_loads)
    header = np.zeros(HEADER, np.int32)
    header[:8] = STATES, rows, saves, loads, step.num_decode_rows, step.num_tokens, moved, held is not None
    parts = [header, staging.row_slot[:rows], staging.row_start[:rows], staging.qo_indptr[: rows + 1]]
    parts += [staging.save_slot[:saves], staging.save_snapshot[:saves]]
    parts += [staging.load_snapshot[:loads], staging.load_slot[:loads]]
    parts += [np.zeros(0, np.int32) if held is None else held.astype(np.int32)]
    np.concatenate(parts, out=message.view(np.int32)[: sum(map(len, parts))])


@dataclass(frozen=True, slots=True)
class StepStates:
    """Of a step with so many tokens, see write_states: copies, for they are needed after the message. meets: no sum
    follows in which all ranks do."""

    meets: bool
    num_decode_rows: int
    slots: Int32
    starts: Int32
    qo_indptr: Int32
    saves: tuple[Int32, Int32]
    loads: tuple[Int32, Int32]
    held: BoolArray | None


def read_states(message: Bytes) -> StepStates:
    """The same."""
    numbers = message.view(np.int32)
    _, rows, saves, loads, decode, tokens, moved, holds = numbers[:8].tolist()
    counts = [rows, rows, rows + 1, saves, saves, loads, loads, rows * holds]
    cuts = np.cumsum([HEADER, *counts])
    slots, starts, indptr, *copies, held = (numbers[a:b].copy() for a, b in itertools.pairwise(cuts.tolist()))
    return StepStates(
        moved or not tokens,
        decode,
        slots,
        starts,
        indptr,
        (copies[0], copies[1]),
        (copies[2], copies[3]),
        held.astype(np.bool_) if holds else None,
    )


def write_settled(message: Bytes, counts: Int32) -> None:
    """Of each row of the step, that many of its tokens are right."""
    numbers = message.view(np.int32)
    numbers[:2] = SETTLED, len(counts)
    numbers[HEADER : HEADER + len(counts)] = counts


def read_settled(message: Bytes) -> Int32:
    """The same, a copy."""
    numbers = message.view(np.int32)
    return numbers[HEADER : HEADER + int(numbers[1])].copy()


def write_ids(message: Bytes, token_ids: Int32) -> None:
    """Rows of the embedding are wanted."""
    numbers = message.view(np.int32)
    numbers[:2] = EMBEDDED, len(token_ids)
    numbers[HEADER : HEADER + len(token_ids)] = token_ids


def read_ids(message: Bytes) -> Int32:
    """The same, as a view of the message."""
    numbers = message.view(np.int32)
    return numbers[HEADER : HEADER + int(numbers[1])]


def write_logits(message: Bytes, rows: int, hidden: Bytes, adapters: Int32 | None = None) -> None:
    """Logits of `rows` hidden states are wanted. adapters: whose each is, or nobody's."""
    numbers, at = message.view(np.int32), HEADER
    numbers[:3] = LOGITS, rows, adapters is not None
    if adapters is not None:
        numbers[at : at + rows] = adapters
        at += rows
    message[4 * at : 4 * at + len(hidden)] = hidden


def read_logits(message: Bytes, row_bytes: int) -> tuple[Bytes, Int32 | None]:
    """The bytes of those hidden states, and their adapters."""
    numbers, at = message.view(np.int32), HEADER
    rows, adapters = int(numbers[1]), None
    if numbers[2]:
        adapters = numbers[at : at + rows]
        at += rows
    return message[4 * at : 4 * at + rows * row_bytes], adapters


def write_text(message: Bytes, kind: int, value: Any) -> None:
    """A JSON value: a command, or an answer."""
    text = orjson.dumps(value)
    message[: 4 * HEADER].view(np.int32)[:2] = kind, len(text)
    message[4 * HEADER : 4 * HEADER + len(text)] = np.frombuffer(text, np.uint8)


def read_text(message: Bytes) -> Any:
    """The same."""
    length = int(message[: 4 * HEADER].view(np.int32)[1])
    return orjson.loads(message[4 * HEADER : 4 * HEADER + length].tobytes())


def kind_of(message: Bytes) -> int:
    return int(message[:4].view(np.int32)[0])
