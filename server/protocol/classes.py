"""POST /classify and /pooling in vLLM's words: a JSON body becomes prompts and what is wanted of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.models.spec import Classifier
from engine.request import Pooling, RequestError
from server.protocol.body import Body, invalid
from server.protocol.chat import encode_messages
from server.protocol.embeddings import MAX_INPUTS, embedding_of, read_most, with_prompt
from server.protocol.generation import Terms, read_model, read_terms
from server.protocol.prompts import encode_prompts, read_prompts
from server.protocol.refusals import CLASSIFIER_REFUSALS, refuse
from server.protocol.scores import read_raw
from server.protocol.tool_fields import read_tools
from server.state import ServedModel, State

TASKS = ("embed", "classify", "token_embed", "token_classify")


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """activation: what numbers go through. normalize: vectors are scaled to length 1. base64: so they are written."""

    model: str
    prompts: Sequence[Sequence[int]]
    pooling: Pooling
    activation: str
    normalize: bool
    base64: bool
    terms: Terms


def classifier_of(model: ServedModel, *, tokens: bool = False) -> Classifier:
    """The model's classifier. tokens: of tokens and not of texts. Raises the 400 of a model without one."""
    head = model.abilities.classifier
    if head is None or (head.pooling == "all") is not tokens:
        wanted = "ForTokenClassification" if tokens else "ForSequenceClassification"
        raise RequestError(
            f"This model has no classifier of {'tokens' if tokens else 'texts'} ({wanted}).", param="model"
        )
    return head


async def parse_classify(body: Body, state: State) -> PoolingPlan:
    """/classify: `input`, or `messages` as a chat would render them. Raises RequestError."""
    model = read_model(body, state.model)
    head = classifier_of(state.model)
    refuse(body, CLASSIFIER_REFUSALS)
    prompts: Sequence[Sequence[int]]
    if body.has("messages"):
        if body.has("input"):
            raise invalid("input", "and `messages` cannot both be given")
        chat = Body({"messages": body.raw("messages"), "add_generation_prompt": False}, body.size)
        prompts = [(await encode_messages(chat, state, read_tools(chat)))[1]]
    else:
        prompts = await _read_input(body, state)
    activation = "none" if read_raw(body) else head.activation
    pooling = Pooling(head.pooling, classify=True)
    return PoolingPlan(model, prompts, pooling, activation, False, False, read_terms(body, state))


async def parse_pooling(body: Body, state: State) -> PoolingPlan:
    """/pooling: vectors or numbers, of texts or of each of their tokens. Raises RequestError."""
    model, abilities = read_model(body, state.model), state.model.abilities
    refuse(body, CLASSIFIER_REFUSALS)
    task = body.choice("task", TASKS)
    if task is None:
        head = abilities.classifier
        task = "embed" if head is None else "token_classify" if head.pooling == "all" else "classify"
    raw, activation, normalize = read_raw(body), "none", False
    if task in ("classify", "token_classify"):
        head = classifier_of(state.model, tokens=task == "token_classify")
        pooling, activation = Pooling(head.pooling, classify=True), "none" if raw else head.activation
    else:
        pooling = embedding_of(state.model)
        normalize = abilities.normalize and not raw and task == "embed"
        pooling = Pooling("all") if task == "token_embed" else pooling
    base64 = body.choice("encoding_format", ("float", "base64")) == "base64"
    prompts = await _read_input(body, state)
    return PoolingPlan(model, prompts, pooling, activation, normalize, base64, read_terms(body, state))


async def _read_input(body: Body, state: State) -> Sequence[Sequence[int]]:
    body.string("user", None)
    add_special_tokens = body.boolean("add_special_tokens", True)
    given = read_prompts(body, "input", state.model.model_config.vocab_size, MAX_INPUTS)
    if not all(given):
        raise invalid("input", "must not be an empty string")
    given = with_prompt(body, state.model.abilities, given)
    most = read_most(body, state.model.max_model_len)
    return await encode_prompts(state, given, add_special_tokens=add_special_tokens, most=most)
