"""Every exception the engine raises on purpose, and who is meant to read it.

An error names what is wrong, the value, and what to do. Our own bugs are `assert`s, not these.
"""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType


class EngineError(Exception):
    """Base of all errors below; catching it catches whatever the engine raises on purpose."""


class ConfigError(EngineError):
    """An option, a model path or a checkpoint that cannot work. Stops the start."""


class PluginError(EngineError):
    """A plugin that is unknown, fails to load, or collides with another. Stops the start."""


class WorkerError(EngineError):
    """The device worker died or could not start. Ends the requests that were in flight."""


class ProgramError(EngineError):
    """A program of engine.lang cannot go on, or a value of it will not come. It names the program's line; its cause is
    what went wrong there."""


class RequestError(EngineError):
    """One request is refused or failed; nothing else is touched.

    `status` is the HTTP status, `code` the machine-readable word of the OpenAI error object, and
    `param` our name of the request field at fault, where there is one.

    With `facts`, `message` is a template, "{max_tokens} is {given}; it must be {bound}". A name in braces is one of the
    facts or one of our fields; `worded` writes the fields as the client calls them.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
        facts: Mapping[str, str | int | float] | None = None,
    ) -> None:
        self.template = message
        self.facts = facts
        self.message = message if facts is None else message.format_map(_Filled(facts))
        super().__init__(self.message)
        self.param = param
        self.code = code
        self.status = status

    def worded(self, words: "Words") -> "RequestError":
        """The same error as the client whose API has these `words` is told it."""
        message = self.message
        if self.facts is not None:
            message = self.template.format_map(_Filled({**self.facts, **words.names}))
            if (phrase := words.phrases.get(self.template)) is not None:
                message = phrase.format_map(_Filled({**self.facts, "message": message}))
        if self.status == 400 and words.place not in message and not self._placed(words):
            message = f"{words.place}: {message}"
        param = words.names.get(self.param or "", self.param)
        return RequestError(message, param=param, code=self.code, status=self.status)

    def _placed(self, words: "Words") -> bool:
        """Whether it begins with the path of what is at fault in the client's body, as errors of media do."""
        path = self.param or ""
        known = path not in words.names and ("[" in path or path in words.names.values())
        return known and self.message.startswith(path)


class Words:
    """How one API tells errors: `names` are its names of our fields, and `phrases` its own templates for some of ours,
    in which {message} is what the others say. `place` is the path of the one of several prompts that errors are about,
    which a message that does not name it begins with."""

    def __init__(
        self,
        names: Mapping[str, str] = MappingProxyType({}),
        phrases: Mapping[str, str] = MappingProxyType({}),
        *,
        place: str = "",
    ) -> None:
        self.names = names
        self.phrases = phrases
        self.place = place

    def calling(self, names: Mapping[str, str]) -> "Words":
        """These words, for a client that calls some fields by other `names`."""
        return Words({**self.names, **names}, self.phrases, place=self.place) if names else self

    def at(self, place: str, *fields: str) -> "Words":
        """These words, of the one of several prompts that is at `place`, which is what `fields` of ours are called."""
        return Words({**self.names, **dict.fromkeys(fields, place)}, self.phrases, place=place)


class _Filled(dict[str, str | int | float]):
    """What stands in the braces of a template: a field without another name has its own."""

    def __missing__(self, field: str) -> str:
        return field


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


def counted(count: float, noun: str, plural: str = "") -> str:
    """`count` things by their name: "1 token", "2 tokens", "1 entry", "2 entries" with `plural`."""
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def shown(value: object) -> str:
    """`value` for a message: whole if short, else its beginning."""
    return shortened(repr(value[:80] if isinstance(value, str) else value))


def shortened(text: str, most: int = 80) -> str:
    """`text` for a message, of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint that ends an error about an unknown `name`; empty when none of `known` is near (0 to 1: equal).

    A number is never the hint: one that is unknown is wrong, and not misspelt."""
    words = [each for each in known if not each.isdecimal()]
    near = difflib.get_close_matches(name, words, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
