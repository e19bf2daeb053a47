"""The backend of programs that are given none, and SGLang's name of a server: for programs that were written for it.

    set_default_backend(RuntimeEndpoint("http://127.0.0.1:8000"))
    state = program.run(question="Why?")

It is of the context that sets it: tasks that begin in there and their threads have it, too. Left out: any other
backend of SGLang's; a Server is named with its `api_key` and `model`.
"""

import atexit
from contextvars import ContextVar
from typing import Any

from engine.errors import ConfigError
from engine.lang.server import Server

_BACKEND: ContextVar[Any] = ContextVar("backend of programs", default=None)


def set_default_backend(backend: Any) -> None:
    """Programs that are given no backend run on `backend`, an engine or a server; None takes it back."""
    _BACKEND.set(backend)


def default_backend() -> Any:
    """The one that was set. Raises ConfigError where none was."""
    if (backend := _BACKEND.get()) is None:
        raise ConfigError(
            "the program has no backend; give backend=..., or name one with set_default_backend(...), also "
            "in each thread that you start: it does not have that of others"
        )
    return backend


def RuntimeEndpoint(base_url: str, api_key: str | None = None, **options: Any) -> Server:
    """A Server that is open until the process ends; `options` are its own. Raises ConfigError where none answers."""
    server = Server(base_url, api_key=api_key, **options).__enter__()
    atexit.register(server.__exit__, None, None, None)
    return server
