"""Composition root: flags -> config -> engine -> app -> uvloop.run. `python -m engine.serve --help`.

The only module that knows both the engine and the server. Heavy imports happen after the flags are read, so that
--help and a mistyped flag answer at once.
"""

from __future__ import annotations

import sys
import time

STARTED_AT = time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code: 0 after a clean end, 1 after a failure."""
    import logging

    from engine.config import StartupError
    from engine.flags import parse

    try:
        config, log_level = parse(argv)
        logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        from engine.build import build_engine
        from engine.report import StartupReport

        report = StartupReport(STARTED_AT)
        report.phases["imports"] = report.total_seconds
        built = build_engine(config, report)
    except StartupError as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG) and logging.getLogger().handlers:
            logging.exception("start failed")
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    import uvloop

    from engine.serving import run_server

    return uvloop.run(run_server(config, built))


if __name__ == "__main__":
    sys.exit(main())
