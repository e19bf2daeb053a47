"""What every handler shares, and the one way from Generates to an answer, whole or streamed.

A handler makes a `Generate` for each reply (`n` of them to each of several prompts) and a `Reply`, which knows how one
API words its answers; `answer` does the rest. Leaving `answer` in any way, the handler's cancellation by a vanished
client included, leaves the requests' mailboxes, and that aborts the requests.
"""

import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio.lowlevel
import msgspec
from aiohttp import web

from engine.config import ServerOptions
from engine.errors import RequestError, Words, counted
from engine.http.keys import owner_of
from engine.http.metrics import Metrics, ReplyWatch
from engine.http.repeated import once
from engine.http.request_id import called, check_id
from engine.http.sse import CALLED, WORDS
from engine.http.streams import Events, send_replies
from engine.http.tracing import TRACE
from engine.http.turns import in_turn
from engine.http.wire import json_response
from engine.messages.peers import AbortRequests, ClaimIds
from engine.messages.reply import Chunk
from engine.messages.request import Generate, Job
from engine.messages.sessions import ProgramUse, SessionUse
from engine.params.lengths import check_unicode
from engine.params.sampling import SamplingParams, check_sampling
from engine.runtime.front import OWNER, in_use
from engine.runtime.mailbox import Mailbox, whole

if TYPE_CHECKING:
    from engine.runtime.front import Front


MAX_SAMPLES = 128  # replies to one prompt
MAX_CHOICES = 1024  # replies to one request
MAX_SALT_LENGTH = 1024
SESSION_HEADER = "X-Session-Id"
MAX_PROGRAM_LENGTH = 256  # characters of a program's id
STARTED = 64  # replies that are begun before others have their turn


class Reply(Events, Protocol):
    """One API's wording of the replies to a request: events for each numbered chunk, or one JSON value for all."""

    def whole(self, replies: list[Chunk]) -> bytes:
        """The JSON of replies that are not streamed, each joined into one chunk."""


