"""What a row of the table of sampling fields is made of: a kind of value, with its bounds, and the names of each API.

A kind says what a field holds, in words and as a range, and what a body has in its place; it refuses other values.
`table_of` reads the rows from a struct's annotations. A request meets them as `Checker`, the checks, and as `Api`, the
fields in one API's bodies. Left out: which fields there are; sampling.py declares them.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import Struct

from engine.errors import RequestError, shown
from engine.params.expressions import check_expression, refusal

INT32_MAX = 2**31 - 1
MAX_STOP_LENGTH = 1024


# ── what a field may hold ────────────────────────────────────────────────────────────────────


class Real(Struct, frozen=True):
    """A number from `low`, or if `above` from just above it, to `high`; `off` tells which value changes nothing."""

    low: float
    high: float
    off: str
    above: bool = False
    body: Any = float | None

    @property
    def range(self) -> dict[str, float]:
        return {"exclusiveMinimum" if self.above else "minimum": self.low, "maximum": self.high}

    @property
    def holds(self) -> str:
        bound = f"above {self.low:g} and at most {self.high:g}" if self.above else f"from {self.low:g} to {self.high:g}"
        return f"a number {bound}"

    def check(self, field: str, value: Any, params: Any = None) -> None:
        # The comparison is written so that NaN fails it.
        good = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        if not good or (self.above and value == self.low):
            plain = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
            raise refusal(field, shown(int(value) if plain else value), self.holds, self.off)


class Whole(Struct, frozen=True):
    """A whole number from `low` to `high`; `within`, if it is there, finds both in the rest of the request."""

    low: int
    high: int
    off: str
    within: Callable[[Any], tuple[int, int]] | None = None
    body: Any = int | None

    @property
    def range(self) -> dict[str, float]:
        return {"minimum": self.low, "maximum": self.high}

    @property
    def holds(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def check(self, field: str, value: Any, params: Any = None) -> None:
        low, high = (self.low, self.high) if self.within is None or params is None else self.within(params)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refusal(field, shown(value), f"a whole number from {low} to {high}", self.off)


class Switch(Struct, frozen=True):
    """true or false."""

    body: Any = bool | None

    @property
    def holds(self) -> str:
        return "true or false"

    def check(self, field: str, value: Any, params: Any = None) -> None:
        if not isinstance(value, bool):
            raise refusal(field, shown(value), self.holds, "leave it out for the default")


class Texts(Struct, frozen=True):
    """At most so many strings, none of them empty; `sought` are looked for in the reply's text."""

    most: int
    body: Any = list[str] | None
    sought: bool = False

    @property
    def holds(self) -> str:
        return f"at most {self.most} strings"

    def check(self, field: str, value: Any, params: Any = None) -> None:
        if isinstance(value, str) or len(value) > self.most:
            given = shown(value) if isinstance(value, str) else f"{len(value)} strings"
            raise refusal(field, given, f"a list of at most {self.most} strings", "send fewer")
        for text in value:
            if not isinstance(text, str) or not text:
                remedy = f"leave {{{field}}} out, or the empty one"
                raise refusal(field, shown(text), "strings, none of them empty", remedy)
            if len(text) > MAX_STOP_LENGTH:
                bound = f"strings of at most {MAX_STOP_LENGTH}"
                raise refusal(field, f"a string of {len(text)} characters", bound, "send a shorter one")
        if self.sought and value and params is not None and not params.detokenize:
            message = f"detokenize is false and {{{field}}} is given, which is looked for in the text; send "
            raise RequestError(f"{message}stop_token_ids", param=field, facts={})

    def take(self, field: str, value: Any) -> tuple[str, ...]:
        """What a body has: in most APIs one string, or a list of them."""
        return (value,) if isinstance(value, str) else tuple(value)


class Expressions(Texts, frozen=True):
    """At most so many regular expressions."""

    def check(self, field: str, value: Any, params: Any = None) -> None:
        super().check(field, value, params)
        for pattern in value:
            check_expression(field, pattern)


class Ids(Struct, frozen=True):
    """At most so many token ids; if `some`, a client's list is not empty."""

    most: int
    some: bool = False
    body: Any = list[int] | None

    @property
    def holds(self) -> str:
        return f"at most {self.most} token ids"

    def check(self, field: str, value: Any, params: Any = None) -> None:
        if len(value) > self.most:
            raise refusal(field, f"{len(value)} ids", f"at most {self.most}", "send fewer")
        if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= INT32_MAX:
            return
        for id in value:
            ID.check(field, id)

    def take(self, field: str, value: Any) -> tuple[int, ...]:
        if self.some and not value:
            message = f"{{{field}}} is empty; allow at least one, or leave it out"
            raise RequestError(message, param=field, facts={})
        return tuple(value)


