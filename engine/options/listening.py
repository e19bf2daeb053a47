"""The options of whatever listens for HTTP: an engine's server, and the router.

They say where it listens, who may call, and how much a client may take. Left out: what is served there.
"""

from typing import Annotated

from msgspec import Meta, Struct

from engine.options.option import Positive
from engine.options.sizes import Size


class ListenOptions(Struct, frozen=True, kw_only=True):
    """HTTP."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    api_key: Annotated[
        Annotated[tuple[str, ...], Meta(min_length=1)] | None,
        Meta(description="keys, a,b: clients must send one as `Authorization: Bearer KEY`; default: none asked"),
    ] = None
    api_key_file: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="a file of more keys, one a line; it is read again when it changes"),
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="names that a request's Host may have, a,*.b: beside localhost and addresses; * is any; "
            "default: none more where --host is this machine alone, else any"
        ),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="origins of pages that may use the server, http://localhost:5173,https://b: beside its own; "
            "* is any, without cookies; default: none more"
        ),
    ] = ()
    log_requests: Annotated[
        bool,
        Meta(description="a log line for each request that ends: id, route, status, tokens, seconds; not for probes"),
    ] = False
    drain_seconds: Annotated[float, Meta(ge=0, description="seconds that SIGTERM leaves running requests to end")] = (
        30.0
    )
    max_connections: Annotated[
        Positive | None,
        Meta(
            description="most connections; one more is answered 503; default: 4096, or fewer where the limit of open "
            "files is low"
        ),
    ] = None
    max_body_memory: Annotated[
        Size,
        Meta(ge=1, description="most bytes of request bodies being read or decoded, unpacked; beyond it 503"),
    ] = 256 * 2**20
    max_open_memory: Annotated[
        Size,
        Meta(
            ge=1,
            description="most bytes of the bodies of open requests, which are read, wait or run; beyond it 503; one "
            "client alone may have three quarters of it",
        ),
    ] = 4 * 2**30
    read_timeout: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds for the head of a request; a body must bring 512 bytes for each of them, and may take "
            "as long as it does; later is 408",
        ),
    ] = 30.0
    write_timeout: Annotated[
        float,
        Meta(gt=0, description="seconds that a client may take nothing of an answer before it is disconnected (Linux)"),
    ] = 600.0

    @property
    def keyed(self) -> bool:
        """Whether clients must send a key."""
        return bool(self.api_key or self.api_key_file)
