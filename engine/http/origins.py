"""Who may call: the Host and the Origin of every request, and CORS for the front-ends that are meant.

A browser sends what a page asks for to any address, 127.0.0.1 included, and only afterwards asks whether the page may
read the answer. So every request is judged before its handler runs, by what a browser adds and a page cannot forge:

- `Host`, on a loopback bind or with --allowed-hosts: a page whose name was rebound to 127.0.0.1 still sends that name;
- `Origin`: it must be the server's own, or stand in --cors-origins;
- `Sec-Fetch-Site`, where there is no Origin: another site may link to a page of ours, and load nothing.

Programs send none of the last two and are not affected. Left out: `X-Forwarded-*`, which any client can send; a
proxy in front keeps the Host or its origin is named. Left out too: API keys, which are in `keys`.
"""

import ipaddress
import logging
import re
import socket
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Struct

from engine.errors import ConfigError, RequestError
from engine.http.repeated import Headers, joined
from engine.options.listening import ListenOptions

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

PREFLIGHT_SECONDS = 7200  # how long a browser may remember a preflight; Chromium keeps none longer
AUTHORITIES = 256  # that are remembered: clients send the same Host again and again
MOST_TOLD = 32  # refused names and origins that are logged, once each
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
DEFAULT_PORTS = {"http": 80, "https": 443}
AUTHORITY = re.compile(r"(?:\[([0-9a-f]*:[0-9a-z:.%_-]*)\]|([a-z0-9._-]+))(?::([0-9]{0,5}))?", re.ASCII)
ORIGIN = re.compile(rf"([a-z][a-z0-9+.-]*)://{AUTHORITY.pattern}", re.ASCII)
# What pages may read of a cross-origin answer in any case, and what is of no use to them.
READABLE = frozenset({"cache-control", "content-length", "content-type", "date", "server", "vary"})
log = logging.getLogger(__name__)


# ── names and origins ────────────────────────────────────────────────────────────────────────


class Authority(NamedTuple):
    """A host, without brackets and in lower case, and its port, None where that is left out."""

    host: str
    port: int | None


class Origin(NamedTuple):
    """A scheme, a host and a port, None where the scheme has none of its own."""

    scheme: str
    host: str
    port: int | None


@lru_cache(AUTHORITIES)
def read_authority(text: str) -> Authority | None:
    """What a Host header says; None where it says nothing that a browser would send."""
    parts = AUTHORITY.fullmatch(text.lower())
    return None if parts is None else Authority(parts[1] or parts[2], int(parts[3]) if parts[3] else None)


def read_origin(text: str) -> Origin | None:
    """What an Origin header says, the scheme's default port filled in; None for `null` and what is no origin."""
    parts = ORIGIN.fullmatch(text.lower())
    if parts is None:
        return None
    port = int(parts[4]) if parts[4] else DEFAULT_PORTS.get(parts[1])
    return Origin(parts[1], parts[2] or parts[3], port)


def is_address(host: str) -> bool:
    """Whether `host` is an IP address. No name server decides where that leads, so it cannot be rebound."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_local(host: str) -> bool:
    """Whether `host` is a name that browsers keep on this machine (RFC 6761), or a loopback address."""
    if host in LOCAL or host.endswith(".localhost"):
        return True
    if not is_address(host):
        return False
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def binds_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from this machine alone."""
    if not host or is_local(host) or is_address(host):
        return bool(host) and is_local(host)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # listening on it will fail, and says why
        return False
    return all(is_local(str(address[0])) for *_, address in found)


# ── what the options allow ───────────────────────────────────────────────────────────────────