class Biases(Struct, frozen=True):
    """A number for each of at most so many token ids."""

    most: int
    each: Real
    body: Any = dict[int, float] | None

    @property
    def holds(self) -> str:
        return f"a number for each of at most {self.most} token ids"

    def check(self, field: str, value: Any, params: Any = None) -> None:
        if not isinstance(value, dict) or len(value) > self.most:
            given = f"{len(value)} biases" if isinstance(value, dict) else shown(value)
            raise refusal(field, given, f"a bias for each of at most {self.most} token ids", "send fewer")
        for token, bias in value.items():
            ID.check(field, token)
            self.each.check(field, bias)


ID = Whole(0, INT32_MAX, "send ids of the model's vocabulary")
Kind = Real | Whole | Switch | Texts | Ids | Biases


def reply_length(params: Any) -> tuple[int, int]:
    """A reply of 0 tokens is the prompt's log-probabilities and nothing more."""
    return (1 if params.prompt_logprobs is None else 0), INT32_MAX


def least_length(params: Any) -> tuple[int, int]:
    """No more than the longest reply."""
    return 0, INT32_MAX if params.max_tokens is None else params.max_tokens


# ── rows of the table ────────────────────────────────────────────────────────────────────────


class Named(Struct, frozen=True, kw_only=True):
    """What the APIs call a field: None is its own name, nothing says that an API has no such field. Further names,
    behind spaces, mean the same."""

    chat: str | None = None
    completions: str | None = None
    native: str | None = None
    responses: str | None = ""
    anthropic: str | None = ""


class Field(Struct, frozen=True):
    """One row of the table: a field of SamplingParams with what is said of it."""

    name: str
    kind: Kind
    named: Named
    default: Any

    def names(self, api: str) -> tuple[str, ...]:
        """What `api` calls it, the name that errors have first."""
        said: str | None = getattr(self.named, api)
        return (self.name,) if said is None else tuple(said.split())


def table_of(struct: type[Struct]) -> tuple[Field, ...]:
    """The fields of `struct`, each with its kind and its names, but for the grammar."""
    rows = []
    for field in msgspec.structs.fields(struct):
        if field.name != "grammar":
            marks = field.type.__metadata__
            (kind,) = (mark for mark in marks if isinstance(mark, Kind))
            named = next((mark for mark in marks if isinstance(mark, Named)), Named())
            rows.append(Field(field.name, kind, named, field.default))
    return tuple(rows)


# ── what a request meets ─────────────────────────────────────────────────────────────────────


class Checker:
    """Checks values of a struct whose fields are `fields`."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = fields
        self._values = attrgetter(*(field.name for field in fields))

    def __call__(self, params: Any) -> None:
        """Raise RequestError for the first field that is out of bounds, of another type, NaN or infinite."""
        for field, value in zip(self._fields, self._values(params), strict=True):
            if value is not field.default:
                field.kind.check(field.name, value, params)


StructType = TypeVar("StructType", bound=Struct)


class Api:
    """The sampling fields as one API has them: in its bodies, and in its errors."""

    def __init__(self, api: str, fields: Sequence[Field]) -> None:
        self.columns = [(name, field) for field in fields for name in field.names(api)]
        # Our names to those that its errors have.
        self.names = {field.name: names[0] for field in fields if (names := field.names(api))}
        self._values = attrgetter(*(name for name, _ in self.columns))

    def fields(self, body: type[StructType]) -> type[StructType]:
        """`body` with the fields that it does not declare itself; a class decorator. Null is the same as absent."""
        hints = get_type_hints(body)
        added = {name: field.kind.body for name, field in self.columns if name not in hints}
        space = {"__annotations__": added, "__doc__": body.__doc__, "__module__": body.__module__}
        make: Any = type(body)
        made: type[StructType] = make(body.__name__, (body,), {**space, **dict.fromkeys(added)}, kw_only=True)
        return made

    def given(self, body: Struct, path: str = "") -> tuple[dict[str, Any], dict[str, str]]:
        """What `body` says, as fields of SamplingParams, and what its client, who has the body under `path`, calls
        those that have several names.

        Raises RequestError where two names of one field say different things."""
        given: dict[str, Any] = {}
        called: dict[str, str] = {}
        values = self._values(body)
        if values.count(None) == len(values):
            return given, called
        for (name, field), value in zip(self.columns, values, strict=True):
            if value is None:
                continue
            taken = field.kind.take(name, value) if isinstance(field.kind, Texts | Ids) else value
            if field.name not in given:
                given[field.name] = taken
                if name != self.names[field.name]:
                    called[field.name] = name
            elif given[field.name] != taken:
                first = self.names[field.name]
                message = f"{path}{first} is {given[field.name]!r:.80} and {path}{name} is {taken!r:.80}; they mean "
                raise RequestError(f"{message}the same, so send one", param=path + name)
        return given, called
