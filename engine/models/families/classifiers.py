"""Heads of `...ForSequenceClassification` and `...ForTokenClassification`: labels, and what makes a number for each.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from engine.models.fields import Fields, show
from engine.models.spec import Classifier, HeadActivation, ModelSpec, Projection

TEXTS, TOKENS, REWARD = "ForSequenceClassification", "ForTokenClassification", "ForRewardModel"
# More are a typing error.
MAX_LABELS = 100_000
_ACTIVATIONS: dict[str, HeadActivation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
_PROBLEMS: dict[str, Literal["sigmoid", "softmax", "none"]] = {
    "regression": "none",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
Steps = Callable[[Fields, ModelSpec, int], tuple[Projection, ...]]


def _read_labels(fields: Fields) -> tuple[str, ...]:
    """id2label, else num_labels, else two: as transformers has it."""
    table = fields.raw("id2label")
    if table is None:
        count = fields.integer("num_labels", 2, maximum=MAX_LABELS)
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(table, dict) or not 0 < len(table) <= MAX_LABELS:
        fields.fail("id2label", f"must be an object of 1 to {MAX_LABELS} labels, not {show(table)}")
    names = [table.get(str(index)) for index in range(len(table))]
    for index, name in enumerate(names):
        if not isinstance(name, str | int | float):
            fields.fail("id2label", f"has no label for {index}")
    return tuple(map(str, names))


def _pooler(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    """BERT's: the first token, as pretraining had it."""
    return Projection("model.pooler.dense", spec.hidden_size, activation="tanh"), Projection("classifier", count)


def _roberta(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    dense = Projection("classifier.dense", spec.hidden_size, activation="tanh")
    return dense, Projection("classifier.out_proj", count)


def _distilbert(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    return Projection("pre_classifier", spec.hidden_size, activation="relu"), Projection("classifier", count)


def _modernbert(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    activation = _ACTIVATIONS[fields.choice("classifier_activation", _ACTIVATIONS, "gelu")]
    assert spec.final_norm is not None
    norm = dataclasses.replace(spec.final_norm, name="head.norm")
    bias = fields.flag("classifier_bias", False)
    dense = Projection("head.dense", spec.hidden_size, bias=bias, activation=activation, norm=norm)
    return dense, Projection("classifier", count)


def _eurobert(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    return Projection("dense", spec.hidden_size, activation="gelu"), Projection("classifier", count)


def _score(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    return (Projection("score", count, bias=False),)


def _score_with_bias(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    return (Projection("score", count),)


def _reward(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    return Projection("score.0", spec.hidden_size, activation="relu"), Projection("score.2", count)


def _plain(fields: Fields, spec: ModelSpec, count: int) -> tuple[Projection, ...]:
    return (Projection("classifier", count),)


# By the class's name without what it is for; any other is a decoder.
_HEADS: dict[str, tuple[Steps, Steps]] = {
    "Bert": (_pooler, _plain),
    "Camembert": (_roberta, _plain),
    "DistilBert": (_distilbert, _plain),
    "EuroBert": (_eurobert, _plain),
    "Gte": (_pooler, _plain),
    "ModernBert": (_modernbert, _modernbert),
    "New": (_pooler, _plain),
    "NomicBert": (_pooler, _plain),
    "Roberta": (_roberta, _plain),
    "XLMRoberta": (_roberta, _plain),
}


def read_classifier(fields: Fields, stem: str, task: str, spec: ModelSpec) -> Classifier:
    """stem: the class without its task. Raises StartupError."""
    labels = ("reward",) if task == REWARD and not _says_labels(fields) else _read_labels(fields)
    late, pooling = False, "cls" if stem in _HEADS else "last"
    if task == TOKENS:
        pooling = "all"
    elif stem == "ModernBert":
        pooling = fields.choice("classifier_pooling", ("cls", "mean"), "cls")
    elif stem == "EuroBert":
        given = fields.choice("classifier_pooling", ("bos", "mean", "late"), "late")
        pooling, late = ("cls" if given == "bos" else "mean"), given == "late"
    texts, tokens = _HEADS.get(stem, (_score, _score_with_bias))
    if task == REWARD:
        texts = _reward
    steps = (tokens if task == TOKENS else texts)(fields, spec, len(labels))
    one = "none" if task == REWARD else "sigmoid"
    activation: Any = _read_activation(fields) or (one if len(labels) == 1 else "softmax")
    kind: Any = pooling
    return Classifier(kind, labels, steps, activation, late)


def _says_labels(fields: Fields) -> bool:
    return fields.has("id2label") or fields.has("num_labels")


def _read_activation(fields: Fields) -> str | None:
    """What the file says of the function that the head's numbers go through: sentence-transformers' word, in either of
    its forms, before transformers'."""
    nested = fields.nested("sentence_transformers")
    given = nested.raw("activation_fn") if nested is not None else fields.raw("sbert_ce_default_activation_function")
    if given is not None:
        known = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
        name = given.rsplit(".", 1)[-1] if isinstance(given, str) else ""
        if name not in known:
            fields.fail("sentence_transformers.activation_fn", f"({show(given)}) must be one of {', '.join(known)}")
        return known[name]
    if fields.has("problem_type"):
        return _PROBLEMS[fields.choice("problem_type", _PROBLEMS)]
    return None
