"""The flags of log-probabilities, in vLLM's spelling, -> LogprobOptions."""

from __future__ import annotations

import argparse

from engine.config import LOGPROBS_MODES, LogprobOptions


def add_logprob_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("log-probabilities")
    group.add_argument(
        "--logprobs-mode",
        choices=LOGPROBS_MODES,
        help="of sampled tokens: as the model says them (default), or as they were drawn: after penalties, masks, "
        "temperature and filters. A prompt's are always the former",
    )
    group.add_argument(
        "--max-logprobs",
        type=_most,
        metavar="N",
        help="most alternatives a request may ask for beside each token; -1: as many as there are words (default: 20)",
    )


def logprob_options(args: argparse.Namespace) -> LogprobOptions:
    given = {"mode": args.logprobs_mode, "most": args.max_logprobs}
    return LogprobOptions(**{name: value for name, value in given.items() if value is not None})


def _most(text: str) -> int:
    value = int(text)
    if value < -1:
        raise argparse.ArgumentTypeError("must be at least 0, or -1 for no limit")
    return value
