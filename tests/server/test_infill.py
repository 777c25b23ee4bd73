"""Fill in the middle in three families: llama.cpp's /infill, `suffix` of a completion, and Ollama's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.bad_fields import check_ollama, check_shape
from tests.server.dictate import dictated
from tests.server.support import Live, tokenizer

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/infill", {"input_prefix": "def f(x):\n", "input_suffix": "\nprint(f(1))"}),
    ("/v1/completions", {"prompt": "def f(x):\n", "suffix": "\nprint(f(1))"}),
    ("/api/generate", {"prompt": "def f(x):\n", "suffix": "\nprint(f(1))", "stream": False}),
]
HOLE = "<tool_call>def f(x):\n</tool_call>\nprint(f(1))<|im_start|>"


def said(body: dict[str, Any]) -> str:
    return str(body.get("content") or body.get("response") or body["choices"][0]["text"])


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
async def test_the_middle(server: Live, infills: None, path: str, body: dict[str, Any]) -> None:
    with dictated(server, "  return x") as requests:
        status, answer = await server.post(path, body)
    assert status == 200 and said(answer) == "  return x"
    assert tokenizer().decode(requests[0].prompt_token_ids, skip_special_tokens=False) == HOLE
    # A model that goes on behind the middle says one of its marks.
    assert set(tokenizer().encode("<tool_call></tool_call><|im_start|>", add_special_tokens=False)) <= set(
        requests[0].sampling.stop_token_ids
    )


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
async def test_a_model_without_the_tokens_says_so(server: Live, path: str, body: dict[str, Any]) -> None:
    status, answer = await server.post(path, body)
    error = (check_ollama if path.startswith("/api") else check_shape)(status, answer)
    assert "infill is not supported by this model" in error["message"] and "suffix" in error["message"]
    if path != "/infill":
        assert (await server.post(path, {**body, "suffix": ""}))[0] == 200
    assert "insert" not in (await server.post("/api/show", {}))[1]["capabilities"]


async def test_as_editors_send_it(server: Live, infills: None) -> None:
    """llama.vim's request: what is in the hole already, chunks of other files, and a few figures of the answer."""
    body = {
        "id_slot": 0,
        "input_prefix": "a\n",
        "input_suffix": "z\n",
        "input_extra": [{"text": "other", "time": 5, "filename": "b.py"}],
        "prompt": "  x",
        "n_predict": 8,
        "stop": [],
        "n_indent": 2,
        "top_k": 40,
        "top_p": 0.9,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 1000,
        "response_fields": ["content", "timings/prompt_n", "truncated", "no/such"],
    }
    with dictated(server, "y") as requests:
        status, answer = await server.post("/infill", body)
    assert status == 200 and set(answer) == {"content", "timings/prompt_n", "truncated"}
    assert answer["content"] == "y" and answer["timings/prompt_n"] > 0
    prompt = tokenizer().decode(requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "\n\n--- b.py ---\n\nother\n<tool_call>a\n  x</tool_call>z\n<|im_start|>"


async def test_what_does_not_fit_is_left_out(server: Live, infills: None) -> None:
    body = {"input_prefix": "b " * 2000, "input_suffix": "c " * 2000, "input_extra": [{"text": "d " * 900}]}
    with dictated(server, "y") as requests:
        status, answer = await server.post("/infill", {**body, "n_predict": 100})
        assert status == 200 and answer["tokens_evaluated"] == 412
        prompt = tokenizer().decode(requests[0].prompt_token_ids, skip_special_tokens=False)
        before, _, behind = prompt.removeprefix("<tool_call>").partition("</tool_call>")
        assert before.count("b") > 2 * behind.count("c") > 100 and "d" not in prompt
        # The other families are told that it does not.
        status, answer = await server.post("/v1/completions", {"prompt": "b " * 2000, "suffix": "c"})
        assert check_shape(status, answer)["code"] == "context_length_exceeded"
