"""Where log lines go and what they look like: one line each on standard error."""

import logging
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # of the request that the code at hand is about


def set_up_logging(level: str, who: str = "") -> None:
    """Called once in each process of the engine, never by importing it: an embedding program has its own logging. `who`
    tells the lines of this process from those of others of its kind."""
    handler = logging.StreamHandler()
    handler.addFilter(add_request_id)
    sender = f"%(name)s {who}: " if who else "%(name)s: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {sender}%(request)s%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("engine")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def add_request_id(record: logging.LogRecord) -> bool:
    """Give `record` a field `request`: the id of the request in brackets, or nothing. A filter that keeps all."""
    id = REQUEST_ID.get()
    record.request = f"[{id}] " if id else ""
    return True
