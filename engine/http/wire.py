"""JSON on the wire: bodies decoded strictly, errors shaped as OpenAI shapes them.

A body is one msgspec struct. A field that the struct lacks is refused by name; a field that it has but that
the engine does not act on has a rule in the struct's `rules` (fields.py): it is a hint, or it is refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from engine.errors import RequestError, counted, shortened
from engine.http.fields import Rule, in_general
from engine.params.sampling import INT32_MAX

MAX_BODY_BYTES = 32 * 2**20
MOST_TOLD = 65_536  # bytes of a body that is read once more to tell a wrong value
UNKNOWN_FIELD = "Object contains unknown field `"  # as msgspec says it
# What OpenAI's, vLLM's and Anthropic's clients call parts that are no text.
MEDIA = frozenset(
    {"image", "image_url", "image_file", "input_image", "video", "video_url", "input_video", "audio", "audio_url"}
    | {"input_audio", "document", "file", "input_file"}
)
ENCODER = msgspec.json.Encoder()
# JSON may hold these as they are, and no event ends at one. Clients that split a stream as `str.splitlines` does, as
# httpx does for huggingface_hub, take each for the end of a line, and fail.
LINE_ENDS = {end.encode(): b"\\u%04x" % ord(end) for end in ("\x85", "\u2028", "\u2029")}
TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Priority = Annotated[int, Meta(ge=-INT32_MAX, le=INT32_MAX)]


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of every request body and of the objects inside it. `rules` are of the fields that are not served, `whole`
    is of the object itself, if it is none that is served."""

    rules: ClassVar[Mapping[str, Rule]] = {}
    whole: ClassVar[Rule | None] = None


class Reply(Struct, forbid_unknown_fields=True, frozen=True):
    """Base of every JSON answer and of the objects inside it; a field that may be absent is UNSET by default.

    Its schema says all that it holds, so that a field that is sent and not described is found."""


BodyType = TypeVar("BodyType", bound=Body)
StructType = TypeVar("StructType", bound=Struct)


class BodyDecoder(Generic[BodyType]):
    """bytes → one kind of body; RequestError says where the bytes are at fault.

    No bytes at all are the same as {} where no field is required."""

    def __init__(self, kind: type[BodyType]) -> None:
        self._kind = kind
        self._optional = not any(field.required for field in msgspec.structs.fields(kind))
        self._decoder = msgspec.json.Decoder(kind)

    def decode(self, data: bytes) -> BodyType:
        """The body in `data`, checked against its struct; `ignored_fields` checks it against its rules."""
        try:
            body = self._decoder.decode(data or b"{}" if self._optional else data)
        except msgspec.ValidationError as error:
            raise _invalid(self._kind, str(error), data) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"the request body ({counted(len(data), 'byte')}) is not valid JSON: {error}"
            raise RequestError(message, code="invalid_json") from None
        except RecursionError:
            raise RequestError("the request body is nested too deeply; flatten it", code="invalid_json") from None
        return body

    def query(self, given: Mapping[str, str]) -> BodyType:
        """The body whose fields are the parameters of a query."""
        try:
            return msgspec.convert(dict(given), self._kind, strict=False)
        except msgspec.ValidationError as error:
            raise _invalid(self._kind, str(error)) from None


def ignored_fields(body: Body, *, strict: bool = False) -> list[str]:
    """The names of the fields in `body` that are to be ignored; if `strict`, no hint is.

    Raises RequestError for one that is neither served, nor a hint, nor at a neutral value."""
    return list(dict.fromkeys(in_general(path) for path in _ignored_in(body, "", strict)))


def _ignored_in(body: Body, path: str, strict: bool) -> Iterator[str]:
    """The paths of those fields in `body`, whose own path is `path`."""
    if body.whole is not None:
        kind = str(body.__struct_config__.tag)
        if not body.whole.is_hint(kind, strict=strict):
            raise RequestError(
                f"{path}type is {kind!r}, and there is no such thing here; {body.whole.remedy}",
                param=f"{path}type",
                code=body.whole.code,
            )
        yield path + kind
        return
    rules = body.rules if _has_any(body) else {}
    for name, rule in rules.items():
        value = getattr(body, name)
        if value is None or rule.is_neutral(value):
            continue
        if not rule.is_hint(value, strict=strict):
            raise rule.refusal(path + name, value)
        if rule.told:
            yield path + name
    for name in _with_bodies(type(body)):
        match getattr(body, name):
            case Body() as inner:
                yield from _ignored_in(inner, f"{path}{name}.", strict)
            case list() as items:
                for index, item in enumerate(items):
                    if isinstance(item, Body):
                        yield from _ignored_in(item, f"{path}{name}[{index}].", strict)


def _has_any(body: Body) -> bool:
    """Whether a field of `body` that has a rule is given: in most bodies none is, and then this is all that is done."""
    values = _ruled(type(body))(body)
    return values.count(None) < len(values)


@cache
def _ruled(kind: type[Body]) -> Callable[[Body], tuple[Any, ...]]:
    """Gets the fields of a body of `kind` that have rules."""
    if not kind.rules:
        return lambda _: ()
    get = attrgetter(*kind.rules)
    return get if len(kind.rules) > 1 else lambda body: (get(body),)


