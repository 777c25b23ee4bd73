"""What the model is shown of a conversation: a server whose template shows all of it, and words to ask it with."""

from __future__ import annotations

import json
from typing import Any

from engine.text.chat_template import ChatTemplate
from server.protocol.ignored import HEADER
from tests.server.dictate import dictated
from tests.server.support import Live, live, served_model, tokenizer

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
# Shows every role, name and call of a conversation.
TEMPLATE = ChatTemplate(
    {
        "default": "{% for t in tools or [] %}<{{ t.function.name }}|{{ t.function.description }}>{% endfor %}"
        "{% for m in messages %}[{{ m.role }}:{{ m.reasoning_content }}:"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}"
        "{% endif %}{% for c in m.tool_calls or [] %}+{{ c.function.name }}={{ c.function.arguments | tojson }}"
        "{% endfor %}]{% endfor %}<tool_call></tool_call>"
    },
    {},
)
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
INPUT_IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
LEFT_OUT = "[image left out: this model reads text only]"
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
HI = {"role": "user", "content": "hi"}
BYE = {"role": "user", "content": "bye"}


def shown() -> Any:
    return live(model=served_model(chat_template=TEMPLATE, max_model_len=2048), tool_call_parser="hermes")


async def prompt(server: Live, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """What the model is shown of a body, and what the answer says was left out."""
    body = {"max_output_tokens" if path == RESPONSES else "max_tokens": 4, **body}
    with dictated(server, "ok") as requests:
        async with server.http.post(server.url + path, json=body) as response:
            answer = await response.read()
            assert response.status == 200, answer
    text = tokenizer().decode(requests[0].prompt_token_ids, skip_special_tokens=False)
    return text.removesuffix("<tool_call></tool_call>"), response.headers.get(HEADER, "")


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


async def stream(server: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of named events."""
    async with server.http.post(server.url + path, json={**body, "stream": True}) as response:
        raw = await response.read()
        assert response.status == 200, raw
    return [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
