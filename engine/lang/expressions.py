"""What a program appends to its state: text, calls of the model, and roles around them.

    s += system("Be brief.") + user(question) + assistant(gen("answer", max_tokens=64))

`gen` takes every field of SamplingParams, as its one table has them (engine/params/sampling.py), and the keywords of
grammars. A field that it leaves out has the value given to `run`, if any. Left out: state.py does what these say.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct

from engine.errors import ConfigError, RequestError, Words, did_you_mean, shown
from engine.lang.choices import METHODS, ChoicesMethod, token_length_normalized
from engine.lang.media import image_part, video_part
from engine.lang.tools import Tool, tools_of
from engine.params.fields import Texts
from engine.params.grammar import KEYWORDS
from engine.params.sampling import FIELDS, NATIVE, SamplingParams, check_sampling
from engine.runtime.decisions import Option, Question, check_questions

Role = Literal["system", "user", "assistant"]
MAX_TOKENS = 128  # of a gen that says nothing else; as in SGLang
FIELDS_BY_NAME = {field.name: field for field in FIELDS}
# SGLang's names of fields that have others here, and what takes the place of fields that there are none of.
SGLANG_NAMES = {name: field.name for name, field in NATIVE.columns if name not in FIELDS_BY_NAME}
INSTEAD = {
    **dict.fromkeys(("return_logprob", "top_logprobs_num", "return_text_in_logprobs"), "logprobs=k"),
    "logprob_start_len": "prompt_logprobs=k",
}
KNOWN = {*FIELDS_BY_NAME, *KEYWORDS, "grammar"}
# What a value of a type looks like, and where a number ends.
NUMBER_ENDS = (" ", "\n")
DTYPES: Mapping[type, str] = {
    int: r"[-+]?[0-9]+[ \n]*",
    float: r"[-+]?[0-9]*\.?[0-9]+[ \n]*",
    bool: r"(True|False)",
    str: r"\"[\w\d\s]*\"",
}


NO_WORDS = Words()
TYPED_WORDS = Words({"regex": "dtype"})
TOOL_ROUNDS = 8  # times that a gen lets the model call tools; then it must answer


class Several(Struct, frozen=True):
    """One after another."""

    parts: tuple["Expression", ...]

    def __add__(self, other: "Expression | list[Any]") -> "Several":
        return several(self, other)

    def __radd__(self, other: "Expression | list[Any]") -> "Several":
        return several(other, self)


class Appended(Struct, frozen=True):
    """Anything but text: it can be added to text, and to others."""

    def __add__(self, other: "Expression | list[Any]") -> Several:
        return several(self, other)

    def __radd__(self, other: "Expression | list[Any]") -> Several:
        return several(other, self)


class Gen(Appended, frozen=True):
    """A reply of the model. `fields` are keywords of SamplingParams, `words` what the program calls some of them."""

    name: str | None
    fields: dict[str, Any]
    n: int = 1
    separate: bool = False
    tools: dict[str, Tool] = {}
    tool_choice: str = "auto"
    rounds: int = TOOL_ROUNDS
    words: Words = NO_WORDS

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """What is asked for; `defaults` are those of the run. Raises RequestError for a value out of bounds."""
        given = {"max_tokens": MAX_TOKENS, **defaults, **self.fields}
        if KEYWORDS & self.fields.keys():  # of this gen's own, so that a grammar of the run's does not stand beside it
            given = {key: value for key, value in given.items() if key in self.fields or key not in GRAMMARS}
        params = SamplingParams(**given)
        check_sampling(params)
        return params


GRAMMARS = KEYWORDS | {"grammar"}


class Select(Appended, frozen=True):
    """One of some texts: that which the model finds best."""

    name: str | None
    choices: tuple[str, ...]
    method: ChoicesMethod


class Shown(Appended, frozen=True):
    """A picture or a clip, as OpenAI's messages have it."""

    part: dict[str, Any]


class Decide(Appended, frozen=True):
    """A question about what has been said; nothing is appended. `values` are what its options stand for."""

    name: str
    question: Question
    values: tuple[Any, ...]


class RoleBegin(Appended, frozen=True):
    """What comes next is said by `role`."""

    role: Role


