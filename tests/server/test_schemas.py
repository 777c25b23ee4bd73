"""The JSON-schema suite through the whole server: compiled, sampled under masks, jumped ahead, streamed and not.

The model babbles: its logits are noise by (token, place), with a growing wish to close what is open, so that every
answer comes to an end. Sampler, masks, scheduler, detokenizer and HTTP are the real ones.
"""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

import jsonschema
import torch
from torch import Tensor

from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.ops.attention.base import AttentionBackend, AttentionSpec
from tests.server.support import Live, live, served_model, text_of, tokenizer
from tests.text.schemas import SCHEMAS

PATH = "/v1/completions"
# Few enough that none waits long behind the others, also on a busy machine.
AT_ONCE = 16
TEMPERATURES = (0.5, 1.0, 1.6, 2.0)


class Babble:
    """Random logits (deviation 3), the same for the same token at the same place (two periods, so it never repeats)."""

    attention_spec = AttentionSpec.alike(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, scale=1.0)

    def __init__(self) -> None:
        vocab = tokenizer().vocab_size
        self._noise = 2.1 * torch.randn(257, vocab, generator=torch.Generator().manual_seed(7))
        self._closing = torch.zeros(vocab)
        for token in range(vocab):
            data = tokenizer().token_bytes(token)
            if data and not data.strip(b'"}]'):
                # What ends a string before what would only make it longer.
                self._closing[token] = 1.5 if data.startswith(b'"') else 1.0
            elif len(data) == 1 and data.isascii():
                # Some patterns and formats end with a certain letter only.
                self._closing[token] = 0.9
        self._closing[list(tokenizer().eos_token_ids)] = 2.0

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, *types: Tensor | None
    ) -> Tensor:
        return torch.stack([token_ids.long(), positions.long()], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        places = hidden[:, 1]
        # At every other place, or a pattern that asks for one more letter would never get it.
        wish = ((places - 10) * 0.4).clamp(0, 20) * (places % 2)
        noise = self._noise[(hidden[:, 0] * 31 + places) % 257] + self._noise[(hidden[:, 0] + places) % 251]
        return noise + wish[:, None] * self._closing


def device(limits: Limits) -> CPUExecutor:
    return CPUExecutor(Babble(), limits, dtype=torch.float32)


async def check(server: Live, gate: asyncio.Semaphore, number: int, temperature: float) -> int:
    """One schema, whole and streamed; returns the tokens of one answer."""
    schema = SCHEMAS[number]
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    body: dict[str, Any] = {
        "prompt": "x",
        "max_tokens": 1500,
        "temperature": temperature,
        "seed": number,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}},
    }
    if number % 3 == 0:
        body = {**body, "structured_outputs": {"json": schema, "disable_any_whitespace": True}}
        del body["response_format"]
    async with gate:
        status, whole = await server.post(PATH, body)
    assert status == 200, (number, whole)
    [choice] = whole["choices"]
    async with gate:
        events = await server.events(PATH, body)
    assert text_of(events) == choice["text"], number
    assert choice["finish_reason"] == events[-2]["choices"][0]["finish_reason"] == "stop", (number, choice)
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(choice["text"]))
    return int(whole["usage"]["completion_tokens"])


async def test_every_schema_whole_and_streamed_at_every_temperature() -> None:
    model = served_model(max_model_len=1600)
    async with live(make_device=device, model=model, max_num_seqs=AT_ONCE, num_pages=AT_ONCE * 100) as server:
        gate = asyncio.Semaphore(AT_ONCE)
        checking = functools.partial(check, server, gate)
        greedy = [checking(number, 0.0) for number in range(len(SCHEMAS))]
        hot = [checking(number, TEMPERATURES[number % len(TEMPERATURES)]) for number in range(len(SCHEMAS))]
        counts = await asyncio.gather(*greedy, *hot)
        await server.all_free()
        steps = server.engine.metrics.generation_tokens
    assert min(counts) > 0 and steps == 2 * sum(counts)
