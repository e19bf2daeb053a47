"""Routes for operators: health, what the server is and does, metrics, and those that act on running work."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

import anyio
import msgspec
from aiohttp import web
from msgspec import Meta

from engine import __version__
from engine.errors import RequestError, counted
from engine.http.admin import experts
from engine.http.fields import Rule, unserved
from engine.http.keys import owner_of
from engine.http.openapi import Route
from engine.http.repeated import joined
from engine.http.service import SERVICE
from engine.http.wire import Body, Reply, json_response
from engine.messages.questions import Profile
from engine.messages.request import Embed, Generate, Job
from engine.params.sampling import INT32_MAX, SamplingDefaults, SamplingParams
from engine.runtime.board import Board, Counter

PROBE_SECONDS = 20.0  # an answer that takes longer is no sign of health
SECRET = frozenset({"api_key"})
MOST_PROFILED = 1000  # steps of a trace: beyond, nobody can open the file


# ── bodies and replies ───────────────────────────────────────────────────────────────────────


class AbortBody(Body):
    rid: str | None = None
    abort_all: bool = False


class PauseBody(Body):
    """`in_place` keeps requests where they are, `retract` sends them back to the queue, `abort` ends them first."""

    mode: Literal["in_place", "retract", "abort"] = "in_place"


class ProfileBody(Body):
    """`num_steps` is how many steps to trace, by default as many as run before /stop_profile, at most 1000.

    `output_dir` is a directory in that of --profile-dir."""

    num_steps: Annotated[int, Meta(ge=1, le=MOST_PROFILED)] | None = None
    output_dir: str | None = None
    activities: Any = None
    start_step: Any = None
    with_stack: Any = None
    record_shapes: Any = None
    profile_by_stage: Any = None
    profile_prefix: Any = None
    merge_profiles: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "activities": unserved([], ["CPU", "GPU"]),
        "start_step": unserved(),
        "with_stack": unserved(False),
        "record_shapes": unserved(False),
        "profile_by_stage": unserved(False),
        "profile_prefix": unserved(),
        "merge_profiles": unserved(False),
    }


class HealthReply(Reply, omit_defaults=True, frozen=True):
    status: str
    cause: str = ""


class LiveReply(Reply, omit_defaults=True, frozen=True):
    status: Literal["alive", "dead"]
    cause: str = ""


class VersionReply(Reply, frozen=True):
    version: str


class ProbeReply(Reply, frozen=True):
    status: str
    seconds: float


class AbortReply(Reply, frozen=True):
    aborted: int


class FlushReply(Reply, frozen=True):
    freed: int
    in_use: int


class PauseReply(Reply, frozen=True):
    paused: bool


class ProfileReply(Reply, frozen=True):
    """`path` of the trace, which is there once `running` is false."""

    path: str
    running: bool


class ServerInfo(Reply, frozen=True):
    """`options` are those of docs/options.md, without secrets; `device` and `startup` are null until it is ready.

    `internal_states` has the figures of each scheduler; SGLang names it so."""

    version: str
    status: str
    cause: str
    created: int
    served_model_names: tuple[str, ...]
    options: dict[str, dict[str, Any]]
    device: dict[str, Any] | None
    startup: dict[str, float] | None
    internal_states: list[dict[str, Any]]


class ModelInfo(Reply, frozen=True):
    model_path: str
    tokenizer_path: str
    served_model_names: tuple[str, ...]
    is_generation: bool
    max_model_len: int | None
    vocab_size: int | None
    has_chat_template: bool | None
    sampling_defaults: SamplingDefaults | None  # of the fields that a request leaves out; null until they are read


# ── looking ──────────────────────────────────────────────────────────────────────────────────


async def health(request: web.Request) -> web.Response:
    """Say whether a request would be served now: 200, else 503 with the cause."""
    front = request.app[SERVICE].front
    state = front.health()
    if state.ok:  # others take the requests of a front that is being started again
        return json_response(HealthReply(state.status, starting_of(front.board)))
    return json_response(HealthReply(state.status, state.cause), status=503)


def starting_of(board: Board) -> str:
    """Which fronts do not answer yet; nothing where all do."""
    starting = [str(n) for n in range(board.count) if n != board.number and not board.of(n, Counter.BEATS)]
    return f"of {board.count} fronts, {', '.join(starting)} (from 0) starts; the others answer" if starting else ""


async def livez(request: web.Request) -> web.Response:
    """Say whether the process and its scheduler live: 200 while loading, paused or draining too, else 503."""
    cause = request.app[SERVICE].front.dead()
    return json_response(LiveReply("dead" if cause else "alive", cause), status=503 if cause else 200)


async def version(request: web.Request) -> web.Response:
    """Tell the version of the engine."""
    return json_response(VersionReply(__version__))


async def health_generate(request: web.Request) -> web.Response:
    """Generate one token, or a vector, ahead of all that waits: 200 when it came, else 503 with the cause."""
    front = request.app[SERVICE].front
    state = front.health()
    if not state.ok:
        return json_response(HealthReply(state.status, state.cause), status=503)
    probe = probe_of(makes_vectors=front.info is not None and front.info.embedding_size > 0)
    began = time.perf_counter()
    with anyio.move_on_after(PROBE_SECONDS):
        async for _ in front.generate(probe):
            pass
        return json_response(ProbeReply(state.status, time.perf_counter() - began))
    return json_response(HealthReply("stalled", f"no answer within {PROBE_SECONDS:.0f} s"), status=503)


def probe_of(*, makes_vectors: bool) -> Job:
    """A request that is answered if any is: of the token 0."""
    rid = f"health-{uuid4().hex}"
    if makes_vectors:
        return Embed(rid, ids=bytes(4), priority=INT32_MAX)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    return Generate(rid, sampling, ids=bytes(4), priority=INT32_MAX)


async def metrics(request: web.Request) -> web.Response:
    """Give all figures in the format of Prometheus."""
    await experts.refresh(request.app[SERVICE])
    body, content_type = request.app[SERVICE].metrics.page(joined(request.headers, "Accept"))
    return web.Response(body=body, headers={"Content-Type": content_type})


async def server_info(request: web.Request) -> web.Response:
    """Tell the version, the options as resolved, the device, the start and the scheduler's figures."""
    service = request.app[SERVICE]
    front = service.front
    state, stats = front.health(), named(front.stats)
    del stats["step_seconds"], stats["make_seconds"]
    device = None if front.info is None else named(front.info)
    phases = None if device is None else device.pop("phases")
    options = {
        group: {name: value for name, value in fields.items() if name not in SECRET}
        for group, fields in msgspec.to_builtins(front.config).items()
    }
    return json_response(
        ServerInfo(
            __version__, state.status, state.cause, front.created, service.models, options, device, phases, [stats]
        )
    )


