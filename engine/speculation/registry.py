"""The proposers of the host, by the name of their method. Called once at start."""

from __future__ import annotations

import importlib

from engine.config import SpeculationOptions
from engine.speculation.base import FirstOf, Proposer
from engine.speculation.prediction import Prediction

# A new method of the host alone is one file with a `make` and one line here.
PROPOSERS = {
    "ngram": "engine.speculation.ngram",
    "suffix": "engine.speculation.suffix",
}


def proposer_of(options: SpeculationOptions) -> Proposer | None:
    """What drafts on the host, if anything does: where a model drafts, what clients predict goes before it."""
    if options.method is None:
        return None
    return make_proposer(options) if options.method in PROPOSERS else Prediction()


def make_proposer(options: SpeculationOptions) -> Proposer:
    """The proposer of a method of PROPOSERS, behind what clients predict."""
    assert options.method in PROPOSERS, options.method
    proposer: Proposer = importlib.import_module(PROPOSERS[options.method]).make(options)
    return FirstOf([Prediction(), proposer])
