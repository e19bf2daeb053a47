"""The options of `engine router`, those of `engine up`, and those by which an engine registers at a router.

They are declared as engine/config.py declares the engine's: flags, variables and docs/options.md derive from here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct
from msgspec.structs import fields

from engine.options.listening import ListenOptions
from engine.options.option import Positive
from engine.options.resolving import refuse_unknown, said
from engine.router.policy import INDEX_CHARS

Seconds = Annotated[float, Meta(gt=0)]
Words = Annotated[str, Meta(min_length=1)]
PREFIX = "ENGINE_ROUTER_"  # of variables: one environment may be that of an engine and of a router


class RouterOptions(Struct, frozen=True, kw_only=True):
    """Router."""

    variables: ClassVar[str] = PREFIX
    workers: Annotated[tuple[str, ...], Meta(description="URLs of workers, http://a:8000,http://b:8000")] = ()
    policy: Annotated[str, Meta(description="who gets a request: a routing policy's name")] = "cache_aware"
    index_chars: Annotated[
        int,
        Meta(
            ge=2**13,
            description="most characters of prompts that a policy remembers of one worker; what was used least lately "
            "is forgotten first",
        ),
    ] = INDEX_CHARS
    plugins: Annotated[tuple[str, ...], Meta(description="plugins to load, by name: a,b")] = ()
    workers_file: Annotated[
        Words | None, Meta(description="a file of workers, one URL a line; it is read again when it changes")
    ] = None
    workers_dns: Annotated[
        Words | None, Meta(description="NAME:PORT; each address of the name is a worker, asked for every 5 seconds")
    ] = None
    worker_key_file: Annotated[
        Words | None,
        Meta(
            description="a file with the key that workers get in place of the client's: KEY for all, or a line `URL "
            "KEY` for each; it is read again when it changes"
        ),
    ] = None
    admin_key: Annotated[
        Annotated[tuple[str, ...], Meta(min_length=1)] | None,
        Meta(
            description="keys that may change the workers, a,b; default: anybody where --host is this machine alone, "
            "else nobody"
        ),
    ] = None
    admin_key_file: Annotated[Words | None, Meta(description="a file of more such keys, one a line")] = None
    peers: Annotated[tuple[str, ...], Meta(description="URLs of other routers of these workers, to share with")] = ()
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severe log line shown")
    ] = "info"


class HealthOptions(Struct, frozen=True, kw_only=True):
    """Health of workers."""

    variables: ClassVar[str] = PREFIX
    health_seconds: Annotated[Seconds, Meta(description="seconds between two heartbeats of a worker")] = 1.0
    health_timeout: Annotated[Seconds, Meta(description="seconds that a worker may take to answer one")] = 3.0
    health_failures: Annotated[
        Positive, Meta(description="heartbeats in a row that are not answered in time before a worker counts as hung")
    ] = 2
    connect_timeout: Annotated[Seconds, Meta(description="seconds to connect to a worker")] = 3.0
    breaker_failures: Annotated[
        Positive, Meta(description="requests in a row that a worker fails before it gets no more for a while")
    ] = 3
    breaker_seconds: Annotated[
        Seconds, Meta(description="how long that while is at first; it doubles with each failure, up to a minute")
    ] = 1.0
    broken_seconds: Annotated[
        Seconds, Meta(description="seconds after which streams of a worker that hangs are broken off")
    ] = 60.0


class QueueOptions(Struct, frozen=True, kw_only=True):
    """Queue of the router."""

    variables: ClassVar[str] = PREFIX
    worker_limit: Annotated[Positive, Meta(description="most requests at a worker at a time")] = 1024
    max_queue: Annotated[
        int, Meta(ge=0, description="most requests that wait for a worker; one more is answered 429")
    ] = 4096
    queue_seconds: Annotated[
        Seconds, Meta(description="longest that a request waits for a worker; then it is answered 503")
    ] = 60.0
    retries: Annotated[
        int, Meta(ge=0, description="how often a request that has not begun to be answered is sent elsewhere")
    ] = 3


class RouterServerOptions(ListenOptions, frozen=True, kw_only=True):
    """HTTP server of the router."""

    variables: ClassVar[str] = PREFIX
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8080
    log_requests: Annotated[
        bool, Meta(description="a log line for each request that ends: id, route, status, worker, seconds")
    ] = False


class RouterConfig(Struct, frozen=True, kw_only=True):
    """All options of one router, by group."""

    router: RouterOptions = RouterOptions()
    health: HealthOptions = HealthOptions()
    queue: QueueOptions = QueueOptions()
    server: RouterServerOptions = RouterServerOptions()


def router_groups() -> dict[str, type[Struct]]:
    """The option groups of RouterConfig by field name, in order."""
    return {field.name: field.type for field in fields(RouterConfig)}


class UpOptions(Struct, frozen=True, kw_only=True):
    """Replicas."""

    replicas: Annotated[Positive, Meta(description="engines to start behind the router")] = 2
    routing: Annotated[str, Meta(description="who gets a request: a routing policy's name")] = RouterOptions().policy


class RegisterOptions(Struct, frozen=True, kw_only=True):
    """Registration at a router."""

    register: Annotated[
        tuple[str, ...], Meta(description="URLs of routers at which the engine registers while it is ready")
    ] = ()
    register_as: Annotated[
        Words | None, Meta(description="URL by which routers reach the engine; default: that of --host and --port")
    ] = None
    register_key: Annotated[Words | None, Meta(description="an admin key of these routers")] = None
    register_key_file: Annotated[Words | None, Meta(description="a file with that key")] = None


def resolve_router(given: Mapping[str, Any], environ: Mapping[str, str]) -> RouterConfig:
    """As `engine.config.resolve`, of a router's options. Raises ConfigError."""
    groups = router_groups()
    refuse_unknown(given, environ, groups.values())
    values: dict[str, Any] = {group: struct(**said(struct, given, environ)) for group, struct in groups.items()}
    return RouterConfig(**values)