def named(value: Any) -> Any:
    """Messages, which are arrays between processes, as objects that name their fields, and what is in them, too."""
    if isinstance(value, msgspec.Struct):
        return {name: named(getattr(value, name)) for name in value.__struct_fields__}
    return [named(each) for each in value] if isinstance(value, tuple) else value


async def model_info(request: web.Request) -> web.Response:
    """Tell what model is served, and its bounds."""
    service = request.app[SERVICE]
    front = service.front
    model, info = front.config.model, front.info
    text = front.text
    chat, defaults = (None, None) if text is None else (text.has_template, text.defaults)
    length, vocabulary = (None, None) if info is None else (info.max_model_len, info.vocab_size)
    generates = info is None or not info.embedding_size
    return json_response(
        ModelInfo(model.model, model.model, service.models, generates, length, vocabulary, chat, defaults)
    )


# ── acting ───────────────────────────────────────────────────────────────────────────────────


async def abort_request(request: web.Request, body: AbortBody) -> web.Response:
    """End one request of the API key by its exact id, or all of everybody; unknown ids are no error."""
    if body.abort_all == (body.rid is not None):
        rid = None if body.rid is None else body.rid[:200]
        message = f"rid is {rid!r} and abort_all is {body.abort_all}; send a rid, or abort_all: true, not both"
        raise RequestError(message, param="rid")
    return json_response(AbortReply(await request.app[SERVICE].abort(body.rid, owner_of(request))))


