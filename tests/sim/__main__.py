"""`python -m tests.sim --seed N` repeats one run; `python -m tests.sim --seconds 600` hunts on fresh seeds."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.sim.simulator import SimulationError, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="repeat this one run")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to hunt (default: %(default)s)")
    parser.add_argument(
        "--first", type=int, help="first seed of a hunt; by default the time of day, so that each hunt is new"
    )
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # of pages that do not come
    if arguments.seed is not None:
        # No mercy for the traceback here: whoever repeats a run wants all of it.
        print(simulate(arguments.seed, every=1))
        return 0
    first = seed = arguments.first if arguments.first is not None else int(time.time()) * 1000
    ticks = failures = 0
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        try:
            ticks += simulate(seed).ticks
        except SimulationError as error:
            failures += 1
            print(f"FAILED {error}", file=sys.stderr, flush=True)
            if failures == 10:
                break
        seed += 1
    print(f"{seed - first} runs from seed {first}, {ticks} ticks, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
