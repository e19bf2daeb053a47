"""The sampling fields, in one table: `SamplingParams`, each of whose fields says what it is, holds and is called.

    temperature: Annotated[float | None, Meta(description=…), Real(0, 2, …), Named(responses="temperature")] = None
                           type          the flag's help      bounds         what each API calls it    default

The checks, the bodies of every API, the ranges in the OpenAPI document, the flags and /set of the chat derive from it.
`Sampling`, below, is what the device takes of a request: a field of the same name in both is handed on as it is.

Nothing is clamped or repaired: what a client asks for is served as asked, or refused with the bound. What
only the model knows (its length, its vocabulary) is checked where the prompt is tokenized. A field that a request
leaves out has the default of the model, if its generation_config.json states one, else that of OpenAI's API.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta, Struct, StructMeta

from engine.errors import RequestError, shown
from engine.params.expressions import check_expression, refusal
from engine.params.grammar import Grammar, GrammarKeywords, from_keywords

INT32_MAX = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024
MAX_REGEXES = 4
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_ALLOWED = 1 << 18  # token ids: as many as the largest vocabularies have
MAX_LOGPROBS = 20  # likeliest tokens to report beside each
MAX_PENALTY = 2.0
MAX_REPETITION = 10.0
MAX_BIAS = 100.0


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
    within: "Callable[[SamplingParams], tuple[int, int]] | None" = None
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
    """At most so many strings, none of them empty."""

    most: int
    body: Any = list[str] | None

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


# ── the table ────────────────────────────────────────────────────────────────────────────────


class Named(Struct, frozen=True, kw_only=True):
    """What the APIs call a field: None is its own name, nothing says that an API has no such field. Further names,
    behind spaces, mean the same."""

    chat: str | None = None
    completions: str | None = None
    native: str | None = None
    responses: str | None = ""
    anthropic: str | None = ""


class _WithKeywords(StructMeta):
    """Lets SamplingParams take the keywords of GrammarKeywords, and make their grammar of them."""

    def __call__(cls, **fields: Any) -> Any:
        if GRAMMAR_KEYWORDS.isdisjoint(fields):
            return super().__call__(**fields)
        options = {name: fields.pop(name) for name in GRAMMAR_KEYWORDS & fields.keys()}
        if (grammar := from_keywords(options)) is not None:
            if fields.get("grammar") is not None:
                message = f"grammar and {{{grammar.kind}}} are given, and a reply can be only one of them"
                raise RequestError(message, param=grammar.kind, facts={})
            fields["grammar"] = grammar
        return super().__call__(**fields)


GRAMMAR_KEYWORDS = frozenset(GrammarKeywords.__struct_fields__)
if TYPE_CHECKING:  # so that a type checker knows the keywords; they cannot be read back, `grammar` can
    _Keywords = GrammarKeywords
else:
    _Keywords = Struct


def _reply_length(params: "SamplingParams") -> tuple[int, int]:
    """A reply of 0 tokens is the prompt's log-probabilities and nothing more."""
    return (1 if params.prompt_logprobs is None else 0), INT32_MAX


def _least_length(params: "SamplingParams") -> tuple[int, int]:
    return 0, INT32_MAX if params.max_tokens is None else params.max_tokens


