"""Speculating rows of the CPU executor: tokens and log-probabilities are the bits of decoding, whatever was drafted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import SpeculationOptions
from engine.executor.base import Executor, StepHandle
from engine.executor.cpu import CPUExecutor
from engine.forward import (
    FUTURE_TOKEN,
    ForwardInput,
    ForwardOutput,
    Limits,
    RowExtras,
    RowSpeculation,
    TokenMasks,
)
from engine.models.loading.adapted import AdaptedLayers
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.request import SamplingParams
from engine.speculation.base import OneByOne, Proposer, Text
from engine.speculation.draft import DraftModel
from engine.speculation.paged import LateProposer, PagedCache
from engine.speculation.prediction import Prediction
from engine.speculation.registry import make_proposer
from engine.speculation.vocabulary import VocabularyMap
from tests.executor.cpu_adapter import CPUAdapter, _models
from tests.executor.driver import write_sampling_row
from tests.lora.handmade import factors, write
from tests.lora.support import read

VOCAB, NEW, PAGE = 211, 24, 4
GREEDY, SEEDED = {"temperature": 0.0}, {"temperature": 1.2}
# Prompts repeat themselves, so that there is something to find.
PROBES: list[dict[str, Any]] = [
    {**GREEDY, "logprobs": 2},
    {**SEEDED, "seed": 5, "logprobs": 0},
    {**SEEDED, "seed": 6, "top_p": 0.7, "top_k": 20, "min_p": 0.01},
    {**GREEDY, "repetition_penalty": 1.6, "frequency_penalty": 0.4, "presence_penalty": -0.3, "logprobs": 3},
    {**SEEDED, "seed": 7, "frequency_penalty": 1.5, "logit_bias": ((5, 4.0), (9, 5.0), (11, -100.0))},
    {**GREEDY, "bad_words": ((3,), (5, 7), (17, 4, 9)), "logit_bias": ((7, 9.0), (5, 9.5), (9, 8.0), (4, 8.8))},
    {**SEEDED, "seed": 8, "allowed_token_ids": tuple(range(40, 52)), "logprobs": 4, "min_tokens": 9},
    {**GREEDY, "masked": True, "logprobs": 1},
    {**SEEDED, "seed": 9, "masked": True, "presence_penalty": 1.0},
]


class Oracle(OneByOne):
    """Drafts the true continuation, each token wrong with a probability, by a seed."""

    def __init__(self, answers: dict[int, list[int]], wrong: float) -> None:
        self._answers, self._wrong = answers, wrong
        self._generator = np.random.default_rng(2)
        self._texts: dict[int, tuple[Text, int]] = {}

    def start(self, slot: int, text: Text) -> None:
        self._texts[slot] = text, len(text.tokens)

    def stop(self, slot: int) -> None:
        del self._texts[slot]

    def advance(self, slot: int, kept: int) -> None:
        assert kept <= len(self._texts[slot][0].tokens)

    def draft(self, slot: int, most: int) -> list[int]:
        text, prompt = self._texts[slot]
        done = len(text.tokens) - prompt
        right = self._answers.get(slot, [])[done : done + most]
        noise = self._generator.integers(0, VOCAB, len(right)).tolist()
        keep = self._generator.random(len(right)) >= self._wrong
        return [one if good else other for one, other, good in zip(right, noise, keep, strict=True)]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[Any, ...]] = field(default_factory=list)

    def seen(self) -> tuple[list[int], list[tuple[Any, ...]]]:
        return self.tokens[:NEW], self.logprobs[:NEW]


def allowed_at(position: int) -> np.ndarray:
    """A grammar that knows only how long the text is."""
    bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
    bits[np.arange(position % 3, VOCAB, 3)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def prompt_of(index: int) -> list[int]:
    pattern = np.random.default_rng(index).integers(3, VOCAB, 5 + index % 3).tolist()
    return (pattern * 4)[: 11 + index]


@dataclass
class Script:
    """A scheduler that does one thing: all prompts, then rows until everybody has its tokens. depth 2: a step is
    launched before the one ahead of it is known."""

    model: CausalLM
    dtype: torch.dtype
    proposer: Proposer | None = None
    most: int = 0
    depth: int = 1
    predictions: dict[int, list[int]] = field(default_factory=dict)
    make_late: Callable[[Limits], LateProposer] | None = None
    # Read ones; a probe has none, or one of them, in turn.
    adapters: list[Any] = field(default_factory=list)
    processed: bool = False  # log-probabilities as tokens are drawn
    num_accepted: int = 0
    num_drafted: int = 0

    def make(self, limits: Limits, late: LateProposer | None) -> Executor:
        return CPUExecutor(self.model, limits, dtype=self.dtype, proposer=self.proposer, late=late)

    async def run(self, probes: list[int]) -> dict[int, Answer]:
        slots = {index: place for place, index in enumerate(probes, 1)}
        width = 96 // PAGE
        limits = Limits(
            *(len(PROBES), 512, 96, PAGE, len(PROBES) * width, VOCAB),
            max_draft_tokens=self.most,
            max_adapters=len(self.adapters),
            processed_logprobs=self.processed,
        )
        late = None if self.make_late is None else self.make_late(limits)
        executor = self.make(limits, late)
        generator = np.random.default_rng(self.most)
        answers = {index: Answer() for index in probes}
        known: dict[int, int] = {}  # tokens computed, of every probe
        flying: list[tuple[StepHandle, list[tuple[int, int]], TokenMasks | None]] = []
        number = 0
        try:
            while flying or not number or min(len(answer.tokens) for answer in answers.values()) < NEW:
                done = number and min(len(answer.tokens) for answer in answers.values()) >= NEW
                if not done and len(flying) < self.depth:
                    handle, rows, masks = self._launch(executor, number, slots, known, flying, generator)
                    flying.append((handle, rows, masks))
                    number += 1
                    if len(flying) < self.depth:
                        continue
                handle, rows, masks = flying.pop(0)
                self._fill(masks, rows, known)
                executor.provide_masks(handle)
                output = await executor.wait(handle)
                self._commit(output, rows, known, answers)
        finally:
            for _, _, masks in flying:
                if masks is not None:
                    masks.release()
            executor.close()
        return answers

    def _launch(
        self,
        executor: Executor,
        number: int,
        slots: dict[int, int],
        known: dict[int, int],
        flying: list[Any],
        generator: np.random.Generator,
    ) -> tuple[StepHandle, list[tuple[int, int]], TokenMasks | None]:
        staging = executor.staging[number % 2]
        width = executor.limits.max_pages_per_seq
        speculations, extras = [], []
        diffs = changed = 0
        rows: list[tuple[int, int]] = []
        staging.qo_indptr[0] = at = 0
        for row, (index, slot) in enumerate(slots.items()):
            params = SamplingParams(**{key: value for key, value in PROBES[index].items() if key != "masked"})
            prompt = prompt_of(index)
            if number == 0:
                ids, start = prompt, 0
                pages = np.arange(width) + 1 + (slot - 1) * width
                staging.table_index[diffs : diffs + width] = slot * width + np.arange(width)
                staging.table_page[diffs : diffs + width] = pages
                diffs += width
                staging.sampling_slot[changed] = slot
                staging.adapter[changed] = index % (1 + len(self.adapters))
                write_sampling_row(staging.sampling[changed], params, len(prompt) + params.min_tokens)
                changed += 1
                history = np.array(prompt, np.int32)
                if params.has_extras:
                    names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
                    names += ("allowed_token_ids", "bad_words", "logprobs", "prompt_logprobs")
                    values = {name: getattr(params, name) for name in names}
                    extras.append(RowExtras(slot=slot, history=history, num_prompt_tokens=len(prompt), **values))
                if self.most:
                    predicted = self.predictions.get(index)
                    prediction = None if predicted is None else np.array(predicted, np.int32)
                    speculations.append(RowSpeculation(slot, history, prediction, ""))
            else:
                start = known.get(index, 0) + sum(dict(each).get(index, 0) for _, each, _ in flying)
                budget = int(generator.integers(self.most + 1)) if self.most else 0
                # Those that are through go on, for company.
                ids = [FUTURE_TOKEN] * (1 if start - len(prompt) > NEW else 1 + budget)
            staging.row_slot[row], staging.row_start[row], staging.row_len[row] = slot, start, len(ids)
            staging.row_samples[row] = True
            staging.token_ids[at : at + len(ids)] = ids
            at += len(ids)
            staging.qo_indptr[row + 1] = at
            rows.append((index, len(ids)))
        lengths = [1 if number == 0 else length for _, length in rows]
        constrained = [row for row, (index, _) in enumerate(rows) if "masked" in PROBES[index]]
        constrained = [row for row in constrained for _ in range(lengths[row])]
        masks = TokenMasks(constrained, VOCAB) if constrained else None
        step = ForwardInput(
            *(
                number,
                staging,
                len(rows),
                0 if self.most or not number else len(rows),
                at,
                diffs,
                changed,
                extras,
                masks,
            ),
            num_speculating_rows=len(rows) if self.most and number else 0,
            speculations=speculations,
            adapter_loads=list(enumerate(self.adapters, 1)) if number == 0 else [],
        )
        return executor.submit(step), rows, masks

    def _fill(self, masks: TokenMasks | None, rows: list[tuple[int, int]], known: dict[int, int]) -> None:
        if masks is None:
            return
        nth = np.arange(len(masks.rows)) - np.searchsorted(masks.rows, masks.rows)
        for place, (row, offset) in enumerate(zip(masks.rows.tolist(), nth.tolist(), strict=True)):
            index = rows[row][0]
            length = known[index] + 1 if index in known else len(prompt_of(index))
            masks.bits[place] = allowed_at(length + offset)
        masks.release()

    def _commit(
        self, output: ForwardOutput, rows: list[tuple[int, int]], known: dict[int, int], answers: dict[int, Answer]
    ) -> None:
        for row, (index, length) in enumerate(rows):
            if output.accepted is None:
                new = [int(output.token_ids[row])]
                known[index] = known.get(index, 0) + length
            else:
                accepted = output.accepted
                count = int(accepted.counts[row])
                new = accepted.tokens[row, :count].tolist()
                assert output.token_ids[row] == new[-1]
                assert 1 <= count <= 1 + int(accepted.num_drafted[row]) <= length
                assert (accepted.tokens[row, count:] == -1).all()
                known[index] += count
                self.num_accepted += count - 1
                self.num_drafted += int(accepted.num_drafted[row])
            answers[index].tokens += new
        if output.logprobs is not None:
            found = output.logprobs
            for place, row in enumerate(found.rows.tolist()):
                index = rows[row][0]
                k = PROBES[index]["logprobs"]
                figures = (found.token_logprobs[place], found.ranks[place])
                tops = found.top_ids[place, :k].tolist(), found.top_logprobs[place, :k].tolist()
                answers[index].logprobs.append((*map(float, figures), *tops))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def model_of(dtype: torch.dtype) -> CausalLM:
    _models()
    directory = CPUAdapter().checkpoint()
    return load_model(read_spec(directory), directory, dtype=dtype, device=torch.device("cpu"), deterministic=True)


_plain: dict[torch.dtype, dict[int, Answer]] = {}


async def plain(dtype: torch.dtype) -> dict[int, Answer]:
    """What decoding says, each alone."""
    if dtype not in _plain:
        _plain[dtype] = {}
        for index in range(len(PROBES)):
            _plain[dtype] |= await Script(model_of(dtype), dtype).run([index])
    return _plain[dtype]


def options(method: str, **values: Any) -> SpeculationOptions:
    return SpeculationOptions(method=method, prompt_lookup_min=2, prompt_lookup_max=4, **values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("proposer", "most", "depth", "alone"),
    [
        ("right", 4, 2, False),
        ("right", 8, 1, True),
        ("half", 1, 1, False),
        ("half", 3, 2, False),
        ("half", 8, 2, False),
        ("random", 5, 2, False),
        ("ngram", 4, 2, False),
        ("suffix", 6, 1, False),
        ("prediction", 7, 2, False),
    ],
)
async def test_bits_are_those_of_decoding(
    dtype: torch.dtype, proposer: str, most: int, depth: int, alone: bool
) -> None:
    expected = await plain(dtype)
    everybody = list(range(len(PROBES)))
    groups = [[index] for index in everybody] if alone else [everybody]
    for group in groups:
        made: Proposer
        if proposer in ("ngram", "suffix", "prediction"):
            made = make_proposer(options("suffix" if proposer == "suffix" else "ngram"))
        else:
            answers = {slot: expected[index].tokens for slot, index in enumerate(group, 1)}
            made = Oracle(answers, {"right": 0.0, "half": 0.4, "random": 1.0}[proposer])
        script = Script(model_of(dtype), dtype, made, most, depth)
        if proposer == "prediction":
            # Two tokens before what will come, and one among it, are not of the answer.
            for index in group:
                tokens = expected[index].tokens
                script.predictions[index] = [1, 2, *tokens[:9], 1, *tokens[9:]]
        found = await script.run(group)
        for index in group:
            assert found[index].seen() == expected[index].seen(), index
        if proposer in ("right", "half", "prediction"):
            assert script.num_accepted > 0
            assert (script.num_accepted == script.num_drafted) == (proposer == "right")


class Shuffled:
    """A model whose token ids are others."""

    def __init__(self, model: CausalLM, order: np.ndarray) -> None:
        self._model, self._order = model, torch.from_numpy(order)
        self.attention_spec = model.attention_spec

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attention: Any) -> torch.Tensor:
        return self._model.forward(self._order[ids.long()].int(), positions, attention)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)[:, self._order]


async def test_log_probabilities_as_tokens_are_drawn_are_those_of_decoding() -> None:
    dtype, everybody = torch.float32, list(range(len(PROBES)))
    expected = await Script(model_of(dtype), dtype, processed=True).run(everybody)
    raw = await plain(dtype)
    assert [one.tokens[:NEW] for one in expected.values()] == [raw[index].tokens[:NEW] for index in everybody]
    assert expected[1].logprobs != raw[1].logprobs
    oracle = Oracle({slot: expected[index].tokens for slot, index in enumerate(everybody, 1)}, 0.4)
    script = Script(model_of(dtype), dtype, oracle, 3, 2, processed=True)
    found = await script.run(everybody)
    assert script.num_accepted
    for index in everybody:
        assert found[index].seen() == expected[index].seen(), PROBES[index]


@pytest.mark.parametrize("kind", ["greedy", "probabilistic", "shuffled", "short"])
async def test_draft_model(kind: str) -> None:
    """The model drafts for itself: where its cache is right, so is every draft."""
    model, dtype = model_of(torch.float32), torch.float32
    expected = await plain(dtype)
    order = np.random.default_rng(0).permutation(VOCAB)
    vocabulary = VocabularyMap(order.astype(np.int32), np.argsort(order).astype(np.int32))

    def make(limits: Limits) -> LateProposer:
        drafting: Any = Shuffled(model, order) if kind == "shuffled" else model
        return DraftModel(
            drafting,
            PagedCache(model.attention_spec, limits, 0, dtype),
            context=20 if kind == "short" else 96,
            vocabulary=vocabulary if kind == "shuffled" else None,
            probabilistic=kind == "probabilistic",
        )

    # Greedy and sampled ones whose logits nothing changes; then everybody.
    for group in ([0], [1, 2] if kind == "probabilistic" else [0], list(range(len(PROBES)))):
        script = Script(model, dtype, Prediction(), 5, 2, make_late=make)
        found = await script.run(group)
        for index in group:
            assert found[index].seen() == expected[index].seen(), index
        assert script.num_accepted > 0
        if len(group) <= 2:
            assert script.num_accepted == script.num_drafted


async def test_adapters(tmp_path: Path) -> None:
    """Positions of one row have its adapter; drafts come without."""
    _models()
    directory = CPUAdapter().checkpoint()
    spec, dtype = read_spec(directory), torch.float32
    model = load_model(spec, directory, dtype=dtype, device=torch.device("cpu"), deterministic=True, max_adapters=2)
    assert isinstance(model.adapted, AdaptedLayers)
    adapters = [read(write(tmp_path / str(rank), factors(model.adapted, rank, rank), r=rank), model) for rank in (2, 5)]
    everybody = list(range(len(PROBES)))
    expected: dict[int, Answer] = {}
    for index in everybody:
        expected |= await Script(model, dtype, adapters=adapters).run([index])
    assert expected[1].tokens != (await plain(dtype))[1].tokens
    assert expected[0].seen() == (await plain(dtype))[0].seen()
    answers = {slot: expected[index].tokens for slot, index in enumerate(everybody, 1)}
    script = Script(model, dtype, Oracle(answers, 0.3), 4, 2, adapters=adapters)
    found = await script.run(everybody)
    for index in everybody:
        assert found[index].seen() == expected[index].seen(), index
    assert 0 < script.num_accepted < script.num_drafted
