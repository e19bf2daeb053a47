"""Every exception the engine raises on purpose, and who is meant to read it.

An error names what is wrong, the value, and what to do. Our own bugs are `assert`s, not these.
"""

import difflib
from collections.abc import Iterable


class EngineError(Exception):
    """Base of all errors below; catching it catches whatever the engine raises on purpose."""


class ConfigError(EngineError):
    """An option, a model path or a checkpoint that cannot work. Stops the start."""


class PluginError(EngineError):
    """A plugin that is unknown, fails to load, or collides with another. Stops the start."""


class WorkerError(EngineError):
    """The device worker died or could not start. Ends the requests that were in flight."""


class RequestError(EngineError):
    """One request is refused or failed; nothing else is touched.

    `status` is the HTTP status, `code` the machine-readable word of the OpenAI error object, and
    `param` the request field at fault, where there is one.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


def shut_down() -> RequestError:
    """What a request is told that the end of the server ends."""
    message = "the server is shutting down, and has ended this request; send it again, elsewhere or later"
    return RequestError(message, code="draining", status=503)


def let_go(error: BaseException) -> None:
    """Forget where `error`, whose life ends here, came from.

    A traceback leads to the frames of a request, and these often to the error: such a circle holds the whole body until
    the garbage collector comes by.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint that ends an error about an unknown `name`; empty when none of `known` is near (0 to 1: equal)."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