class Access(Struct, frozen=True):
    """Who may call. `hosts` None takes any Host; a name in it that begins with a dot is that of a whole domain."""

    origins: frozenset[Origin] = frozenset()
    any_origin: bool = False
    hosts: frozenset[str] | None = None

    @classmethod
    def of(cls, options: ListenOptions) -> "Access":
        """What --cors-origins, --allowed-hosts and --host say. Raises ConfigError for what is no origin or host."""
        any_origin = "*" in options.cors_origins
        if any_origin and len(options.cors_origins) > 1:
            said = ",".join(options.cors_origins)
            raise ConfigError(f"--cors-origins is {said!r}, but takes either * or a list of origins; drop one")
        origins = frozenset(_origin_of(one) for one in options.cors_origins if one != "*")
        names = frozenset(_host_of(one) for one in options.allowed_hosts if one != "*")
        checked = options.allowed_hosts or binds_loopback(options.host)
        own = {options.host.lower()} if checked else set()
        return cls(origins, any_origin, names | own if checked and "*" not in options.allowed_hosts else None)

    def takes_host(self, host: str) -> bool:
        """Whether a request may name `host`: a name of this machine, an address, or one of `hosts`."""
        if self.hosts is None or host in LOCAL:
            return True
        host = host.removesuffix(".")
        if host in self.hosts or host == "localhost" or host.endswith(".localhost"):
            return True
        dots = (index for index, letter in enumerate(host) if letter == ".")
        return any(host[dot:] in self.hosts for dot in dots) or is_address(host)

    def shares_with(self, origin: str) -> bool:
        """Whether pages of `origin`, as its header has it, may read answers."""
        return self.any_origin or (bool(self.origins) and read_origin(origin) in self.origins)

    def check(self, headers: Headers, *, target: str, page: bool) -> None:
        """Raise RequestError (403) unless whoever sent `headers` may.

        `target` is the request's target as it was sent: a path, or in absolute form a whole URL, whose host counts as
        well. `page` says that it is the GET of a page, which may be opened by a link from anywhere."""
        named = [*headers.getall("Host", ())]
        if not target.startswith(("/", "*")):
            named.insert(0, target.partition("://")[2].partition("/")[0].partition("?")[0])
        for one in named:
            self._check_host(one)
        if self.any_origin:
            return
        origin, site = joined(headers, "Origin"), joined(headers, "Sec-Fetch-Site")
        if origin:
            self._check_origin(origin, site, named[0] if named else "")
        elif site not in ("", "same-origin", "none") and not (page and _is_navigation(headers)):
            raise RequestError(
                f"a page of another site may not load this (Sec-Fetch-Site: {site[:200]!r}, and no Origin that "
                "--cors-origins could name); open it in a tab of its own, or fetch it from an allowed origin",
                code="origin_not_allowed",
                status=403,
            )

    def _check_host(self, given: str) -> None:
        authority = read_authority(given)
        # HTTP/1.0 may leave it out, and no browser does.
        if self.hosts is None or not given or (authority is not None and self.takes_host(authority.host)):
            return
        remedy = "" if authority is None else f"; if the server is meant, add {authority.host} to --allowed-hosts"
        raise RequestError(
            f"the Host header names {given[:200]!r}, and this server answers to localhost, to addresses and to the "
            f"names in --allowed-hosts{remedy[:300]}",
            code="host_not_allowed",
            status=403,
        )

    def _check_origin(self, origin: str, site: str, host: str) -> None:
        if site == "same-origin" or self.shares_with(origin):
            return
        asking = read_origin(origin)
        # Plain HTTP to another machine comes without Sec-Fetch-Site: then the two names tell.
        if not site and asking is not None and asking == read_origin(f"http://{host}"):
            return
        if asking is None:
            who = f"a page whose origin is {origin[:200]!r} (a file, or a sandboxed frame)"
            remedy = "serve it over HTTP and add that origin to --cors-origins"
        else:
            who = f"a page of {origin[:200]}"
            remedy = f"if it is meant to, add {origin[:200]} to --cors-origins"
        raise RequestError(f"{who} may not use this server; {remedy}", code="origin_not_allowed", status=403)


def _is_navigation(headers: Headers) -> bool:
    """Whether a whole tab goes there; a frame does not count, as its page could be clicked through."""
    mode, what = headers.getall("Sec-Fetch-Mode", ()), headers.getall("Sec-Fetch-Dest", ())
    return [*mode] == ["navigate"] and [*what] == ["document"]


