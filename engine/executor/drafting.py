"""How what drafts comes to be: the method that was asked for, what it cannot go with, and the draft model's weights.

Called once by the start of a device; it may block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from engine.config import SpeculationOptions, StartupError
from engine.executor.start import Start
from engine.forward import Limits
from engine.models.hub import resolve
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM, Decoder
from engine.models.registry import read_spec
from engine.ops.attention.base import AttentionSpec
from engine.speculation import mtp
from engine.speculation.base import Proposer
from engine.speculation.draft import DraftModel
from engine.speculation.eagle3 import Eagle3Head, Target, load_eagle3
from engine.speculation.hidden import HiddenDrafts
from engine.speculation.mtp import MtpHead, check_mtp, load_mtp
from engine.speculation.nets import HeadNet, ModelNet, Net
from engine.speculation.paged import LateProposer, PagedCache, full_group
from engine.speculation.prediction import Prediction
from engine.speculation.registry import PROPOSERS, make_proposer
from engine.speculation.vocabulary import VocabularyMap, map_vocabularies

CPU = torch.device("cpu")


class Drafting(Protocol):
    """What was read, before the sizes of the cache are known. probabilistic: it draws its drafts, where it can."""

    @property
    def probabilistic(self) -> bool: ...

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """That it takes beside the model's."""
        ...

    def make(self, limits: Limits, dtype: torch.dtype) -> tuple[Proposer, LateProposer | None]:
        """What CPUExecutor is given."""
        ...

    def net(self, device: torch.device) -> Net | None:
        """What a CUDAExecutor's drafter runs, behind what clients predict; None where no model drafts."""
        ...

    @property
    def context(self) -> int:
        """Tokens that it can read; 0 where no model drafts."""
        ...


@dataclass(frozen=True, slots=True)
class HostDrafting:
    """A method without a model."""

    options: SpeculationOptions
    probabilistic: bool = False
    context: int = 0

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """See Drafting."""
        return 0

    def make(self, limits: Limits, dtype: torch.dtype) -> tuple[Proposer, LateProposer | None]:
        """See Drafting."""
        return make_proposer(self.options), None

    def net(self, device: torch.device) -> Net | None:
        """See Drafting."""
        return None


@dataclass(frozen=True, slots=True)
class ModelDrafting:
    """A draft model. target: the directory of the model that it drafts for."""

    options: SpeculationOptions
    directory: Path
    target: Path
    vocab_size: int
    model: CausalLM
    context: int

    @property
    def described(self) -> str:
        """For the start's report."""
        return f"{self.directory} ({self.model.config.architecture})"

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """See Drafting."""
        return self.model.attention_spec.kv_bytes_per_token(dtype)

    def make(self, limits: Limits, dtype: torch.dtype) -> tuple[Proposer, LateProposer | None]:
        """See Drafting."""
        cache = _cache(self.model.attention_spec, limits, dtype)
        drafts = DraftModel(
            self.model,
            cache,
            context=self.context,
            vocabulary=self._vocabulary(),
            probabilistic=self.probabilistic,
        )
        return Prediction(), drafts

    def net(self, device: torch.device) -> Net | None:
        """See Drafting."""
        return ModelNet(self.model, self._vocabulary(), device)

    @property
    def probabilistic(self) -> bool:
        """See Drafting."""
        return self.options.draft_sample_method == "probabilistic"

    def _vocabulary(self) -> VocabularyMap | None:
        sizes = self.vocab_size, self.model.config.vocab_size
        return map_vocabularies(self.target, self.directory, sizes, by_strings=self.options.use_vocabulary_map)


@dataclass(frozen=True, slots=True)
class Eagle3Drafting:
    """An EAGLE-3 head."""

    options: SpeculationOptions
    directory: Path
    head: Eagle3Head
    context: int
    probabilistic: bool = False

    @property
    def described(self) -> str:
        """For the start's report."""
        layers = ", ".join(map(str, self.head.aux_layers))
        return f"eagle3, {self.directory}, reads what goes into layers {layers}"

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """See Drafting."""
        return self.head.attention_spec.kv_bytes_per_token(dtype)

    def make(self, limits: Limits, dtype: torch.dtype) -> tuple[Proposer, LateProposer | None]:
        """See Drafting."""
        return Prediction(), HiddenDrafts(
            self.head, _cache(self.head.attention_spec, limits, dtype), context=self.context
        )

    def net(self, device: torch.device) -> Net | None:
        """See Drafting."""
        return HeadNet(self.head)


@dataclass(frozen=True, slots=True)
class MtpDrafting:
    """A layer that the model's own checkpoint brings."""

    directory: Path
    prefix: str
    head: MtpHead
    context: int
    probabilistic: bool = False

    @property
    def described(self) -> str:
        """For the start's report."""
        return f"mtp, {self.directory}, {self.prefix}*"

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """See Drafting."""
        return self.head.attention_spec.kv_bytes_per_token(dtype)

    def make(self, limits: Limits, dtype: torch.dtype) -> tuple[Proposer, LateProposer | None]:
        """See Drafting."""
        return Prediction(), HiddenDrafts(
            self.head, _cache(self.head.attention_spec, limits, dtype), context=self.context
        )

    def net(self, device: torch.device) -> Net | None:
        """See Drafting."""
        return HeadNet(self.head)


