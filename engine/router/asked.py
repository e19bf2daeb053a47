"""What a router reads of a request: what the model will see, and the names of things that one worker holds.

Nothing is checked here, and nothing refused: the worker that gets the bytes does that. A field of another type than it
should have is as one that is missing. Bodies beyond `MOST_READ` are not read, and go by load alone.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiohttp import web
from msgspec import Struct

from engine.conversation.canonical import arrival_space, arrival_text
from engine.http.request_id import HEADER
from engine.router.policy import Arrival

MOST_READ: Final = 4 * 2**20  # bytes of a body: 10 to 20 ms
SESSION_HEADERS: Final = ("X-Session-Id", "X-Program-Id")
NAMES: Final = ("session_id", "program", "prompt_cache_key")  # fields that name one
RESPONSE: Final = re.compile(r"/v1/responses/([^/]+)(?:/.*)?")
INT32: Final = 2**31 - 1
CACHED: Final = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d+)')
PROMPT: Final = re.compile(rb'"(prompt_tokens|input_tokens)"\s*:\s*(\d+)')
RESPONSE_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[^"\\]{1,250})"')
DECODE: Final = msgspec.json.Decoder().decode


class Asked(Struct):
    """`response` is the id of a stored response that the request is about or goes on from; `rids` are the ids by which
    it can be aborted while it runs."""

    arrival: Arrival
    priority: int = 0
    response: str = ""
    field: str = ""  # where that id stands
    rids: tuple[str, ...] = ()


def read_asked(request: web.Request, body: bytes, path: str = "") -> Asked:
    """What `request` with `body` asks for; with a `path`, as if it were for that."""
    path = path or request.path
    fields = object_in(body) if request.method == "POST" and len(body) <= MOST_READ else {}
    text, model = "", _text(fields, "model")
    if fields:
        text = arrival_text(path, fields)
    session = next((request.headers[name] for name in SESSION_HEADERS if name in request.headers), "")
    program = session or next(filter(None, (_text(fields, name) for name in NAMES)), "") or _session_of(fields)
    priority = fields.get("priority")
    found = RESPONSE.fullmatch(path)
    named = found[1] if found is not None and found[1] != "input_tokens" else ""
    previous = _text(fields, "previous_response_id")
    rids = (request.headers.get(HEADER, ""), _text(fields, "rid"), _text(fields, "request_id"))
    return Asked(
        Arrival(model, text, arrival_space(fields), program),
        priority if isinstance(priority, int) and -INT32 <= priority <= INT32 else 0,
        named or previous,
        "response_id" if named else "previous_response_id",
        tuple(dict.fromkeys(filter(None, rids))),
    )


def cached_share(end: bytes) -> tuple[int, int] | None:
    """Cached and all tokens of a prompt, as the `end` of an answer has them; None where it does not say."""
    cached, prompts = CACHED.findall(end), PROMPT.findall(end)
    if not cached or not prompts:
        return None
    kind, count = prompts[-1]
    held, whole = int(cached[-1]), int(count)
    if kind == b"input_tokens" and b"cache_read_input_tokens" in end:
        whole += held
    return (held, whole) if 0 <= held <= whole and whole else None


def object_in(body: bytes) -> Mapping[str, Any]:
    """The object that `body` is; an empty one for what is no JSON object."""
    if body.lstrip()[:1] != b"{":
        return {}
    try:
        fields = DECODE(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def _session_of(fields: Mapping[str, Any]) -> str:
    """The session of SGLang's /generate."""
    params = fields.get("session_params")
    return _text(params, "id") if isinstance(params, dict) else ""