class RoleEnd(Appended, frozen=True):
    """`role` has said all."""

    role: Role


Expression: TypeAlias = str | Several | Gen | Select | Decide | Shown | RoleBegin | RoleEnd


def several(*items: Any) -> Several:
    """`items` as one expression; None is nothing, a list is its items. Raises TypeError for what is none."""
    parts: list[Expression] = []
    for item in items:
        match item:
            case None:
                continue
            case Several(inner):
                parts += inner
            case list() | tuple():
                parts += several(*item).parts
            case str() | Appended():
                parts.append(item)  # type: ignore[arg-type]
            case int() | float():
                parts.append(str(item))
            case _:
                raise TypeError(f"a state takes text, gen, select, roles and lists of these, not {shown(item)}")
    return Several(tuple(parts))


# ── calls of the model ───────────────────────────────────────────────────────────────────────


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    *,
    n: int = 1,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod = token_length_normalized,
    tools: Sequence[Any] = (),
    tool_choice: Literal["auto", "required", "none"] = "auto",
    tool_rounds: int = TOOL_ROUNDS,
    **fields: Any,
) -> Gen | Select:
    """A reply of the model, kept as the variable `name`; without one it is only in the text.

    `fields` are those of SamplingParams: `stop`, `temperature`, `regex` and so on; `json_schema` may be a dictionary or
    a class with `model_json_schema` (pydantic). `dtype` (int, float, bool, str) makes the reply the text of such a
    value. With `choices` it is a `select`. With `n` above 1 the variable is a list, and the text goes on with its
    first. `tools` are Python functions that the model may call before it answers, `tool_rounds` times at most; what it
    called is the variable `name` followed by `_calls`. Raises ConfigError for a field that there is none of,
    RequestError for a value out of bounds.
    """
    if max_tokens is not None:
        fields["max_tokens"] = max_tokens
    if choices is not None:
        if wrong := fields.keys() - {"temperature"} | ({"tools"} if tools else set()):
            raise ConfigError(f"a gen with choices is a select, which samples nothing; leave out {', '.join(wrong)}")
        return select(name, choices, choices_method=choices_method, **fields)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise RequestError(f"n is {shown(n)}; it must be a whole number from 1", param="n")
    if tools and n > 1:
        raise RequestError(f"n is {n} beside tools; let the model answer once, or fork", param="n")
    kind = _type_of(dtype)
    given = {**({} if kind is None else {"regex": DTYPES[kind]}), **checked_fields(fields)}
    words = NO_WORDS if dtype is None else TYPED_WORDS
    found = Gen(name, given, n, tools=tools_of(tools), tool_choice=tool_choice, rounds=tool_rounds, words=words)
    if kind in (int, float):
        found.fields["stop"] = (*found.fields.get("stop", ()), *NUMBER_ENDS)
    found.params({})
    return found


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of SamplingParams, as it has them. Raises ConfigError for others."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        name = SGLANG_NAMES.get(name, name)
        if name not in KNOWN:
            hint = f"; say {INSTEAD[name]}" if name in INSTEAD else did_you_mean(name, KNOWN)
            raise ConfigError(f"gen has no field {name!r}{hint}; docs/fields.md lists them")
        if value is None:
            continue
        field = FIELDS_BY_NAME.get(name)
        if field is not None and isinstance(field.kind, Texts):
            value = field.kind.take(name, value)
        elif name == "json_schema" and not isinstance(value, str):
            schema = value.model_json_schema() if hasattr(value, "model_json_schema") else value
            value = json.dumps(schema)
        found[name] = value
    return found


def _type_of(dtype: type | str | None) -> type | None:
    """A type of DTYPES, which may be named."""
    named = {each.__name__: each for each in DTYPES} | {"string": str}
    found = named.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES:
        raise ConfigError(f"dtype is {shown(dtype)}; it must be one of {', '.join(each.__name__ for each in DTYPES)}")
    return found


def gen_int(name: str | None = None, **fields: Any) -> Gen | Select:
    """`gen` of a whole number, as text."""
    return gen(name, dtype=int, **fields)


def gen_string(name: str | None = None, **fields: Any) -> Gen | Select:
    """`gen` of a string in double quotes."""
    return gen(name, dtype=str, **fields)