def _origin_of(text: str) -> Origin:
    if text.lower() == "null":
        raise ConfigError(
            "--cors-origins names null, which is the origin of files and of every sandboxed frame, so any page could "
            "use it; serve the page over HTTP and name that origin, or allow all with *"
        )
    origin = read_origin(text.removesuffix("/"))
    if origin is None:
        raise ConfigError(
            f"--cors-origins names {text!r}, which is no origin; write scheme://host or scheme://host:port, as in "
            "http://localhost:5173, or * alone"
        )
    return origin


def _host_of(text: str) -> str:
    """A name of --allowed-hosts; of `*.example.com`, the domain with its dot."""
    authority = read_authority(text.removeprefix("*").removesuffix("."))
    if authority is None or authority.port is not None or authority.host in ("", "."):
        raise ConfigError(
            f"--allowed-hosts names {text!r}, which is no host; write a name without a port, as in gpu.example.com, "
            "*.example.com for all names under one (an international name in its xn-- form), or * for any"
        )
    return authority.host


# ── in the server ────────────────────────────────────────────────────────────────────────────


class Gate:
    """`Access` at the door of one application: refusals, preflights, and the headers that share an answer."""

    def __init__(self, access: Access, *, pages: frozenset[str], methods: frozenset[str]) -> None:
        self.access = access
        self._pages = pages
        self._methods = ", ".join(sorted(methods))
        self._told: set[str] = set()

    def join(self, app: web.Application) -> None:
        """Share the answers of `app`, of whatever kind, with the origins that are allowed, if any are."""
        if self.access.origins or self.access.any_origin:
            app.on_response_prepare.append(self._share)

    def middleware(self) -> "Middleware":
        """Refuses who may not call, and answers preflights, which carry no key and reach no handler."""

        @web.middleware
        async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
            page = request.method == "GET" and request.path in self._pages
            try:
                self.access.check(request.headers, target=request.raw_path, page=page)
            except RequestError as error:
                self._tell(error.message)
                raise
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                return web.Response(status=204, headers=self._preflight(request.headers))
            return await handler(request)

        return check_origin

    def _preflight(self, headers: Headers) -> dict[str, str]:
        """What may be sent: every method of the server, and whatever headers are asked for."""
        allowed = {"Access-Control-Allow-Methods": self._methods, "Access-Control-Max-Age": str(PREFLIGHT_SECONDS)}
        if asked := joined(headers, "Access-Control-Request-Headers"):
            allowed["Access-Control-Allow-Headers"] = asked
        if joined(headers, "Access-Control-Request-Private-Network") == "true":
            allowed["Access-Control-Allow-Private-Network"] = "true"
        return allowed

    async def _share(self, request: web.Request, response: web.StreamResponse) -> None:
        """Runs before the head of any answer is written, errors and streams included."""
        headers = response.headers
        if self.access.any_origin:
            headers["Access-Control-Allow-Origin"] = "*"  # and so browsers send and accept no cookies
        else:
            headers["Vary"] = f"{headers['Vary']}, Origin" if "Vary" in headers else "Origin"
            origin = joined(request.headers, "Origin")
            if not origin or not self.access.shares_with(origin):
                return
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Credentials"] = "true"
        if request.method != "OPTIONS":
            told = [name for name in headers if name.lower() not in READABLE and not name.startswith("Access-")]
            headers["Access-Control-Expose-Headers"] = ", ".join(told)

    def _tell(self, message: str) -> None:
        """Log a refusal once: a browser's console does not show its owner what the answer says."""
        if message not in self._told and len(self._told) < MOST_TOLD:
            self._told.add(message)
            log.warning("refused: %s", message)


def warn_of_any_origin(options: ListenOptions) -> None:
    """Say what `--cors-origins *` means where nothing else guards the server."""
    if "*" in options.cors_origins and not (options.api_key or options.api_key_file):
        log.warning("--cors-origins * without an API key: any page in a browser that reaches this server may use it")
