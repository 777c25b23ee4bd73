"""A real model, from its GGUF file and from a directory, against transformers and (where it is) llama.cpp."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.llm import LLM
from engine.request import SamplingParams
from tests.real.smollm2 import PROMPTS, gguf_file, write_directory

TEXT = Path(__file__).with_name("text.txt")
TOKENS = 100
ONE = SamplingParams(temperature=0.0, max_tokens=1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def ours(directory: Path) -> Iterator[tuple[LLM, LLM]]:
    """From the directory and from the file."""
    with LLM(str(directory), dtype="float32") as first, LLM(str(gguf_file()), dtype="float32") as second:
        yield first, second


@pytest.fixture(scope="module")
def prompts(ours: tuple[LLM, LLM]) -> list[list[int]]:
    """The conversations as ids, the same from both."""
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    first, second = ([each.prompt_token_ids for each in llm.chat(chats, ONE)] for llm in ours)
    assert first == second
    return first


@pytest.fixture(scope="module")
def greedy(ours: tuple[LLM, LLM], prompts: list[list[int]]) -> list[list[int]]:
    """Of the directory's weights. Those that stay packed round what goes into them to 16 bits: where two tokens are as
    likely, theirs may be the other one."""
    first, second = ([each.outputs[0].token_ids for each in llm.generate(prompts, GREEDY)] for llm in ours)
    others = [index for index, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    for index in others:
        at = next(at for at, (a, b) in enumerate(zip(first[index], second[index], strict=True)) if a != b)
        text = prompts[index] + second[index][: at + 1]
        [scored] = ours[0].generate([text], replace(ONE, prompt_logprobs=1))
        assert scored.prompt_logprobs is not None
        place = scored.prompt_logprobs[-1]
        assert place.top[0][1] - place.logprob < 0.01, (index, at, place)
    assert len(others) <= len(prompts) // 10, others
    return first


def test_greedy_text_is_that_of_transformers(
    directory: Path, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        for prompt, output in zip(prompts, greedy, strict=True):
            ids = torch.tensor([prompt])
            settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 2}
            given = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **settings)
            assert output == given[0, len(prompt) :].tolist()


def test_ids_are_those_of_the_tokenizer(directory: Path, prompts: list[list[int]]) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    for text, ids in zip(PROMPTS, prompts, strict=True):
        chat = [{"role": "user", "content": text}]
        assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def perplexity(llm: LLM, ids: list[int]) -> float:
    """Of all tokens but the first."""
    [answer] = llm.generate([ids], replace(ONE, prompt_logprobs=0))
    assert answer.prompt_logprobs is not None and len(answer.prompt_logprobs) == len(ids) - 1
    return math.exp(-math.fsum(each.logprob for each in answer.prompt_logprobs) / (len(ids) - 1))


def test_the_file_foretells_a_text_as_its_numbers_do(ours: tuple[LLM, LLM], directory: Path) -> None:
    """Weights that stay packed, and with a cache in eight bits, beside the same weights as floats."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    assert len(ids) > 800
    whole, packed = (perplexity(llm, ids) for llm in ours)
    assert 5 < whole < 50
    assert packed == pytest.approx(whole, rel=0.001)
    with LLM(str(gguf_file()), dtype="float32", kv_cache_dtype="int8") as small:
        assert perplexity(small, ids) == pytest.approx(whole, rel=0.005)


def test_what_llamacpp_says_is_likely(ours: tuple[LLM, LLM], prompts: list[list[int]]) -> None:
    """It rounds what goes into each product to 8 bits, so its texts are others now and then; what it chooses is what
    we find as good as best. Text becomes the same tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(gguf_file()), n_ctx=1024, verbose=False, n_threads=2)
    for text, answer in zip(PROMPTS, ours[1].generate(PROMPTS, ONE), strict=True):
        assert theirs.tokenize(text.encode(), add_bos=False) == answer.prompt_token_ids
    texts = []
    for prompt in prompts:
        theirs.reset()
        tokens = itertools.islice(theirs.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), TOKENS)
        texts.append(prompt + list(tokens))
    scored = [each.prompt_logprobs for each in ours[1].generate(texts, replace(ONE, prompt_logprobs=1))]
    places = [place for logprobs in scored if logprobs is not None for place in logprobs[-TOKENS:]]
    assert len(places) == TOKENS * len(PROMPTS)
    assert max(place.top[0][1] - place.logprob for place in places) < 0.5
    assert sum(place.rank == 1 for place in places) > 0.95 * len(places)
