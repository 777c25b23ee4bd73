"""For the tests of the models: checkpoints made by transformers, and a runner that drives a model page by page."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executor.tables import PagedMetadata, SlotTables
from engine.forward import ForwardInput, Limits, Staging
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops.attention.base import create_backend
from engine.ops.invariance import promise
from engine.ops.state import States

CPU = torch.device("cpu")
_UNCOUNTED = re.compile(r"vision|visual|projector|connector|e_score_correction_bias|norm\.weight")

# Small, and with no two sizes alike, so that a mixed-up dimension cannot pass.
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **sizes: Any,
) -> Any:
    """Save `{family}ForCausalLM` with random weights; returns transformers' model. Sizes override SIZES."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_towers = ("Gemma3", "Gemma3n", "Gemma4", "Gemma4Unified", "Llama4", "Qwen3_5", "Qwen3_5Moe")
        text = f"{family}Text" if family in with_towers else family
        config_class = getattr(transformers, text + "Config")
        config = config_class(**{**SIZES, **sizes})
        config._attn_implementation = "eager"
        # Classes by another name alone have a config and no model.
        make = getattr(transformers, family + "ForCausalLM", transformers.AutoModelForCausalLM.from_config)
        model = make(config)
        fill(model, seed, offset=0.0 if family in ("Gemma", "Gemma2", "Gemma3") else 1.0)
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
        if dtype != torch.float32:
            # Not model.float(): its rope frequencies have been rounded too.
            model = type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def fill(model: Any, seed: int = 0, *, offset: float) -> None:
    """Random weights that keep activations near size 1. offset: of the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(noise * 0.2 + offset)
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
            if name.endswith("layer_scalar"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; a value of `...` removes the field."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = value
        if value is ...:
            del values[name]
    path.write_text(json.dumps(values))


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    return load_model(read_spec(directory), directory, dtype=dtype, device=CPU, **options)


class Runner:
    """Runs sequences in lockstep through the host structures that an executor uses: staging, tables, metadata."""

    def __init__(
        self,
        model: CausalLM,
        *,
        num_seqs: int = 4,
        max_model_len: int = 256,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        pages = -(-max_model_len // 4)
        snapshots = 0 if model.config.has_state else None
        self.limits = Limits(
            num_seqs, 512, max_model_len, 4, num_seqs * pages, model.config.vocab_size, num_snapshots=snapshots
        )
        self.model = model
        self.staging = Staging(self.limits)
        self.tables = SlotTables(self.limits)
        self.metadata = PagedMetadata(self.limits)
        self.attention = create_backend(
            "torch_paged", model.attention_spec, num_pages=self.limits.num_pages, page_size=4, dtype=dtype
        )
        if model.config.has_state:
            self.attention.states = States(model.config.states, self.limits, dtype, CPU)
        # Every sequence's pages lie scattered over the pool.
        shuffled = np.random.default_rng(0).permutation(num_seqs * pages) + 1
        self.tables.page_table[1:] = shuffled.reshape(num_seqs, pages)
        self.done = [0] * num_seqs

    def step(self, rows: dict[int, list[int]], *, drafts: bool = False) -> Tensor:
        """Feed new tokens of some sequences (number -> ids); the hidden states of all of them, row by row.

        drafts: in rows of several tokens the later ones are some, and `attention.states.settle` is to follow."""
        staging, at = self.staging, 0
        for row, (sequence, ids) in enumerate(rows.items()):
            staging.row_slot[row] = sequence + 1
            staging.row_start[row] = self.done[sequence]
            staging.row_len[row] = len(ids)
            staging.qo_indptr[row] = at
            staging.token_ids[at : at + len(ids)] = ids
            at += len(ids)
            self.done[sequence] += len(ids)
        staging.qo_indptr[len(rows)] = at
        decode = len(rows) if all(len(ids) == 1 for ids in rows.values()) else 0
        forward_input = ForwardInput(
            0, staging, len(rows), decode, at, 0, 0, num_speculating_rows=len(rows) - decode if drafts else 0
        )
        self.metadata.build(forward_input, self.tables)
        self.attention.plan(self.metadata)
        if self.attention.states is not None:
            self.attention.states.begin(forward_input)
        ids = torch.from_numpy(staging.token_ids[:at].copy())
        with torch.inference_mode():
            return self.model.forward(ids, torch.from_numpy(self.metadata.positions.copy()), self.attention)

    def logits(self, ids: list[int], chunk: int) -> Tensor:
        """float32 [len(ids), vocab] of a fresh sequence, its prompt fed in chunks."""
        self.done[0] = 0
        hidden = [self.step({0: ids[at : at + chunk]}) for at in range(0, len(ids), chunk)]
        with torch.inference_mode():
            return self.model.logits(torch.cat(hidden))

    def same_bits(self, ids: list[int]) -> bool:
        """Whether hidden states of a text are the same bits whole and alone, in odd chunks, and beside others."""
        self.done = [0] * len(self.done)
        whole = self.step({0: ids})
        self.done[0] = 0
        cuts = [0, 1, 4, 17, len(ids)]
        chunks = torch.cat([self.step({0: ids[first:last]}) for first, last in itertools.pairwise(cuts)])
        company = []
        for at in range(0, len(ids), 7):
            chunk, other = ids[at : at + 7], ids[at // 2 : at // 2 + 5]
            hidden = self.step({1: other, 2: chunk, 3: other[:1]})
            company.append(hidden[len(other) : len(other) + len(chunk)])
        return torch.equal(whole, chunks) and torch.equal(whole, torch.cat(company))

    def greedy(self, prompts: list[list[int]], count: int, chunk: int) -> list[list[int]]:
        """`count` greedy tokens after each prompt; prompts in chunks, mixed with the decoding of shorter ones."""
        self.done = [0] * len(self.done)
        outputs: list[list[int]] = [[] for _ in prompts]
        while any(len(output) < count for output in outputs):
            rows = {}
            for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
                if len(output) < count:
                    rows[number] = (prompt + output)[self.done[number] :][:chunk]
            hidden = self.step(rows)
            last = np.cumsum([len(ids) for ids in rows.values()]) - 1
            with torch.inference_mode():
                chosen = self.model.logits(hidden[torch.from_numpy(last)]).argmax(dim=-1).tolist()
            for number, token in zip(rows, chosen, strict=True):
                if self.done[number] >= len(prompts[number]):
                    outputs[number].append(token)
        return outputs


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, SIZES["vocab_size"], length).tolist() for length in lengths]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(
    reference: Any,
    directory: Path,
    *,
    lengths: tuple[int, ...] = (21, 34),
    chunk: int = 8,
    new_tokens: int = 64,
    generate: bool = False,
    limit: float = 1e-4,
    **options: Any,
) -> None:
    """Logits to `limit` and greedy continuations token for token, against transformers in float32; where promised,
    the same bits in any company and any chunks.

    generate: the first prompt's continuation comes from transformers' own loop (200 ms); else, and for the
    others, one pass over our continuation must prefer the same token at every place.
    """
    model = load(directory, **options)
    text = [each for name, each in reference.named_parameters() if not _UNCOUNTED.search(name)]
    assert model.config.num_parameters == sum(each.numel() for each in text if each.dim() > 1)
    prompts = prompts_of(list(lengths))
    runner = Runner(model, max_model_len=options.get("max_model_len", 256))
    outputs = runner.greedy(prompts, new_tokens, chunk)
    promised, how = promise(model.linears, model.attention_spec, torch.float32)
    assert not promised or runner.same_bits(prompts[-1] + outputs[-1]), how
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        for prompt, output in zip(prompts, outputs, strict=True):
            text = prompt + output
            expected = reference(torch.tensor([text])).logits[0]
            error = relative_error(runner.logits(text, chunk), expected)
            assert error <= limit, f"logits differ by {error:.1e}"
            assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        if generate:
            ids = torch.tensor([prompts[0]])
            theirs = reference.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
            assert outputs[0] == theirs[0, len(prompts[0]) :].tolist()
