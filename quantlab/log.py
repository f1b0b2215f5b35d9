"""One logger for the package, and the only place that reads the environment.

Knows nothing about what is logged. User-facing messages are not log lines: the command line writes those itself.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is its `__name__`."""
    return logging.getLogger(name)


def configure(debug: bool) -> None:
    """Send log lines to stderr: warnings of our own, everything with `debug`; QUANTLAB_LOG=info sets the level by hand.

    Libraries' Python warnings become log lines too and are shown with `debug` only: an error must stay one line.
    """
    asked = LEVELS.get(os.environ.get("QUANTLAB_LOG", "").lower())
    level = asked if asked is not None else logging.DEBUG if debug else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    own = logging.getLogger("quantlab")
    own.handlers[:] = [handler]
    own.propagate = False
    own.setLevel(level)
    logging.captureWarnings(True)
    python_warnings = logging.getLogger("py.warnings")
    python_warnings.handlers[:] = [handler]
    python_warnings.propagate = False
    python_warnings.setLevel(logging.WARNING if debug else logging.CRITICAL)


@contextmanager
def timed(log: logging.Logger, what: str) -> Iterator[None]:
    """Log, at level info, the seconds that the block takes."""
    begin = time.perf_counter()
    yield
    log.info("%s: %.2f s", what, time.perf_counter() - begin)


def show_requests() -> None:
    """Let the server's lines about each request through, whatever the level is."""
    logging.getLogger("quantlab.server.generation").setLevel(logging.INFO)


def environment(name: str) -> str | None:
    """The environment variable `name`."""
    return os.environ.get(name)