class SamplingParams(_Keywords, frozen=True, kw_only=True, array_like=True, metaclass=_WithKeywords):
    """How one request is sampled and when it ends, as its client says it. In the place of `grammar` it takes one of the
    keywords of GrammarKeywords, json_schema="…" or regex="…", and raises RequestError where that is wrong."""

    # None: the default of the model, or of the API (SamplingDefaults).
    temperature: Annotated[
        float | None,
        Meta(description="0 is greedy, 1 the model's own distribution"),
        Real(0, 2, "0 is greedy, 1 the model's own distribution"),
        Named(responses="temperature", anthropic="temperature"),
    ] = None
    top_p: Annotated[
        float | None,
        Meta(description="keep the likeliest tokens of this total probability; 1 is off"),
        Real(0, 1, "1 is off; for the likeliest token set temperature 0", above=True),
        Named(responses="top_p", anthropic="top_p"),
    ] = None
    top_k: Annotated[
        int | None,
        Meta(description="keep this many of the likeliest tokens; 0 or -1 is off"),
        Whole(-1, INT32_MAX, "0 or -1 is off"),
        Named(responses="top_k", anthropic="top_k"),
    ] = None
    min_p: Annotated[
        float | None,
        Meta(description="keep tokens at least this share as likely as the best; 0 is off"),
        Real(0, 1, "0 is off"),
        Named(responses="min_p"),
    ] = None
    seed: Annotated[
        int | None,
        Meta(description="the same seed samples the same reply; default: a fresh one"),
        Whole(-(2**63), 2**63 - 1, "leave it out for a fresh one"),
        Named(native="sampling_seed", responses="seed"),
    ] = None
    max_tokens: Annotated[
        int | None,
        Meta(description="longest reply; default: what the model's length leaves"),
        Whole(1, INT32_MAX, "leave it out for the default", within=_reply_length),
        Named(
            chat="max_tokens max_completion_tokens",
            native="max_new_tokens",
            responses="max_output_tokens",
            anthropic="max_tokens",
        ),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        Meta(description="a string that ends the reply and is not part of it"),
        Texts(MAX_STOPS, body=str | list[str] | None),
        Named(responses="stop", anthropic="stop_sequences"),
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], Meta(description="a token id that ends the reply"), Ids(MAX_STOP_TOKENS)
    ] = ()
    ignore_eos: Annotated[bool, Meta(description="run on past the model's own end tokens"), Switch()] = False
    stop_regex: Annotated[
        tuple[str, ...],
        Meta(description="a regular expression that ends the reply"),
        Expressions(MAX_REGEXES, body=str | list[str] | None),
    ] = ()
    min_tokens: Annotated[
        int,
        Meta(description="shortest reply: nothing stops it before"),
        Whole(0, INT32_MAX, "0 is off; the length of the reply bounds it", within=_least_length),
        Named(native="min_new_tokens"),
    ] = 0
    presence_penalty: Annotated[
        float,
        Meta(description="taken from the logit of what the reply has said"),
        Real(-MAX_PENALTY, MAX_PENALTY, "0 is off"),
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(description="the same, for each time it was said"), Real(-MAX_PENALTY, MAX_PENALTY, "0 is off")
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        Meta(description="makes what prompt or reply hold less likely, above 1; 1 is off"),
        Real(0, MAX_REPETITION, "1 is off", above=True),
        Named(chat="repetition_penalty repeat_penalty", completions="repetition_penalty repeat_penalty"),
    ] = None
    logit_bias: Annotated[
        dict[int, float],
        Meta(description="added to logits: token id to bias, as JSON"),
        Biases(MAX_BIASES, Real(-MAX_BIAS, MAX_BIAS, "-100 is as good as a ban")),
    ] = {}  # noqa: RUF012 - msgspec copies it
    bad_words: Annotated[
        tuple[str, ...], Meta(description="a text that the reply must not hold"), Texts(MAX_BAD_WORDS)
    ] = ()
    allowed_token_ids: Annotated[
        tuple[int, ...], Meta(description="a token id to sample; others are not"), Ids(MAX_ALLOWED, some=True)
    ] = ()
    logprobs: Annotated[
        int | None,
        Meta(description="log-probabilities of the reply's tokens, and of so many likeliest ones"),
        Whole(0, MAX_LOGPROBS, "0 is the tokens' own alone"),
        Named(chat="top_logprobs", native="", responses="top_logprobs"),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        Meta(description="the same for the prompt's tokens"),
        Whole(0, MAX_LOGPROBS, "0 is the tokens' own alone"),
        Named(native=""),
    ] = None
    skip_special_tokens: Annotated[bool, Meta(description="leave special tokens out of the text"), Switch()] = True
    include_stop_str_in_output: Annotated[
        bool,
        Meta(description="end the text with what stopped it, a special token too if these are not skipped"),
        Switch(),
        Named(native="include_stop_str_in_output no_stop_trim"),
    ] = False
    detokenize: Annotated[bool, Meta(description="make text of the tokens; without, there are only ids"), Switch()] = (
        True
    )
    grammar: Grammar | None = None  # what the reply must be


