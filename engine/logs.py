"""Where log lines go and what they look like: one line each on standard error."""

import logging


def set_up_logging(level: str) -> None:
    """Called once in each process of the engine, never by importing it: an embedding program has its own logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("engine")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
