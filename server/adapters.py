"""Which LoRA adapter a request is for: its `model`, vLLM's way, or `base:adapter` and `lora_path`, SGLang's.

Weights may have to be read from disk, so what a body names is had as soon as the body is there (`prepare`); the parsers
behind it only look it up. Loop thread, but for the lookups.
"""

from __future__ import annotations

from contextvars import ContextVar

from engine.request import Adapter, UnavailableError
from server.protocol.body import Body, invalid
from server.protocol.errors import ApiError
from server.state import CALLER, ServedModel, State

MAX_NAMES = 16
# Different adapters of one body.
MAX_OF_BODY = 64

# By name: what the body of this task's request needs. Set by `prepare`.
PREPARED: ContextVar[dict[str, Adapter]] = ContextVar("prepared")


def adapter_name(name: str, model: ServedModel) -> str | None:
    """The adapter that a client means by a model's name; None for the model itself, or for nothing that is here."""
    if model.adapters is None or name in model.names:
        return None
    if model.adapters.find(name) is not None:
        return name
    base = next((one for one in model.names if name.startswith(one + ":")), None)
    if base is not None and model.adapters.knows(name[len(base) + 1 :]):
        return name[len(base) + 1 :]
    return name if model.adapters.knows(name) else None


def may_call(name: str) -> bool:
    """Whether the caller's key is for that model, or adapter."""
    owner = CALLER.get().owner
    models = None if owner is None or owner.entry is None else owner.entry.models
    return models is None or name in models


async def prepare(state: State, body: Body) -> None:
    """Have the adapters that a body names. Raises RequestError for one that cannot be used."""
    store = state.engine.adapters
    prepared: dict[str, Adapter] = {}
    PREPARED.set(prepared)
    if store is None:
        return
    wanted = set(_paths(body))
    for given in (body.raw("model"), body.raw("name")):  # the second is Ollama's
        for one in (given, given.removesuffix(":latest")) if isinstance(given, str) else ():
            if (name := adapter_name(one, state.model)) is not None:
                wanted.add(name)
    if len(wanted) > MAX_OF_BODY:
        raise invalid("lora_path", f"must name at most {MAX_OF_BODY} different adapters")
    for name in wanted:
        if may_call(name) and store.knows(name):
            if state.engine.sleep_level:
                raise UnavailableError("The model is asleep; POST /wake_up first.")
            prepared[name] = await store.get(name)


def _paths(body: Body) -> list[str]:
    """The names in `lora_path`; what is none is told of where it is read."""
    value = body.raw("lora_path")
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]


def chosen(body: Body, state: State) -> Adapter | None:
    """The adapter that a body with a known `model` is for. Raises RequestError."""
    given, model = body.raw("model"), state.model
    name = adapter_name(given, model) if isinstance(given, str) else None
    path = body.raw("lora_path")
    if name is None and path not in (None, "", []):
        if not isinstance(path, str):
            raise invalid("lora_path", "must be the name of a LoRA adapter")
        if model.adapters is None:
            raise invalid("lora_path", "needs a server that was started with --enable-lora")
        name = path
        if not may_call(name):
            raise not_there(name, "lora_path", model)
    if name is None:
        return None
    try:
        return PREPARED.get({})[name]
    except KeyError:
        raise not_there(name, "model" if path is None else "lora_path", model) from None


def not_there(name: str, param: str, model: ServedModel) -> ApiError:
    known = model.adapters.names(MAX_NAMES) if model.adapters is not None else ""
    there = f"this server has {known}" if known else "none is loaded"
    return ApiError(
        404, f"The LoRA adapter `{name[:128]}` does not exist; {there}.", param=param, code="model_not_found"
    )