async def flush_cache(request: web.Request) -> web.Response:
    """Forget every cached prefix that no running request uses. A 503 where a disk below may still have what it had."""
    flushed = await request.app[SERVICE].front.flush()
    if flushed.uncleared:
        message = (
            f"{counted(flushed.freed, 'page')} of the device are forgotten, and all of the host's, but the store below "
            f"has not forgotten what it had: {flushed.uncleared}. It is asked again, and not read before it has. But "
            "an engine that is started anew would read it: repair the store and send this again, or remove its files "
            "while no engine runs"
        )
        raise RequestError(message, code="store_not_cleared", status=503)
    return json_response(FlushReply(flushed.freed, flushed.in_use))


async def pause_generation(request: web.Request, body: PauseBody) -> web.Response:
    """Plan no more steps; the answer comes when the device is idle. Requests stay open, new ones wait."""
    service = request.app[SERVICE]
    if body.mode == "abort":
        await service.abort(None)
    await service.front.pause(True, retract=body.mode == "retract")
    return json_response(PauseReply(True))


async def continue_generation(request: web.Request) -> web.Response:
    """Go on where /pause_generation stopped."""
    await request.app[SERVICE].front.pause(False)
    return json_response(PauseReply(False))


async def start_profile(request: web.Request, body: ProfileBody) -> web.Response:
    """Trace the next steps of the device worker into a file for chrome://tracing or Perfetto."""
    folder = profile_folder(request.app[SERVICE].options.profile_dir, body.output_dir)
    path = await request.app[SERVICE].front.ask(Profile(str(folder), body.num_steps or MOST_PROFILED))
    return json_response(ProfileReply(path, running=True))


async def stop_profile(request: web.Request) -> web.Response:
    """End the trace that runs; the answer comes when the file is written. One that has ended by itself is named."""
    profile_folder(request.app[SERVICE].options.profile_dir, None)
    path = await request.app[SERVICE].front.ask(Profile())
    return json_response(ProfileReply(path, running=False))


def profile_folder(allowed: str | None, wanted: str | None) -> Path:
    """Where a trace may go. Raises RequestError for what does not lie in `allowed`, links followed."""
    if allowed is None:
        raise RequestError("this server writes no traces; start it with --profile-dir DIR", code="not_supported")
    base = Path(allowed).resolve()
    folder = (base / (wanted or "")).resolve()
    if not folder.is_relative_to(base):
        message = f"output_dir is {wanted!r}, which is not in --profile-dir; send a relative path, or leave it out"
        raise RequestError(message, param="output_dir")
    return folder


ROUTES = (
    Route("POST", "/abort_request", abort_request, takes=AbortBody, gives=AbortReply),
    Route("POST", "/flush_cache", flush_cache, gives=FlushReply),
    Route("POST", "/pause_generation", pause_generation, takes=PauseBody, gives=PauseReply),
    Route("POST", "/continue_generation", continue_generation, gives=PauseReply),
    Route("POST", "/start_profile", start_profile, takes=ProfileBody, gives=ProfileReply),
    Route("POST", "/stop_profile", stop_profile, gives=ProfileReply),
    # Probes and Prometheus carry no key.
    Route("GET", "/health", health, gives=HealthReply, unready=HealthReply, open=True),
    Route("GET", "/readyz", health, gives=HealthReply, unready=HealthReply, open=True),
    Route("GET", "/ping", health, gives=HealthReply, unready=HealthReply, open=True),
    Route("POST", "/ping", health, gives=HealthReply, unready=HealthReply, open=True),
    Route("GET", "/livez", livez, gives=LiveReply, unready=LiveReply, open=True),
    Route("GET", "/health_generate", health_generate, gives=ProbeReply, unready=HealthReply),
    Route("GET", "/metrics", metrics, open=True, content="text/plain"),
    Route("GET", "/version", version, gives=VersionReply),
    Route("GET", "/server_info", server_info, gives=ServerInfo),
    Route("GET", "/get_server_info", server_info, gives=ServerInfo),
    Route("GET", "/model_info", model_info, gives=ModelInfo),
    Route("GET", "/get_model_info", model_info, gives=ModelInfo),
)
