"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions begin behind that of the padding token."""

from __future__ import annotations

from engine.models.families.bert import DEFAULTS as BERT
from engine.models.families.bert import bert
from engine.models.families.common import read_shape
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: RobertaConfig of transformers, but for vocab_size, which XLMRobertaConfig has as BERT's.
DEFAULTS = {**BERT, "pad_token_id": 1}


def read_spec(fields: Fields) -> ModelSpec:
    """The first tokens of the table of positions are of no token: 512 of 514 are of use."""
    return bert(fields, read_shape(fields, eps="layer_norm_eps", centered=True, bias=True), padded=True)