def _cache(spec: AttentionSpec, limits: Limits, dtype: torch.dtype) -> PagedCache:
    group = full_group(limits.groups)
    if group is None:
        raise StartupError("a draft model needs a layer that attends to all tokens in the model it drafts for")
    return PagedCache(spec, limits, group, dtype)


def read_drafting(
    given: Start,
    model: CausalLM,
    dtype: torch.dtype,
    *,
    target: mtp.Target | None = None,
    device: torch.device = CPU,
) -> Drafting | None:
    """What config.speculation asks for, and a line of it in the report; None for nothing. Raises StartupError, for what
    the model cannot do, too. target: what stands for the model where it is one rank's part. device: of its weights."""
    options = given.config.speculation
    if options.method is None:
        return None
    if options.method in PROPOSERS:
        return HostDrafting(options)
    with given.report.phase("draft model"):
        drafting = _read(given, model, dtype, target, device)
    given.report.row("draft model", drafting.described)
    return drafting


def _read(
    given: Start, model: CausalLM, dtype: torch.dtype, target: mtp.Target | None, device: torch.device
) -> ModelDrafting | Eagle3Drafting | MtpDrafting:
    options = given.config.speculation
    if options.method == "eagle3":
        return _read_eagle3(given, options, model, dtype, target, device)
    if options.method == "mtp":
        return _read_mtp(given, options, model, dtype, target, device)
    return _read_draft_model(given, options, dtype, device)


def _check_hidden(given: Start, model: CausalLM) -> Decoder:
    """What reads the model's hidden states needs of it."""
    method = given.config.speculation.method
    if given.config.lora.enable:
        raise StartupError(f"speculative decoding ({method}) cannot be used with --enable-lora")
    if type(model) is not Decoder:
        raise StartupError(
            f"speculative decoding ({method}) cannot be used with {given.spec.architecture}: "
            "its layers have several streams"
        )
    return model


def _read_mtp(
    given: Start,
    options: SpeculationOptions,
    model: CausalLM,
    dtype: torch.dtype,
    target: mtp.Target | None,
    device: torch.device,
) -> MtpDrafting:
    decoder = _check_hidden(given, model)
    layout = check_mtp(given.spec, given.directory)
    directory = given.directory
    if options.model is not None:
        directory = resolve(options.model, options.revision, given.config.model.download_dir)
    if given.config.model.load_format == "dummy" and options.model is None:
        raise StartupError("speculative decoding (mtp) needs the model's checkpoint, not --load-format dummy")
    # The layer is like the model's whole ones, of which a rank has a part.
    head = load_mtp(directory, target or decoder, dtype, given.context, device, given.spec.layers)
    return MtpDrafting(directory, layout.prefix, head, given.context)


def _read_eagle3(
    given: Start,
    options: SpeculationOptions,
    model: CausalLM,
    dtype: torch.dtype,
    target: Target | None,
    device: torch.device,
) -> Eagle3Drafting:
    if options.model is None:
        raise StartupError("speculative decoding (eagle3) needs a model: the head's directory or Hugging Face id")
    decoder = _check_hidden(given, model)
    directory = resolve(options.model, options.revision, given.config.model.download_dir)
    head = load_eagle3(directory, target or decoder, dtype, given.context, device)
    return Eagle3Drafting(options, directory, head, given.context)


def _read_draft_model(
    given: Start, options: SpeculationOptions, dtype: torch.dtype, device: torch.device
) -> ModelDrafting:
    if options.model is None:
        raise StartupError("speculative method 'draft_model' needs a model: a directory or a Hugging Face id")
    directory = resolve(options.model, options.revision, given.config.model.download_dir)
    spec = read_spec(directory)
    if spec.bidirectional or spec.headless:
        raise StartupError(f"the draft model {directory} generates no text ({spec.architecture})")
    if spec.has_state:
        raise StartupError(
            f"the draft model {directory} ({spec.architecture}) has a recurrent state, which does not go back behind "
            "a draft that was wrong"
        )
    # Before the weights are read.
    map_vocabularies(
        given.directory,
        directory,
        (given.spec.vocab_size, spec.vocab_size),
        by_strings=options.use_vocabulary_map,
    )
    context = min(given.context, spec.context_length)
    model = load_model(
        spec,
        directory,
        dtype=dtype,
        device=device,
        load_format=given.config.model.load_format,
        seed=1,
        max_model_len=context,
        deterministic=False,
    )
    return ModelDrafting(options, directory, given.directory, given.spec.vocab_size, model, context)