class Service:
    """The front, the metrics and the options of one server."""

    def __init__(self, front: "Front", options: ServerOptions) -> None:
        self.front = front
        self.options = options
        self.model = front.model_name
        self.models = options.served_model_name or (self.model,)
        self.metrics = Metrics(front, self.model, options.metrics_aliases)
        # By owner and id: the rids of the request that it stands for, or of several.
        self._named: dict[tuple[bytes, str], dict[object, list[str]]] = {}
        self._owners: dict[str, bytes] = {}  # of rids; without those that are nobody's
        self._claims: dict[str, bool] = {}  # ids that clients gave their requests, and whether all fronts know
        front.peers.answers(AbortRequests, self._aborted)
        front.peers.answers(ClaimIds, self._claimed)

    def generate(self, job: Job, endpoint: str) -> AsyncGenerator[Chunk]:
        """The reply to `job`, which /metrics counts for `endpoint` and the request's trace tells of."""
        trace = TRACE.get()
        return self.metrics.watch(self.front.generate(job), endpoint, None if trace is None else trace.reply(job))

    @asynccontextmanager
    async def replies(
        self,
        request: web.Request,
        rid: str,
        jobs: Sequence[Job],
        *,
        endpoint: str,
        words: Callable[[int], Words] | None = None,
    ) -> AsyncIterator[list[Mailbox]]:
        """The mailboxes of the replies to `jobs`, by which `request`, known as `rid`, is answered. They are counted and
        traced as by `generate`; leaving aborts what goes on. `words` are those in which errors of each job are told, by
        its number."""
        boxes: list[Mailbox] = []
        watches: list[ReplyWatch] = []
        try:
            try:
                for number, job in enumerate(jobs):
                    self._begin(job, endpoint, boxes, watches)
                    if words is not None:
                        boxes[-1].words = partial(words, number)
                    if len(boxes) % STARTED == 0:
                        await anyio.lowlevel.checkpoint()
            finally:
                id = called(request, rid)
            with self.known_as(owner_of(request), {id, rid}, jobs):
                yield boxes
        finally:
            for box in boxes:
                self.front.leave(box)
            for watch in watches:
                watch.end()

    def _begin(self, job: Job, endpoint: str, boxes: list[Mailbox], watches: list[ReplyWatch]) -> None:
        """Begin one, and watch it, refused or not."""
        try:
            boxes.append(box := self.front.begin(job))
        except Exception as error:
            watches.append(self._watch(job, endpoint))
            watches[-1].fail(error)
            raise
        watches.append(self._watch(job, endpoint))
        box.watch = watches[-1]

    def _watch(self, job: Job, endpoint: str) -> ReplyWatch:
        trace = TRACE.get()
        return self.metrics.watching(endpoint, None if trace is None else trace.reply(job))

    async def abort(self, rid: str | None, owner: bytes = b"") -> int:
        """End what runs as `rid` of `owner` at any front, all its replies, or with None everything of everybody; how
        many replies were open."""
        asked = AbortRequests(rid, owner)
        return await self._aborted(asked) + sum(await self.front.peers.ask(asked))

    async def _aborted(self, asked: AbortRequests) -> int:
        rid, owner = asked.rid, asked.owner
        if rid is None:
            return self.front.abort(None)
        rids = {rid, rid_of(owner, rid)}.union(*self._named.get((owner, rid), {}).values())
        return sum(self.front.abort(one) for one in rids if self._owners.get(one, b"") == owner)

    @asynccontextmanager
    async def claimed(self, rids: Sequence[str]) -> AsyncIterator[None]:
        """While this lasts, no other request runs as one of `rids`, which its client gave, at any front.

        Raises RequestError where one does already. A front that is alone has no need of this: it knows all its ids."""
        peers, claims = self.front.peers, dict.fromkeys(rids, False)
        if peers.count == 1 or not claims:
            yield
            return
        if ours := claims.keys() & self._claims.keys():
            raise in_use(min(ours))
        self._claims |= claims
        try:
            for taken in await peers.ask(ClaimIds(peers.number, tuple(claims))):
                if taken is not None:
                    raise in_use(taken)
            self._claims |= dict.fromkeys(claims, True)
            yield
        finally:
            for rid in claims:
                del self._claims[rid]

    async def _claimed(self, asked: ClaimIds) -> str | None:
        first = self.front.peers.number < asked.asker  # of those that claim at once
        return next((rid for rid in asked.rids if rid in self._claims and (first or self._claims[rid])), None)

    @contextmanager
    def known_as(self, owner: bytes, ids: set[str], jobs: Sequence[Job]) -> Iterator[None]:
        """While this lasts, `owner` alone can `abort` these jobs: all by each of `ids`, which other requests may have
        too, and each by its rid."""
        key, rids = object(), [job.rid for job in jobs]
        names = [(owner, id) for id in ids if rids != [id]]
        for name in names:
            self._named.setdefault(name, {})[key] = rids
        owners = dict.fromkeys(rids, owner) if owner else {}
        self._owners |= owners
        try:
            yield
        finally:
            for name in names:
                del self._named[name][key]
                if not self._named[name]:
                    del self._named[name]
            for rid in owners:
                del self._owners[rid]

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) unless `name` is one of the served names or left out."""
        if (trace := TRACE.get()) is not None:
            trace.model = name
        if name is not None and name not in self.models:
            known = " or ".join(repr(served) for served in self.models)
            message = f"the model {name[:200]!r} is not served here; use {known}, or leave model out"
            raise RequestError(message, param="model", code="model_not_found", status=404)

    def check_template(self, template: str | None) -> None:
        """Raise RequestError unless a request's `chat_template` is left out, or the server takes such."""
        if template is not None and not self.options.trust_request_chat_template:
            raise RequestError(
                "chat_template is taken only by a server that was started with --trust-request-chat-template; "
                "leave it out",
                param="chat_template",
                code="unsupported_parameter",
            )


SERVICE = web.AppKey("service", Service)


# ── from a body to Generates ─────────────────────────────────────────────────────────────────


def sampling_of(
    request: web.Request, words: Words, fields: Mapping[str, Any], *, called: dict[str, str], grammar: str = ""
) -> SamplingParams:
    """The checked SamplingParams of `fields`. From here on errors about `request` are told in `words`, and name fields
    as its client has `called` them, and what it asked for a grammar in as `grammar`. The caller may add to `called`."""
    if grammar:
        called["grammar"] = grammar
    request[WORDS], request[CALLED] = words, called
    sampling = SamplingParams(**fields)
    check_sampling(sampling)
    return sampling


def check_kept(tokens: int | None) -> int | None:
    """`truncate_prompt_tokens`, how many tokens of a prompt are kept."""
    if tokens == 0:
        message = "truncate_prompt_tokens is 0; keep at least one token, or send -1 for as many as there is room for"
        raise RequestError(message, param="truncate_prompt_tokens")
    return tokens


def rid_of(owner: bytes, rid: str) -> str:
    """What a request runs as that a client of `owner` calls `rid`: those of others may have the same."""
    return f"{rid}{OWNER}{owner.hex()}" if owner else rid


def salt_of(salt: str | None) -> str:
    """`cache_salt`, by default that of everybody."""
    if salt is None:
        return ""
    if not 1 <= len(salt) <= MAX_SALT_LENGTH:
        raise RequestError(
            f"cache_salt has {len(salt)} characters; send 1 to {MAX_SALT_LENGTH}, or leave it out", param="cache_salt"
        )
    check_unicode(salt, "cache_salt")
    return salt