class Sampling(Struct, frozen=True, array_like=True):
    """What the device needs to sample one row. `seed` is always set; `top_k` 0 is off.

    All ids are int32. `stop_ids` are not sampled before `min_tokens`; of each of `bad_words`, the last token not
    after the ones before it; nothing but `allowed_ids`, if there are any. `logprobs` and `prompt_logprobs` are how
    many of the likeliest tokens to report beside a token's own log-probability; -1 is none at all.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias_ids: bytes = b""
    biases: bytes = b""  # float32
    min_tokens: int = 0
    stop_ids: bytes = b""
    bad_words: tuple[bytes, ...] = ()
    allowed_ids: bytes = b""
    logprobs: int = -1
    prompt_logprobs: int = -1


class SamplingDefaults(Struct, frozen=True):
    """The values of sampling fields that a request leaves out; as written here, those of OpenAI's API.

    `max_new_tokens` bounds the reply where neither the request nor its API has a bound."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    def under(self, params: SamplingParams) -> "SamplingDefaults":
        """The values in force for `params`: theirs, and these where they have none."""
        said = {name: value for name in OPTIONAL if (value := getattr(params, name)) is not None}
        return msgspec.structs.replace(self, **said)


# ── what derives from it ─────────────────────────────────────────────────────────────────────


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


def _table() -> tuple[Field, ...]:
    rows = []
    for field in msgspec.structs.fields(SamplingParams):
        if field.name != "grammar":
            marks = field.type.__metadata__
            (kind,) = (mark for mark in marks if isinstance(mark, Kind))
            named = next((mark for mark in marks if isinstance(mark, Named)), Named())
            rows.append(Field(field.name, kind, named, field.default))
    return tuple(rows)


FIELDS = _table()
APIS = Named.__struct_fields__
RANGES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {field.name: field.kind.range for field in FIELDS if isinstance(field.kind, Real | Whole)}
)
OPTIONAL = tuple(name for name in SamplingDefaults.__struct_fields__ if name in SamplingParams.__struct_fields__)
# The fields that the device takes as the client says them.
HANDED_ON = tuple(name for name, _ in get_type_hints(Sampling).items() & get_type_hints(SamplingParams).items())
_VALUES = attrgetter(*(field.name for field in FIELDS))


def check_sampling(params: SamplingParams) -> None:
    """Raise RequestError for the first field that is out of bounds, of another type, NaN or infinite."""
    for field, value in zip(FIELDS, _VALUES(params), strict=True):
        if value is not field.default:
            field.kind.check(field.name, value, params)
    if not params.detokenize:
        for name in ("stop", "stop_regex"):
            if getattr(params, name):
                message = f"detokenize is false and {{{name}}} is given, which is looked for in the text; send "
                raise RequestError(f"{message}stop_token_ids", param=name, facts={})


StructType = TypeVar("StructType", bound=Struct)


class Api:
    """The sampling fields as one API has them: in its bodies, and in its errors."""

    def __init__(self, api: str) -> None:
        self.columns = [(name, field) for field in FIELDS for name in field.names(api)]
        # Our names to those that its errors have.
        self.names = {field.name: names[0] for field in FIELDS if (names := field.names(api))}
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


CHAT, COMPLETIONS, NATIVE, RESPONSES, ANTHROPIC = map(Api, APIS)
