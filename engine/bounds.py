"""Bounds: where a request's sequence ends at the latest, and who can never be served at all.

Asked by the Scheduler at submit, and by whoever wants to know before that.
"""

from __future__ import annotations

from engine.forward import Limits
from engine.request import MAX_STOP_TOKEN_IDS, ContextLengthExceededError, Request, RequestError


def bounds_of(request: Request, limits: Limits, eos_token_ids: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The most tokens that its sequence may have, and the ids that end it.

    Raises RequestError for one that can never be served. Reads nothing that changes: any thread may ask.
    """
    prompt, params = request.prompt_token_ids, request.sampling
    if not prompt:
        raise RequestError("The prompt is empty: at least one token is needed.", param="prompt")
    if request.adapter is not None and not limits.max_adapters:
        raise RequestError("This server takes no LoRA adapters; start it with --enable-lora.", param="model")
    max_length = limits.max_model_len
    if request.pooling is not None:
        # All of it is computed, as if a token were to follow.
        max_length = len(prompt) + 1
        most = min(limits.max_model_len, limits.max_cached_tokens)
        if len(prompt) > most:
            raise ContextLengthExceededError(
                f"This model's maximum context length is {most} tokens. However, your input contains "
                f"{len(prompt)} tokens. Please shorten the input.",
                param="input",
            )
    elif len(prompt) >= limits.max_model_len:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt "
            f"contains {len(prompt)} tokens, which leaves no room for output. Please shorten the prompt.",
            param="prompt",
        )
    if params.max_tokens is not None:
        max_length = len(prompt) + params.max_tokens
        if max_length > limits.max_model_len:
            raise ContextLengthExceededError(
                f"This model's maximum context length is {limits.max_model_len} tokens. However, you "
                f"requested {max_length} tokens ({len(prompt)} in the prompt, {params.max_tokens} for the "
                "output). Please shorten the prompt or the output.",
                param="max_tokens",
            )
    # The last token is never computed, so it needs no place in the cache.
    if max_length - 1 > limits.max_cached_tokens:
        if params.max_tokens is not None or len(prompt) >= limits.max_cached_tokens:
            raise ContextLengthExceededError(
                f"The KV cache holds {limits.max_cached_tokens} tokens; {max_length} were asked "
                "for (prompt and output). Please shorten the prompt or the output.",
                param="max_tokens",
            )
        max_length = limits.max_cached_tokens + 1
    stop_ids = tuple(dict.fromkeys((() if params.ignore_eos else eos_token_ids) + params.stop_token_ids))
    if len(stop_ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"At most {MAX_STOP_TOKEN_IDS} stop token ids are supported, EOS ids included; got {len(stop_ids)}.",
            param="stop_token_ids",
        )
    return max_length, stop_ids
