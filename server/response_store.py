"""The responses of /v1/responses that a later turn may go on from: bounded in number and in bytes, the least recently
used go first.

Written by the loop thread, read by others, too. They are kept as JSON text, so that what is counted is what is held.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import orjson

Json = dict[str, Any]

# What an item's entry in the index takes beside its text.
_BYTES_PER_ITEM = 200


@dataclass(frozen=True, slots=True)
class Stored:
    """response: the Response object. input: the list of its input items, those of earlier turns included."""

    response: bytes
    input: bytes
    item_ids: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.response) + len(self.input) + _BYTES_PER_ITEM * len(self.item_ids)

    def conversation(self) -> list[Json]:
        """Its input and its output: what a next turn goes on from."""
        return [*orjson.loads(self.input), *orjson.loads(self.response)["output"]]


class ResponseStore:
    """owner: who may see a response; an id means nothing to anybody else. max_entries 0 keeps nothing."""

    def __init__(self, max_entries: int = 0, max_bytes: int = 0) -> None:
        self.enabled = max_entries > 0
        self.num_bytes = 0
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        # The newest response that an item is part of.
        self._of_item: dict[tuple[str, str], str] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, owner: str, response: Json, items: list[Json]) -> None:
        """Keep a response; one that is too big for the store by itself is not kept."""
        ids = tuple(item["id"] for item in (*items, *response["output"]))
        stored = Stored(orjson.dumps(response), orjson.dumps(items), ids)
        if stored.size > self._max_bytes:
            return
        self._entries[owner, response["id"]] = stored
        self.num_bytes += stored.size
        for item_id in ids:
            self._of_item[owner, item_id] = response["id"]
        while self.num_bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self.delete(*next(iter(self._entries)))

    def get(self, owner: str, response_id: str) -> Stored | None:
        """A response, which is now the most recently used one. Any thread; it may go meanwhile."""
        stored = self._entries.get((owner, response_id))
        if stored is not None:
            with contextlib.suppress(KeyError):
                self._entries.move_to_end((owner, response_id))
        return stored

    def get_item(self, owner: str, item_id: str) -> Json | None:
        """An item of any response. Any thread."""
        stored = self.get(owner, self._of_item.get((owner, item_id), ""))
        if stored is None:
            return None
        return next(item for item in stored.conversation() if item["id"] == item_id)

    def clear(self) -> None:
        self._entries.clear()
        self._of_item.clear()
        self.num_bytes = 0

    def delete(self, owner: str, response_id: str) -> bool:
        """Forget a response; False where there is none."""
        stored = self._entries.pop((owner, response_id), None)
        if stored is None:
            return False
        self.num_bytes -= stored.size
        for item_id in stored.item_ids:
            if self._of_item.get((owner, item_id)) == response_id:
                del self._of_item[owner, item_id]
        return True