def session_of(request: web.Request, given: str | None) -> SessionUse | None:
    """The session that `request` is of: `session_id` of its body, else of its header. Raises RequestError for an id
    that is none, for several headers, and where both say something else."""
    named = once(request.headers, SESSION_HEADER) if SESSION_HEADER in request.headers else None
    id, field = (named, SESSION_HEADER) if given is None else (given, "session_id")
    if id is None:
        return None
    check_id(id, field)
    if named not in (None, id):
        message = f"session_id is {id!r}, and the header {SESSION_HEADER} {named[:80]!r}; send one of them"
        raise RequestError(message, param="session_id")
    return SessionUse(owner_of(request), id, request.app[SERVICE].front.config.cache.session_seconds)


def program_of(request: web.Request, program: str | None) -> ProgramUse | None:
    """The program that `request` is a call of, by default none."""
    return None if program is None else ProgramUse(owner_of(request), checked_program(program))


def checked_program(program: str, name: str = "program") -> str:
    """The id of a program, which the client calls `name`."""
    if not 1 <= len(program) <= MAX_PROGRAM_LENGTH:
        raise RequestError(
            f"{name} has {len(program)} characters; send 1 to {MAX_PROGRAM_LENGTH}, or leave it out", param=name
        )
    check_unicode(program, name)
    return program


def check_choices(prompts: int, samples: int, name: str = "prompt") -> None:
    """Raise RequestError when so many replies to each of so many prompts, which the client calls `name`, are too many.

    To be asked before anything is made for each of them."""
    if not 1 <= samples <= MAX_SAMPLES:
        raise RequestError(f"{{n}} is {samples}; it must be from 1 to {MAX_SAMPLES}", param="n", facts={})
    if prompts * samples > MAX_CHOICES:
        raise RequestError(
            f"{counted(prompts, 'prompt')} with {counted(samples, 'reply', 'replies')} each are over the {MAX_CHOICES} "
            "of one request; send less",
            param="n" if samples > 1 else name,
        )


def sampled(prompts: list[Generate], samples: int) -> list[Generate]:
    """`samples` requests for each of `prompts`, in order. Of a seeded one, sample i has seed + i.

    Those that would share an id have `-` and their number appended to it."""
    check_choices(len(prompts), samples)
    if samples == 1 and len({prompt.rid for prompt in prompts}) == len(prompts):
        return prompts
    jobs: list[Generate] = []
    for prompt in prompts:
        for sample in range(samples):
            params = prompt.sampling
            if params.seed is not None and sample:
                seed = (params.seed + sample + (1 << 63)) % (1 << 64) - (1 << 63)
                params = msgspec.structs.replace(params, seed=seed)
            jobs.append(msgspec.structs.replace(prompt, rid=f"{prompt.rid}-{len(jobs)}", sampling=params))
    return jobs


def told_apart(items: list[Any], mixed: RequestError) -> tuple[list[int], list[Any]]:
    """`items` as token ids or as whole prompts, and an empty list of the other. Raises `mixed` for some of both.

    There may be a million, so the loop over them is not Python's."""
    kinds = set(map(type, items))
    if kinds <= {int}:
        return items, []
    if int in kinds:
        raise mixed
    return [], items


def pack_ids(ids: list[int], param: str) -> bytes:
    """Token ids as little-endian int32."""
    if not ids:
        raise RequestError(f"{param} is an empty list; send at least one token id", param=param)
    return struct.pack(f"<{len(ids)}i", *ids)


# ── from Generates to an answer ──────────────────────────────────────────────────────────────


async def answer(
    request: web.Request,
    rid: str,
    jobs: Sequence[Generate],
    reply: Reply,
    *,
    endpoint: str,
    stream: bool,
    samples: int = 1,
    words: Callable[[int], Words] | None = None,
) -> web.StreamResponse:
    """Run `jobs` together and answer `request`, known as `rid`, with them; what one raises ends all.

    There are `samples` of them in a row to each prompt, and errors of a prompt are told in the `words` for its number.
    Errors raised before the first chunk reach the caller."""
    if (trace := TRACE.get()) is not None:
        trace.samples = samples
    service = request.app[SERVICE]
    each = None if words is None else lambda number: words(number // samples)
    opened = service.replies(request, rid, jobs, endpoint=endpoint, words=each)
    if stream:
        return await send_replies(request, opened, reply)
    async with opened as boxes:
        replies = await in_turn(request, whole(boxes))
    return json_response(reply.whole(replies))
