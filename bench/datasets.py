"""Workloads of the load generator: random, shared-prefix, multi-turn and file, as jobs of one or more turns.

Everything is a function of a seed. Prompts are token ids where lengths must be exact (completions), else words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Text or ids of a user's turn, or a whole list of chat messages.
Prompt = str | list[int] | list[dict[str, Any]]

# Short common words; most tokenizers have each of them, with its space, as one token.
_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but"
    " not what all were we when your can said there use an each which she do how their if will up other about out"
    " many then them these so some her would make like him into time has look two more write go see number no way"
    " could people my than first water been call who oil its now find long down day did get come made may part"
)
WORDS = _COMMON.split()


@dataclass(frozen=True, slots=True)
class Job:
    """One conversation: its turns are sent one after another, each with what the server answered before.

    prompt_len: tokens of the first turn as far as known, for servers that report no usage.
    """

    turns: tuple[Prompt, ...]
    output_len: int | None
    prompt_len: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """What synthetic prompts are made of. ids: [low, high) of ordinary tokens, None to write words instead."""

    ids: tuple[int, int] | None = None
    tokens_per_word: float = 1.0

    def prompt(self, rng: np.random.Generator, num_tokens: int) -> list[int] | str:
        """About num_tokens of text, or exactly num_tokens ids."""
        if self.ids is not None:
            ids: list[int] = rng.integers(*self.ids, size=num_tokens).tolist()
            return ids
        count = max(1, round(num_tokens / self.tokens_per_word))
        return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), size=count))

    @staticmethod
    def join(first: list[int] | str, second: list[int] | str) -> list[int] | str:
        """One prompt after another."""
        if isinstance(first, str):
            assert isinstance(second, str)
            return f"{first} {second}" if first and second else first or second
        assert isinstance(second, list)
        return first + second


def safe_ids(vocab_size: int) -> tuple[int, int]:
    """Ids that are ordinary words in the tokenizers we know: special ones stand at one end or the other."""
    return vocab_size // 8, max(vocab_size // 8 + 1, vocab_size * 7 // 8)


def lengths(rng: np.random.Generator, mean: int, range_ratio: float, count: int) -> list[int]:
    """Uniform in mean * (1 - ratio) .. mean * (1 + ratio), both ends included; ratio 0 is always mean."""
    if not 0 <= range_ratio < 1:
        raise ValueError(f"the range ratio must be 0 or more and below 1, got {range_ratio}")
    low, high = int(np.floor(mean * (1 - range_ratio))), int(np.ceil(mean * (1 + range_ratio)))
    sizes: list[int] = rng.integers(max(low, 1), max(high, 1), size=count, endpoint=True).tolist()
    return sizes


def random_jobs(
    source: Source, count: int, *, input_len: int, output_len: int, range_ratio: float = 0.0, seed: int = 0
) -> list[Job]:
    """Prompts that share nothing."""
    rng = np.random.default_rng(seed)
    inputs = lengths(rng, input_len, range_ratio, count)
    outputs = lengths(rng, output_len, range_ratio, count)
    return [Job((source.prompt(rng, size),), output, size) for size, output in zip(inputs, outputs, strict=True)]


def shared_prefix_jobs(
    source: Source,
    count: int,
    *,
    prefix_len: int,
    num_prefixes: int,
    suffix_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    seed: int = 0,
) -> list[Job]:
    """num_prefixes groups of prompts with a common start, as even as they go, in random order."""
    rng = np.random.default_rng(seed)
    prefixes = [source.prompt(rng, prefix_len) for _ in range(num_prefixes)]
    suffixes = lengths(rng, suffix_len, range_ratio, count)
    outputs = lengths(rng, output_len, range_ratio, count)
    groups = rng.permutation(np.arange(count) % num_prefixes)
    return [
        Job((source.join(prefixes[group], source.prompt(rng, size)),), output, prefix_len + size)
        for group, size, output in zip(groups, suffixes, outputs, strict=True)
    ]


def multi_turn_jobs(
    source: Source,
    count: int,
    *,
    num_turns: int,
    input_len: int,
    output_len: int,
    prefix_len: int = 0,
    range_ratio: float = 0.0,
    seed: int = 0,
) -> list[Job]:
    """Conversations of num_turns user turns; prefix_len words of a system prompt are common to all of them."""
    rng = np.random.default_rng(seed)
    words = Source(None, source.tokens_per_word)  # what the server answers is text, so the history is text
    system = words.prompt(rng, prefix_len) if prefix_len else ""
    jobs = []
    for _ in range(count):
        turns = [words.prompt(rng, size) for size in lengths(rng, input_len, range_ratio, num_turns)]
        turns[0] = words.join(system, turns[0])
        [output] = lengths(rng, output_len, range_ratio, 1)
        jobs.append(Job(tuple(turns), output, prefix_len + input_len))
    return jobs


def file_jobs(path: Path, count: int, *, output_len: int | None, num_turns: int = 1, seed: int = 0) -> list[Job]:
    """Jobs of a file: JSON lines or one JSON array. Shuffled by the seed, repeated when there are too few.

    An entry is {"prompt": text or ids}, {"messages": [...]} or ShareGPT's {"conversations": [{"from", "value"}]},
    of which the first num_turns human turns are asked. "output_tokens" or "max_tokens" in it go before output_len.
    """
    text = path.read_text(encoding="utf-8")
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except ValueError as error:
        raise ValueError(f"{path}: neither a JSON array nor JSON lines: {error}") from None
    jobs = [job for entry in entries if entry and (job := _from_entry(entry, path, output_len, num_turns)) is not None]
    if not jobs:
        raise ValueError(f"{path}: holds no prompts")
    order = np.random.default_rng(seed).permutation(len(jobs))
    return [jobs[order[index % len(jobs)]] for index in range(count)]


def _from_entry(entry: Any, path: Path, output_len: int | None, num_turns: int) -> Job | None:
    if isinstance(entry, str):
        return Job((entry,), output_len)
    if isinstance(entry, dict):
        output = entry.get("output_tokens") or entry.get("max_tokens") or output_len
        if isinstance(prompt := entry.get("prompt"), str | list):
            return Job((prompt,), output, len(prompt) if isinstance(prompt, list) else 0)
        if isinstance(messages := entry.get("messages"), list):
            return Job((messages,), output)
        if isinstance(turns := entry.get("conversations", entry.get("conversation")), list):
            asked = _human_turns(turns)[:num_turns]
            return Job(tuple(asked), output) if asked else None
    raise ValueError(f"{path}: an entry has none of prompt, messages and conversations: {str(entry)[:80]}")


def _human_turns(turns: Sequence[Any]) -> list[str]:
    return [turn["value"] for turn in turns if turn.get("from") in ("human", "user") and turn.get("value")]
