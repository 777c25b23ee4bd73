"""LLM: the same engine without a server, for scripts and notebooks.

    from engine.llm import LLM, SamplingParams

    with LLM("Qwen/Qwen2.5-0.5B-Instruct", max_model_len=4096) as llm:
        [output] = llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=64))
        print(output.outputs[0].text)

The engine's loop runs in a thread of its own. Every other thread may call, also one whose own event loop is running.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import orjson

from engine.bounds import bounds_of
from engine.build import build_engine
from engine.config import EngineConfig, StartupError
from engine.flags import Parser, config_from, make_parser
from engine.loop_thread import Lora, Runner, Structure, raise_closed
from engine.request import (
    FinishReason,
    Request,
    RequestError,
    SamplingParams,
    UnavailableError,
    checked,
    derive_seed,
)
from engine.stream import Delta, TokenLogprob, TokenStream
from engine.text.grammar.spec import GrammarSpec
from engine.text.grammar.state import Grammar
from engine.text.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "GrammarSpec", "RequestError", "RequestOutput", "SamplingParams", "StartupError"]

logger = logging.getLogger("oneloop.llm")

T = TypeVar("T")
Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation. finish_reason: stop or length. stop_reason: the stop string or stop token id that ended it.

    logprobs: one for each of token_ids, where asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and what came of it. prompt: None where token ids were given; of a chat the rendered text.

    prompt_logprobs: of the prompt's tokens from the second on, where asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprob] | None


class LLM:
    """model: a directory in HF format or a hub id; the bundled demo model where none is named.

    options: the server's flags as keywords (`max_model_len=4096`, `dtype="float32"`, `enable_prefix_caching=False`),
    but for those of HTTP; `lora_modules` may be a dict of names and paths.

    Raises StartupError with one readable line for everything that is wrong with them, the
    model or the machine. `close`, or leaving a `with` block, ends its threads and what still runs; the memory goes with
    the object.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        built = build_engine(_read_options(model, options))
        if not built.abilities.generates:
            built.engine.executor.close()
            raise StartupError(f"{built.names[0]} is for embeddings or scores; it does not generate text")
        self.tokenizer: Tokenizer | None = built.engine.tokenizer
        self._built = built
        self._numbers = itertools.count()
        self._runner = Runner(built)
        self.close: Callable[[], object] = weakref.finalize(self, self._runner.close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What counts where none are given: the model's own (`generation_config.json`), to the end of the context."""
        own = self._built.generation_defaults
        given = {name: getattr(own, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        set_ = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=own.max_new_tokens, **set_)

    # ---- blocking

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        structure: Structure | None = None,
        lora: Lora | Sequence[Lora | None] | None = None,
        lora_request: Lora | Sequence[Lora | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue a text or its token ids, or each of a list of them, in order.

        sampling_params: one for all, or one for each. n: continuations of each, with seeds of their own. structure:
        what each must look like from its first token on, a JSON schema or a GrammarSpec. lora: the LoRA adapter, by its
        name or as an object with `lora_name` and `lora_path`; one for all, or one or None for each. lora_request:
        vLLM's word for it. use_tqdm: a progress bar on stderr.

        Raises RequestError for what cannot be served, before anything has run where that can be known then; it
        names the prompt, and the others are not served either.
        """
        jobs = self._prepare(_prompts(prompts), sampling_params, n)
        return self._wait(self._serve(jobs, structure, _each(lora, lora_request, len(jobs)), use_tqdm))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        structure: Structure | None = None,
        lora: Lora | Sequence[Lora | None] | None = None,
        lora_request: Lora | Sequence[Lora | None] | None = None,
        use_tqdm: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them, by the model's own chat template.

        template: tools (declarations as in OpenAI's API), add_generation_prompt, continue_final_message, and
        chat_template_kwargs. The rest as in `generate`. Calls of tools are left in the text.
        """
        jobs = self._prepare_chats(messages, sampling_params, n, **template)
        return self._wait(self._serve(jobs, structure, _each(lora, lora_request, len(jobs)), use_tqdm))

    # ---- from a running loop

    async def generate_async(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        structure: Structure | None = None,
        lora: Lora | Sequence[Lora | None] | None = None,
        lora_request: Lora | Sequence[Lora | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """`generate` that leaves the caller's loop free. Cancelling it aborts what still runs."""
        jobs = await asyncio.to_thread(self._prepare, _prompts(prompts), sampling_params, n)
        return await self._await(self._serve(jobs, structure, _each(lora, lora_request, len(jobs)), use_tqdm))

    async def chat_async(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        structure: Structure | None = None,
        lora: Lora | Sequence[Lora | None] | None = None,
        lora_request: Lora | Sequence[Lora | None] | None = None,
        use_tqdm: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """`chat` that leaves the caller's loop free. Cancelling it aborts what still runs."""
        jobs = await asyncio.to_thread(self._prepare_chats, messages, sampling_params, n, **template)
        return await self._await(self._serve(jobs, structure, _each(lora, lora_request, len(jobs)), use_tqdm))

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        structure: Structure | None = None,
        lora: Lora | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of one continuation as they come; the last one has the finish reason.

        Leaving the iterator (`contextlib.aclosing` does it at once) aborts the request.
        """
        return self._stream(partial(self._prepare, [prompt], sampling_params, 1), structure, lora)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        structure: Structure | None = None,
        lora: Lora | None = None,
        **template: Any,
    ) -> AsyncGenerator[Delta, None]:
        """`stream` of the answer to one conversation; template as in `chat`."""
        return self._stream(partial(self._prepare_chats, [messages], sampling_params, 1, **template), structure, lora)

    # ---- the caller's side

    def _prepare(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        n: int,
        *,
        special: bool = True,
    ) -> list[_Job]:
        """Everything that can be known before the engine is asked. special: the tokenizer adds its own tokens."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise RequestError("`n` must be an integer of at least 1.", param="n")
        most = self._built.engine.limits.max_model_len
        if is_default := sampling_params is None:
            sampling_params = self.default_sampling_params
        each = [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(each) != len(prompts):
            raise RequestError(f"There are {len(prompts)} prompts, but {len(each)} sampling_params.")
        jobs: list[_Job] = []
        for index, (prompt, given) in enumerate(zip(prompts, each, strict=True)):
            with _at(index, len(prompts)):
                ids = self._encode(prompt, special)
                if is_default and given.max_tokens is not None and len(ids) + given.max_tokens > most:
                    # As in the server: a default counts where it fits.
                    given = replace(given, max_tokens=None)
                vocab_size, engine = self._built.model_config.vocab_size, self._built.engine
                sampling = checked(given, vocab_size, engine.config.logprobs.most_of(vocab_size))
                requests = [self._request(ids, sampling, choice) for choice in range(n)]
                bounds_of(requests[0], engine.limits, engine.eos_token_ids)
                jobs.append(_Job(prompt if isinstance(prompt, str) else None, requests))
        return jobs

    def _prepare_chats(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        n: int,
        **template: Any,
    ) -> list[_Job]:
        # The template writes the special tokens itself.
        return self._prepare(self._render(messages, **template), sampling_params, n, special=False)

    def _encode(self, prompt: Prompt, special: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("This model has no tokenizer; give token ids.")
            return self.tokenizer.encode(prompt, add_special_tokens=special)
        ids, most = list(prompt), self._built.model_config.vocab_size
        if not all(isinstance(token_id, int) and 0 <= token_id < most for token_id in ids):
            raise RequestError(f"A prompt must be a string, or token ids from 0 to {most - 1}.")
        return ids

    def _request(self, ids: list[int], sampling: SamplingParams, choice: int) -> Request:
        if choice and sampling.seed is not None:
            sampling = replace(sampling, seed=derive_seed(sampling.seed, choice))
        return Request(f"llm-{next(self._numbers)}", ids, sampling, stream=False)

    def _render(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[str]:
        template = self._built.chat_template
        if template is None:
            raise RequestError("This model has no chat template; use `generate`.")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts: list[str] = []
        for index, conversation in enumerate(conversations):
            with _at(index, len(conversations)):
                prompts.append(
                    template.render(
                        [dict(message) for message in conversation],
                        tools=tools,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=continue_final_message,
                        kwargs=chat_template_kwargs,
                    )
                )
        return prompts

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._runner.submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise_closed()
        finally:
            # Ctrl-C while waiting: nobody wants the rest.
            future.cancel()

    async def _await(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._runner.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise_closed()
            raise

    async def _stream(
        self, prepare: Callable[[], list[_Job]], structure: Structure | None, lora: Lora | None
    ) -> AsyncGenerator[Delta, None]:
        [job] = await asyncio.to_thread(prepare)
        loop, deltas = asyncio.get_running_loop(), asyncio.Queue[Delta | None]()

        def put(delta: Delta | None) -> None:
            # RuntimeError: the caller's loop has ended, and nobody reads any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(deltas.put_nowait, delta)

        request = replace(job.requests[0], stream=True)
        future = self._runner.submit(self._pump(request, structure, lora, put))
        future.add_done_callback(lambda _: put(None))
        try:
            while (delta := await deltas.get()) is not None:
                yield delta
            future.result()
        except concurrent.futures.CancelledError:
            raise_closed()
        finally:
            future.cancel()

    # ---- on the engine's thread

    async def _serve(
        self, jobs: list[_Job], structure: Structure | None, loras: list[Lora | None], use_tqdm: bool
    ) -> list[RequestOutput]:
        """All jobs, or the first error."""
        from tqdm import tqdm

        grammar = await self._runner.compile(structure)
        requests: list[Request] = []
        for index, (job, lora) in enumerate(zip(jobs, loras, strict=True)):
            with _at(index, len(jobs)):
                adapter = await self._runner.adapter(lora)
            requests += [replace(request, adapter=adapter) for request in job.requests]
        with tqdm(total=len(requests), disable=not use_tqdm, desc="Requests", unit="") as bar:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._collect(request, grammar, bar.update)) for request in requests]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        done = iter([task.result() for task in tasks])
        return [job.output(list(itertools.islice(done, len(job.requests)))) for job in jobs]

    async def _collect(
        self, request: Request, grammar: Grammar | None, on_done: Callable[[], object]
    ) -> tuple[Delta, TokenStream]:
        async with self._runner.submitted(request, grammar) as stream:
            whole = await stream.collect()
        _check(whole)
        on_done()
        return whole, stream

    async def _pump(
        self, request: Request, structure: Structure | None, lora: Lora | None, put: Callable[[Delta], None]
    ) -> None:
        grammar = await self._runner.compile(structure)
        request = replace(request, adapter=await self._runner.adapter(lora))
        async with self._runner.submitted(request, grammar) as stream:
            async for delta in stream:
                _check(delta)
                put(delta)


@dataclass(frozen=True, slots=True)
class _Job:
    """A prompt and a request for each of its continuations."""

    prompt: str | None
    requests: list[Request]

    def output(self, done: list[tuple[Delta, TokenStream]]) -> RequestOutput:
        first, sampling = done[0][1], self.requests[0].sampling
        outputs = [
            CompletionOutput(
                index=index,
                text=delta.text,
                token_ids=delta.token_ids,
                finish_reason=delta.finish_reason.value if delta.finish_reason is not None else "",
                stop_reason=delta.stop_reason,
                logprobs=None if sampling.logprobs is None else delta.logprobs,
            )
            for index, (delta, _) in enumerate(done)
        ]
        ids = list(self.requests[0].prompt_token_ids)
        return RequestOutput(self.prompt, ids, outputs, first.num_cached_tokens, first.prompt_logprobs)


# ---- reading


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        meant = self.meant(message).rstrip()
        raise StartupError(f"{message} ({meant})" if meant else message)


def _read_options(model: str | None, options: dict[str, Any]) -> EngineConfig:
    """Keywords by way of the flags with the same names, so that both mean the same."""
    argv: list[str] = [] if model is None else [f"--model={model}"]
    if isinstance(modules := options.get("lora_modules"), dict):
        options = {**options, "lora_modules": [{"name": name, "path": str(path)} for name, path in modules.items()]}
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            argv.append(flag)
        elif value is False:
            argv.append(f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            argv.append(f"{flag}={orjson.dumps(value).decode()}")
        elif isinstance(value, list | tuple):
            texts = [orjson.dumps(one).decode() if isinstance(one, dict) else str(one) for one in value]
            argv += [flag, *texts] if texts else []
        elif value is not None:
            argv.append(f"{flag}={value}")
    parser = make_parser(_Parser)
    config = config_from(parser.parse_args(argv))
    if config.server != config_from(parser.parse_args([])).server or options.get("log_level") is not None:
        raise StartupError("there is no server here: options of HTTP and of its log have no meaning")
    return config


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and all(isinstance(item, int) for item in prompts)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _each(lora: Any, lora_request: Any, num_prompts: int) -> list[Lora | None]:
    """An adapter, or None, for each prompt."""
    if lora is not None and lora_request is not None:
        raise RequestError("`lora` and `lora_request` are two words for one thing.", param="lora_request")
    given = lora_request if lora is None else lora
    if not isinstance(given, list | tuple):
        return [given] * num_prompts
    if len(given) != num_prompts:
        raise RequestError(f"There are {num_prompts} prompts, but {len(given)} LoRA adapters.", param="lora")
    return list(given)


@contextlib.contextmanager
def _at(index: int, num_prompts: int) -> Iterator[None]:
    """Errors of one prompt among several leave this block with its place."""
    try:
        yield
    except RequestError as error:
        if num_prompts > 1:
            error.args = (f"Prompt {index}: {error}",)
        raise


def _check(delta: Delta) -> None:
    """Raise what ended a request that has not come to its end."""
    if delta.finish_reason is FinishReason.ERROR:
        what = delta.error or "The model failed to compute this request."
        raise RequestError(what) if delta.status == 400 else UnavailableError(what)
    if delta.finish_reason is FinishReason.ABORT:
        raise UnavailableError("The request was aborted.")