@cache
def _with_bodies(kind: type[Body]) -> tuple[str, ...]:
    """The fields of `kind` in which there may be bodies that have rules, or have such in them."""
    hints = get_type_hints(kind)
    return tuple(name for name in kind.__struct_fields__ if any(map(_has_rules, structs_in(hints[name], Body))))


@cache
def _has_rules(kind: type[Body]) -> bool:
    return bool(kind.rules) or kind.whole is not None or bool(_with_bodies(kind))


def _invalid(kind: type[Body], said: str, data: bytes = b"") -> RequestError:
    """A msgspec message, "Expected `int`, got `str` - at `$.seed`", as a RequestError that names the field; `data` is
    the body that it is about."""
    reason, _, place = said.rpartition(" - at `")  # not by an expression: the client's words may be 32 MiB long
    found = re.fullmatch(r"(?:key` in `)?\$([^`]*)`", place)
    reason, path = (said, "") if found is None else (reason, found[1].lstrip("."))
    unknown = reason.removeprefix(UNKNOWN_FIELD)
    if unknown == reason:
        remedy = "correct its type or value"
        if (most := re.fullmatch(r"Expected `array` of length <= (\d+)", reason)) is not None:
            given = _value_at(data, path)
            count = len(given) if isinstance(given, list) else "more"
            message = f"{path} has {count} items, and at most {most[1]} are taken; send fewer"
            return RequestError(message, param=path, code="too_many_parts")
        if (medium := _medium_of(reason, path)) is not None:
            message = f"{path} is {medium!r}, and the model reads text alone; send text, or ask a model that reads it"
            return RequestError(message, param=path, code="unsupported_parameter")
        if reason.startswith("Invalid ") and (choices := _choices_at(kind, path)):
            remedy = f"send one of {', '.join(choices)}"
        elif reason.startswith("Object missing"):
            remedy = "send it"
        elif reason.startswith("Expected ") and len(data) <= MOST_TOLD:
            given = _value_at(data, path)
            if isinstance(given, str | int | float):
                reason += f"{'' if ', got ' in reason else ', got'} {shortened(ENCODER.encode(given).decode())}"
        message = f"{path or 'the request body'}: {reason[:1].lower()}{shortened(reason[1:], 300)}; {remedy}"
        return RequestError(message, param=path or None)
    name = shortened(unknown.removesuffix("`"))
    parent = _struct_at(kind, path)
    known = [field for field in parent.__struct_fields__ if field not in parent.rules]
    close = get_close_matches(name, known, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"the fields here are {', '.join(known)}"
    param = f"{path}.{name}" if path else name
    return RequestError(f"unknown field {param}; {remedy}", param=param, code="unknown_parameter")


def _medium_of(reason: str, path: str) -> str | None:
    """The type of a part that holds a picture, sound or a file, if msgspec's `reason` refuses it at `path`."""
    found = re.fullmatch(r"Invalid (?:enum )?value '([a-z_]+)'", reason) if path.endswith(".type") else None
    return found[1] if found is not None and found[1] in MEDIA else None


def _value_at(data: bytes, path: str) -> Any:
    """What a msgspec error path (messages[0].content) leads to in `data`; None where that cannot be told."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # nothing has read what stands behind the error
        return None
    for name, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", path):
        try:
            value = value[name or int(index)]
        except (LookupError, TypeError):
            return None
    return value


def _struct_at(kind: type[Body], path: str) -> type[Body]:
    """The struct that a msgspec error path (messages[0].content) leads to."""
    for name in re.findall(r"[A-Za-z_]\w*", path):
        if name not in kind.__struct_fields__:  # a field's name, the client's own, that looks like a path
            return kind
        kind = next(structs_in(get_type_hints(kind)[name], Body), kind)
    return kind


def _choices_at(kind: type[Body], path: str) -> list[str]:
    """The values that the field at a msgspec error path may have; none where they are not listed."""
    parent, _, name = re.sub(r"\[[^\]]*\]", "", path).rpartition(".")
    hint = get_type_hints(_struct_at(kind, parent)).get(name)
    if hint is None:  # the tag of one of several structs
        grandparent, _, name = parent.rpartition(".")
        within = get_type_hints(_struct_at(kind, grandparent)).get(name)
        return [repr(struct.__struct_config__.tag) for struct in structs_in(within, Body)]
    return [choice for part in (hint, *get_args(hint)) for choice in _literals(part)]


def _literals(hint: Any) -> list[str]:
    return [repr(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []


def structs_in(hint: Any, base: type[StructType]) -> Iterator[type[StructType]]:
    """The structs of the kind `base` that a value of type `hint` may be, or hold outside of other structs."""
    if isinstance(hint, type) and issubclass(hint, base):
        yield hint
    for part in get_args(hint):
        yield from structs_in(part, base)


def to_json(value: Any) -> bytes:
    """`value` as compact JSON, on what every client takes for one line."""
    encoded = ENCODER.encode(value)
    if not encoded.isascii():
        for end, escape in LINE_ENDS.items():
            encoded = encoded.replace(end, escape)
    return encoded


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """`value` as a JSON answer; bytes are JSON already."""
    body = value if isinstance(value, bytes) else to_json(value)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def error_object(message: str, *, status: int, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The error body of the OpenAI API: {"error": {message, type, param, code}}."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
