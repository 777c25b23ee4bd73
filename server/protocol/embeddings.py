"""POST /v1/embeddings: a JSON body becomes prompts and the form of their vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.models.abilities import Abilities
from engine.request import Pooling, RequestError
from server.protocol.body import Body, invalid
from server.protocol.generation import Terms, read_model, read_terms
from server.protocol.prompts import encode_prompts, read_prompts
from server.protocol.refusals import EMBEDDING_REFUSALS, refuse
from server.state import ServedModel, State

MAX_INPUTS = 2048
# What a text may be said to be, and the prompts for it, the first of them that the model has.
INPUT_TYPES = {"query": ("query",), "document": ("document", "passage", "corpus"), "passage": ("passage", "document")}


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """dimensions: numbers of each vector that are answered. normalize: they are scaled to length 1."""

    model: str
    prompts: Sequence[Sequence[int]]
    pooling: Pooling
    dimensions: int
    normalize: bool
    base64: bool
    terms: Terms


async def parse_embedding(body: Body, state: State) -> EmbeddingPlan:
    """Raises RequestError for anything that cannot be served."""
    model, abilities = read_model(body, state.model), state.model.abilities
    pooling = embedding_of(state.model)
    refuse(body, EMBEDDING_REFUSALS)
    body.string("user", None)
    base64 = body.choice("encoding_format", ("float", "base64")) == "base64"
    add_special_tokens = body.boolean("add_special_tokens", True)
    most = read_most(body, state.model.max_model_len)
    given = read_prompts(body, "input", state.model.model_config.vocab_size, MAX_INPUTS)
    if not all(given):
        raise invalid("input", "must not be an empty string")
    given = with_prompt(body, abilities, given)
    return EmbeddingPlan(
        model=model,
        dimensions=_read_dimensions(body, model, abilities),
        normalize=body.boolean("normalize", abilities.normalize),
        terms=read_terms(body, state),
        prompts=await encode_prompts(state, given, add_special_tokens=add_special_tokens, most=most),
        pooling=pooling,
        base64=base64,
    )


def read_most(body: Body, max_model_len: int) -> int | None:
    """`truncate_prompt_tokens`, where -1 is the context."""
    most = body.integer("truncate_prompt_tokens", None, -1, max_model_len)
    if most == 0:
        raise invalid("truncate_prompt_tokens", "must be -1 (the context length) or at least 1")
    return max_model_len if most == -1 else most


def with_prompt(body: Body, abilities: Abilities, given: list[str | list[int]]) -> list[str | list[int]]:
    """Texts behind the prompt of the model's own that `prompt_name` names, or `input_type` as sentence-transformers
    does, or that is its default; ids are taken as they are. Raises RequestError for one that there is not."""
    name = body.string("prompt_name", None)
    kind = body.choice("input_type", tuple(INPUT_TYPES))
    if name is not None and name not in abilities.prompts:
        known = ", ".join(map(repr, abilities.prompts)) or "none"
        raise invalid("prompt_name", f"must be one of the model's own prompts: it has {known}")
    if kind is not None and name is None:
        name = next((each for each in INPUT_TYPES[kind] if each in abilities.prompts), None)
        if name is None:
            raise invalid("input_type", f"needs a model with a prompt for {kind} texts")
    if (name is not None or kind is not None) and not all(isinstance(each, str) for each in given):
        raise invalid("prompt_name" if kind is None else "input_type", "needs texts: token ids are read as they are")
    name = abilities.default_prompt if name is None else name
    prompt = abilities.prompts[name] if name is not None else ""
    return [prompt + each if isinstance(each, str) else each for each in given]


def embedding_of(model: ServedModel) -> Pooling:
    """How the model embeds. Raises the 400 of one that does not."""
    kind = model.abilities.embedding
    if kind is None:
        raise RequestError(
            "This model does not support embeddings: nothing in its directory says how to pool its hidden states. "
            "Start the server with --pooling cls, last, max or mean to do it all the same, or with an embedding model.",
            param="model",
        )
    return Pooling(kind)


def _read_dimensions(body: Body, model: str, abilities: Abilities) -> int:
    wanted = body.integer("dimensions", None, 1)
    if wanted is None:
        return abilities.width
    if abilities.dimensions is None:
        raise RequestError(
            f'Model "{model}" does not support matryoshka representation, changing output dimensions will lead to '
            "poor results.",
            param="dimensions",
        )
    if abilities.dimensions and wanted not in abilities.dimensions:
        raise invalid("dimensions", f"must be one of {', '.join(map(str, abilities.dimensions))} for this model")
    if wanted > abilities.width:
        raise invalid("dimensions", f"must be at most {abilities.width}")
    return wanted
