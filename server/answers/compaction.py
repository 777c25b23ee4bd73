"""The answer of POST /v1/responses/compact: what the user has said, and an item with the summary of the rest."""

from __future__ import annotations

import uuid

from engine.stream import Delta
from server.answers.responses import ResponsesAnswer
from server.protocol.sealed import seal
from server.sse import Json


class CompactionAnswer(ResponsesAnswer):
    """One answer, never streamed; see answers/base.py. The last item of the request asks for the summary."""

    def whole(self, deltas: list[Delta]) -> Json:
        """The compacted conversation; one delta."""
        response = super().whole(deltas)
        said = [
            "".join(part["text"] for part in item["content"])
            for kind in ("message", "reasoning")
            for item in response["output"]
            if item["type"] == kind
        ]
        # A model that was cut while it thought has summed up something, too.
        summary = next(filter(None, map(str.strip, said)), "")
        kept = [item for item in self._asked.items[:-1] if item["type"] == "message" and item["role"] == "user"]
        item = {"type": "compaction", "id": f"cmp_{uuid.uuid4().hex}", "encrypted_content": seal(summary)}
        return {
            "id": response["id"],
            "object": "response.compaction",
            "created_at": response["created_at"],
            "output": [*kept, item],
            "usage": response["usage"],
        }
