"""What the start of every device is given, and does alike: reading the weights, now and later, planning for states.

Made by the composition root, used by cpu_start.py and cuda_start.py.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import CacheOptions, EngineConfig, SchedulerOptions, StartupError
from engine.forward import Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.quantisation import rounded_to
from engine.models.registry import differing_field, read_spec
from engine.models.spec import ModelSpec, difference
from engine.report import StartupReport

# Snapshots of recurrent states, or one for every sequence where those are more.
MOST_SNAPSHOTS = 128


@dataclass(frozen=True, slots=True)
class Start:
    """spec: of the model in `directory`. context: tokens that a sequence may have."""

    config: EngineConfig
    directory: Path
    spec: ModelSpec
    context: int
    report: StartupReport

    def loader(self, **options: Any) -> Callable[[Path | None], CausalLM]:
        """What reads the model: from `directory`, and later from others that hold the same one with other weights.

        options: of load_model.
        """

        def load(other: Path | None) -> CausalLM:
            load_format = self.config.model.load_format
            if other is not None:
                load_format = "auto"
                self._refuse_another(other)
            return load_model(
                self.spec,
                other or self.directory,
                load_format=load_format,
                seed=self.config.model.seed or 0,
                progress=show_progress(),
                max_model_len=self.context,
                quantisation=rounded_to(
                    self.config.model.quantization, self.spec.quantisation, given=str(self.directory)
                ),
                packed_input_bits=self.config.model.packed_input_bits,
                **options,
            )

        return load

    def _refuse_another(self, directory: Path) -> None:
        # Whether the output layer is used is ours to say.
        theirs = dataclasses.replace(
            read_spec(directory),
            headless=self.spec.headless,
            assumed=self.spec.assumed,
            projections=self.spec.projections,
        )
        if (name := difference(theirs, self.spec)) is not None:
            name = differing_field(self.directory, directory) or name
            where = directory / "config.json" if directory.is_dir() else directory
            raise StartupError(f"{where} is of another model: {name} differs")

    def report_input_bits(self, model: CausalLM) -> None:
        """Whose inputs are of eight bits, where that was asked for. Raises StartupError where none are."""
        if self.config.model.packed_input_bits == 16:
            return
        narrow = sum(linear.input_bits == 8 for linear in model.linears)
        if not narrow:
            raise StartupError(
                "--packed-input-bits 8: no matrix of this model stays packed in a form that has products of bytes"
            )
        self.report.row("inputs", f"of 8 bits for {narrow} of {len(model.linears)} matrices, in blocks of 32")

    def plan_held(self, sequences: int, each: int) -> int:
        """Bytes, and a line about them, of what layers with a state keep of rows with drafts until the end of a step:
        `each` of a token."""
        drafts = self.config.speculation.num_draft_tokens
        tokens = min(self.config.scheduler.max_num_batched_tokens, sequences * (1 + drafts))
        self.report.row("states of drafts", f"{_size(each)} a token: up to {_size(tokens * each)} while a step runs")
        return tokens * each

    def report_output_layer(self, model: CausalLM) -> None:
        """Where the checkpoint knew better than config.json."""
        if model.config.tie_word_embeddings != self.spec.tie_word_embeddings:
            self.report.row(
                "output layer", "the checkpoint's own: it differs from the embedding, though config.json ties them"
            )


def show_progress() -> Callable[[int, int], None]:
    """A progress bar for weights, on stderr; where that is no terminal a line from time to time, as a log has them."""
    if not sys.stderr.isatty():
        return _ProgressLines().tell
    from tqdm import tqdm

    bar: tqdm | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, file=sys.stderr, mininterval=0.2)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return progress


class _ProgressLines:
    EVERY_S = 10.0

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        """Bytes."""
        if done < total and time.monotonic() - self._told_at >= self.EVERY_S:
            self._told_at = time.monotonic()
            print(f"Loading weights: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)


def encoder_limits(options: SchedulerOptions, context: int, vocab_size: int, max_adapters: int = 0) -> Limits:
    """Of a model that keeps nothing. To the scheduler a text is less than a page, so one step computes all of it, for
    chunks end where pages do. Pages are mere numbers here, and there are enough for all that run and all that leave."""
    assert context <= options.max_num_batched_tokens, "a step must hold a whole text"
    return Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=context,
        page_size=context + 1,
        num_pages=4 * options.max_num_seqs + 1,
        vocab_size=vocab_size,
        max_adapters=max_adapters,
    )


def plan_states(each: int, cache: CacheOptions, max_num_seqs: int, share: int) -> tuple[int, int]:
    """Sequences and snapshots that have a recurrent state of `each` bytes. Raises StartupError.

    share: bytes of memory for the KV cache where no number of them was asked for. The states of sequences are at most
    half of it, snapshots a quarter. Where max_num_seqs is what it is without being asked for, fewer sequences are
    better than no start.
    """
    budget = share if cache.kv_cache_bytes is None else cache.kv_cache_bytes
    fitting = budget // 2 // each
    if max_num_seqs == SchedulerOptions().max_num_seqs:
        max_num_seqs = max(1, min(max_num_seqs, fitting))
    if max_num_seqs > fitting:
        raise StartupError(
            f"the recurrent states of --max-num-seqs {max_num_seqs} take {_size(max_num_seqs * each)}, {_size(each)} a "
            f"sequence, and half of {_size(budget)} is for them: "
            + (f"{fitting} would fit" if fitting else "not one fits; --kv-cache-gb gives them more")
        )
    if not cache.enable_prefix_caching:
        return max_num_seqs, 0
    return max_num_seqs, min(max(MOST_SNAPSHOTS, max_num_seqs), budget // 4 // each)


def describe_states(each: int, sequences: int, snapshots: int, asked: int) -> str:
    """The line that says what they take."""
    text = f"{_size(each)} a sequence: up to {_size((sequences + snapshots) * each)} for {sequences} sequences"
    if sequences < asked:
        text += f" (not {asked}: no more fit in half of the KV cache's memory)"
    return f"{text} and {snapshots} snapshots, from which the prefix cache goes on"


def _size(count: int) -> str:
    """Bytes for a reader."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count} bytes"
