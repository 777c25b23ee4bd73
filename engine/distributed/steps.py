"""A step as bytes: what rank 0 tells ranks on GPUs, which run the same executor over staging sets of their own.

Arrays as they lie in the Staging, then what few steps have as JSON. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from engine.forward import ForwardInput, Int32Array, PooledRow, RowExtras, Staging, TokenMasks
from engine.request import Pooling

STEP, MASKS, CAPTURE, COMMAND, DROP, CLEANSE = 1, 2, 3, 4, 5, 6
WORDS = 15

# Of Told, what few steps have.
RARE = ("adapters", "gone", "sampled", "speculating")

Bytes = npt.NDArray[np.uint8]


def kind_of(message: Bytes) -> int:
    return int(message[:8].view(np.int64)[0])


def _lengths(given: ForwardInput) -> dict[str, int]:
    """Arrays of a Staging by how much of them counts: those of eight-byte fields first, single bytes last."""
    rows, changed = given.num_rows, given.num_sampling_diffs
    return {
        "sampling": changed,
        "row_slot": rows,
        "row_start": rows,
        "row_len": rows,
        "token_ids": given.num_tokens,
        "qo_indptr": rows + 1,
        "table_index": given.num_table_diffs,
        "table_page": given.num_table_diffs,
        "sampling_slot": changed,
        "adapter": changed,
        "save_slot": given.num_saves,
        "save_snapshot": given.num_saves,
        "load_snapshot": given.num_loads,
        "load_slot": given.num_loads,
        "row_samples": rows,
    }


@dataclass(slots=True)
class Told:
    """What a step's message says beside the step.

    side: of the staging sets that it is laid out in. num_ahead: steps that are in flight. adapters: the indices that
    others take, by the numbers that all ranks know them by, 0 for none. gone: numbers of adapters that nobody asks for
    again. sampled: of each position that is sampled, the row that masks are for, where drafts are rows of their own.
    speculating: slots that do from this step on, where a model drafts; reading: what it reads and drafts, as words.
    """

    side: int
    num_ahead: int
    adapters: Sequence[Sequence[int]] = ()
    gone: Sequence[int] = ()
    sampled: Sequence[int] | None = None
    speculating: Sequence[int] = ()
    reading: Int32Array | None = None


def write_step(given: ForwardInput, told: Told) -> tuple[list[Bytes], bool]:
    """The parts of a message; and whether its masks are still to come. given: as it runs on the device."""
    assert not given.num_speculating_rows, "drafts are rows of their own by now"
    masks = given.masks
    ready = masks is not None and masks.is_ready
    mask_rows = -1 if masks is None else len(masks.rows)
    head = [STEP, given.step, told.num_ahead, told.side, given.num_rows, given.num_decode_rows, given.num_tokens]
    head += [given.num_table_diffs, given.num_sampling_diffs, given.num_saves, given.num_loads, mask_rows, ready]
    rare: dict[str, Any] = {}
    if given.extras:
        rare["extras"] = [_extras_words(each) for each in given.extras]
    if given.pooled:
        rare["pooled"] = given.pooled
    for name in RARE:
        if found := getattr(told, name):
            rare[name] = found
    text = orjson.dumps(rare, option=orjson.OPT_SERIALIZE_NUMPY) if rare else b""
    staging = given.staging
    reading = np.zeros(0, np.int32) if told.reading is None else told.reading
    parts = [np.array([*head, len(reading), len(text)], np.int64).view(np.uint8)]
    # Most steps have most of them empty.
    parts += [getattr(staging, name)[:length].view(np.uint8) for name, length in _lengths(given).items() if length]
    if masks is not None:
        parts.append(masks.rows.view(np.uint8))
        if ready:
            parts.append(masks.bits.reshape(-1).view(np.uint8))
    if len(reading):
        parts.append(reading.view(np.uint8))
    if text:
        parts.append(np.frombuffer(text, np.uint8))
    return parts, masks is not None and not ready


def _extras_words(extras: RowExtras) -> dict[str, Any]:
    return {field.name: getattr(extras, field.name) for field in dataclasses.fields(extras)}


def num_ahead(message: Bytes) -> int:
    """Steps that are in flight when this one begins: what follows from the others' ends comes before it."""
    return int(message[16:24].view(np.int64)[0])


def side_of(message: Bytes) -> int:
    """The staging set that it is for."""
    return int(message[24:32].view(np.int64)[0])


def read_step(message: Bytes, staging: Staging) -> tuple[ForwardInput, Told]:
    """The same step, in another staging set, without adapters to load."""
    head = message[: 8 * WORDS].view(np.int64).tolist()
    _, step, ahead, side, rows, decodes, tokens, diffs, changed, saves, loads, mask_rows, ready, *lengths = head
    told = Told(side, ahead)
    given = ForwardInput(step, staging, rows, decodes, tokens, diffs, changed, num_saves=saves, num_loads=loads)
    staging.reserve_table_diff(diffs)
    at = 8 * WORDS
    for name, length in _lengths(given).items():
        if not length:
            continue
        array = getattr(staging, name)
        end = at + length * array.dtype.itemsize
        array[:length].view(np.uint8)[:] = message[at:end]
        at = end
    if mask_rows >= 0:
        end = at + 4 * mask_rows
        found = np.frombuffer(message[at:end].tobytes(), np.int32).tolist()
        masks, at = TokenMasks(found, staging.limits.vocab_size), end
        if ready:
            at = _fill(masks, message, at)
        given.masks = masks
    reading_length, text_length = lengths
    if reading_length:
        end = at + 4 * reading_length
        told.reading, at = np.frombuffer(message[at:end].tobytes(), np.int32), end
    if text_length:
        rare = orjson.loads(message[at : at + text_length].tobytes())
        given.extras = [_extras_of(words) for words in rare.get("extras", ())]
        given.pooled = [_pooled_of(words) for words in rare.get("pooled", ())]
        for name in RARE:
            setattr(told, name, rare.get(name, getattr(told, name)))
    return given, told


def _fill(masks: TokenMasks, message: Bytes, at: int) -> int:
    end = at + masks.bits.nbytes
    masks.bits.reshape(-1).view(np.uint8)[:] = message[at:end]
    masks.release()
    return end


def write_masks(masks: TokenMasks) -> list[Bytes]:
    """Those of the step before."""
    return [np.array([MASKS], np.int64).view(np.uint8), masks.bits.reshape(-1).view(np.uint8)]


def read_masks(message: Bytes, masks: TokenMasks) -> None:
    """They are there now."""
    _fill(masks, message, 8)


def write_words(kind: int, value: Any) -> list[Bytes]:
    """A message that JSON can say."""
    return [np.array([kind], np.int64).view(np.uint8), np.frombuffer(orjson.dumps(value), np.uint8)]


def read_words(message: Bytes) -> Any:
    """The same."""
    return orjson.loads(message[8:].tobytes())


def _extras_of(words: dict[str, Any]) -> RowExtras:
    words["history"] = np.array(words["history"], np.int32)
    words["logit_bias"] = tuple((token, bias) for token, bias in words["logit_bias"])
    words["bad_words"] = tuple(map(tuple, words["bad_words"]))
    allowed = words["allowed_token_ids"]
    words["allowed_token_ids"] = None if allowed is None else tuple(allowed)
    return RowExtras(**words)


def _pooled_of(words: dict[str, Any]) -> PooledRow:
    pooling = words["pooling"]
    return PooledRow(words["row"], Pooling(**{**pooling, "token_ids": tuple(pooling["token_ids"])}), words["ends"])