def select(
    name: str | None = None,
    choices: Sequence[str] = (),
    temperature: float = 0.0,
    choices_method: ChoicesMethod = token_length_normalized,
) -> Select:
    """One of `choices`, by the log-probabilities of their tokens behind the text so far.

    Raises ConfigError for no choices, one that is no text, a temperature above 0, and an unknown method."""
    if isinstance(choices, str) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise ConfigError(f"choices is {shown(choices)}; it must be a list of strings, none of them empty")
    if temperature > 1e-5:
        raise ConfigError(f"temperature is {shown(temperature)}; a select takes the best choice, so leave it at 0")
    if choices_method not in METHODS:
        known = ", ".join(each.name for each in METHODS)
        raise ConfigError(f"choices_method is {shown(choices_method)}; it must be one of {known}")
    return Select(name, tuple(choices), choices_method)


Options = Sequence[str | bool] | Mapping[str | bool, str]


def decide(name: str, instructions: str, *, choices: Options | None = None, levels: Options | None = None) -> Decide:
    """A question about what has been said so far, answered by probabilities; the variable `name` is a Decision.

    It is whether `instructions` is true, or which of `choices`, or which of `levels`, from the lowest to the highest.
    Either may be a dictionary of descriptions. Raises ConfigError for both, RequestError for too few."""
    if choices is not None and levels is not None:
        raise ConfigError("decide takes choices or levels, not both; ask two questions")
    if (options := choices if choices is not None else levels) is None:
        return Decide(name, Question("predicate", instructions), (True, False))
    described = options if isinstance(options, Mapping) else dict.fromkeys(options, "")
    texts = [value if isinstance(value, str) else str(value).lower() for value in described]
    offered = tuple(Option(text, description) for text, description in zip(texts, described.values(), strict=True))
    question = Question("choice" if choices is not None else "score", instructions, offered)
    check_questions([question])
    return Decide(name, question, tuple(described))


def separate_reasoning(expression: Any, model_type: str | None = None) -> Several:
    """`expression`, with what the model thinks in each `gen(name)` kept apart, as the variable `name` followed by
    `_reasoning_content`. The parser is that of the served model, so `model_type`, as SGLang has it, changes nothing."""
    return Several(
        tuple(
            msgspec.structs.replace(part, separate=True) if isinstance(part, Gen) else part
            for part in several(expression).parts
        )
    )


# ── pictures and clips ───────────────────────────────────────────────────────────────────────


def image(source: str | Path | bytes, detail: str | None = None) -> Shown:
    """A picture in a message of the user's: a file, its bytes, or a URL. Any number of them. Raises ConfigError for a
    file that cannot be read."""
    return Shown(image_part(source, detail))


def video(source: str | Path | bytes, num_frames: int | None = None) -> Shown:
    """A clip in a message of the user's. Raises ConfigError for a file that cannot be read, and for `num_frames`: how
    many frames are looked at, the server says."""
    if num_frames is not None:
        raise ConfigError(f"num_frames is {num_frames}; the server chooses the frames of a clip, so leave it out")
    return Shown(video_part(source))


# ── roles ────────────────────────────────────────────────────────────────────────────────────


def _said_by(role: Role, expression: Any) -> Several:
    return several(RoleBegin(role), expression, RoleEnd(role))


def system(expression: Any = None) -> Several:
    """A message of the system's."""
    return _said_by("system", expression)


def user(expression: Any = None) -> Several:
    """A message of the user's."""
    return _said_by("user", expression)


def assistant(expression: Any = None) -> Several:
    """A message of the assistant's: what the model says, or is told that it said."""
    return _said_by("assistant", expression)


def system_begin() -> RoleBegin:
    """Begins a message of the system's."""
    return RoleBegin("system")


def system_end() -> RoleEnd:
    """Ends it."""
    return RoleEnd("system")


def user_begin() -> RoleBegin:
    """Begins a message of the user's."""
    return RoleBegin("user")


def user_end() -> RoleEnd:
    """Ends it."""
    return RoleEnd("user")


def assistant_begin() -> RoleBegin:
    """Begins a message of the assistant's."""
    return RoleBegin("assistant")


def assistant_end() -> RoleEnd:
    """Ends it."""
    return RoleEnd("assistant")
