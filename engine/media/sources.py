"""Sources: the bytes of an image or a video, from where a client says they are.

| URL | taken |
|---|---|
| `data:` | base64, within the request |
| `http:`, `https:` | from hosts that are allowed, redirects too, each looked at anew (addresses.py) |
| `file:` | a file below `--media-root`, by no link and no `..` |

Bytes are counted as they come and time is limited, so an answer that never ends, ends here. Content types are only
looked at to refuse what is surely neither image nor video. All errors are RequestErrors whose messages go on from the
place of the part. Left out: what the bytes are (decoding.py), and which are fetched twice (store.py).
"""

import binascii
import os
import re
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes

import aiohttp
import anyio
import anyio.to_thread
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from engine.errors import RequestError, counted, shown
from engine.media.addresses import Hosts, check_literal, check_sources, not_allowed
from engine.options.media import MediaOptions

Kind = Literal["image", "video"]
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
MOST_URL = 8192  # characters of one that is no data: URL
PIECE = 1 << 16
MOST_HELD = 1 << 30  # bytes of all answers that are being read
# Characters of a data: URL that is decoded in a thread: fewer take some milliseconds. Percent signs take the longest.
LARGE, LARGE_QUOTED = 2 << 20, 32 << 10
MOST_FRESH = 3600.0  # seconds
WHATEVER = ("", "application/octet-stream", "binary/octet-stream")  # types that say nothing
TYPES: dict[str, tuple[str, ...]] = {
    "image": ("image/",),
    "video": ("video/", "image/gif", "image/webp", "image/apng", "application/mp4", "application/ogg"),
}
NOUNS = {"image": "an image", "video": "a video"}
MAX_AGE = re.compile(r"\bmax-age\s*=\s*(\d{1,9})")
UNKEPT = re.compile(r"\bno-(?:store|cache)\b|\bprivate\b")


class Fetched(NamedTuple):
    """What came, and for how many seconds its server says that it stays the same."""

    data: bytes
    fresh: float = 0.0


def unpacked(text: str) -> bytes:
    """The bytes that base64 stands for, which may have white space and be quoted as in a URL. Raises binascii.Error."""
    with suppress(msgspec.ValidationError, UnicodeEncodeError):
        return msgspec.convert(text, bytes)  # no less strict, and takes a tenth of the time
    packed = text.encode("ascii", "replace")
    packed = (unquote_to_bytes(packed) if b"%" in packed else packed).translate(None, b" \t\r\n")
    with suppress(msgspec.ValidationError):
        return msgspec.convert(packed.decode("latin-1"), bytes)
    return binascii.a2b_base64(packed, strict_mode=True)


class CheckedResolver(AbstractResolver):
    """Looks names up, and gives the connector only addresses that `hosts` allows. An address in the place of a name,
    which no connector looks up, is for `check_literal`."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The allowed addresses of `host`. Raises RequestError where it has none, OSError where it has no address."""
        found = await self._inner.resolve(host, port, family)
        allowed = [each for each in found if self._hosts.allows(host, each["host"])]
        if not allowed:
            raise not_allowed(host)
        return allowed

    async def close(self) -> None:
        """Nothing is open."""


class Sources:
    """Where media may come from. Raises ConfigError for options that cannot work."""

    def __init__(self, options: MediaOptions) -> None:
        self.most = options.media_bytes
        self._seconds = options.media_seconds
        self._hosts = check_sources(options)
        self._root = options.media_root
        self._held = 0  # bytes of answers that are being read

    async def read(self, source: str, kind: Kind) -> Fetched:
        """The bytes at `source`. Raises RequestError for what is not allowed, not there, too large or too slow."""
        scheme = source[:16].partition(":")[0].lower()
        if scheme == "data":
            if len(source) > (LARGE_QUOTED if "%" in source else LARGE):
                return Fetched(await anyio.to_thread.run_sync(self._inline, source, kind))
            return Fetched(self._inline(source, kind))
        if len(source) > MOST_URL:
            raise _not_allowed(f"is a URL of {counted(len(source), 'character')}, and at most {MOST_URL} are taken")
        if not source.isprintable():  # half of a surrogate pair is not
            raise _not_allowed(f"is {shown(source)}, which has characters that no URL has")
        with anyio.move_on_after(self._seconds):
            if scheme in ("http", "https"):
                return await self._fetched(source, kind)
            if scheme == "file":
                return Fetched(await anyio.to_thread.run_sync(self._file, source, abandon_on_cancel=True))
            raise _not_allowed(f"is {shown(source)}, and neither a data:, http:, https: nor file: URL")
        raise RequestError(
            f"took over {self._seconds:g} s to come from {shown(source)}, which is the limit (--media-seconds); send "
            "it as a data: URL",
            code="media_timeout",
        )

    def _check_size(self, size: int, at_least: str = "") -> None:
        if size > self.most:
            raise RequestError(
                f"has {at_least}{size} bytes, and at most {self.most} are taken (--media-bytes); send it smaller",
                code="media_too_large",
            )
        if not size:
            raise RequestError("is empty; send its bytes", code="invalid_media")

    # ── data: ────────────────────────────────────────────────────────────────────────────────

    def _inline(self, source: str, kind: Kind) -> bytes:
        """The bytes of a data: URL (RFC 2397)."""
        head, comma, text = source.partition(",")
        media_type, *parameters = head[len("data:") :].split(";")
        if not comma or "base64" not in (parameter.strip().lower() for parameter in parameters):
            raise RequestError(
                f"is {shown(source)}; a data: URL has the form data:{kind}/...;base64,...", code="invalid_media"
            )
        _check_type(media_type, kind)
        self._check_size(max(1, len(text) // 4), "at least ")  # a character may be spelled with three
        try:
            data = unpacked(text)
        except binascii.Error as error:
            raise RequestError(
                f"is not base64 after its comma ({error}); encode it anew", code="invalid_media"
            ) from None
        self._check_size(len(data))
        return data

    # ── http: ────────────────────────────────────────────────────────────────────────────────

    async def _fetched(self, source: str, kind: Kind) -> Fetched:
        connector = aiohttp.TCPConnector(resolver=CheckedResolver(self._hosts), use_dns_cache=False, force_close=True)
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),  # the whole of it has one limit, of ours
            headers={"Accept-Encoding": "identity", "User-Agent": "actorserve"},
        )
        async with session:
            try:
                return await self._followed(session, _url(source), kind)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise _refusal_in(error) or _unreachable(source, _said(error)) from None

    async def _followed(self, session: aiohttp.ClientSession, url: URL, kind: Kind) -> Fetched:
        for _ in range(MOST_REDIRECTS + 1):
            check_literal(self._hosts, url.raw_host or "")
            async with session.get(url, allow_redirects=False) as answer:
                _check_once(answer, "Location")
                if answer.status in REDIRECTS and (target := answer.headers.get("Location")):
                    url = _url(str(url.join(URL(target))))
                    continue
                if answer.status != 200:
                    raise _unreachable(str(url), f"it answers {answer.status}")
                return Fetched(await self._body(answer, kind), _fresh(answer.headers.getall("Cache-Control", ())))
        raise _unreachable(str(url), f"there are more than {MOST_REDIRECTS} redirects on the way")

    async def _body(self, answer: aiohttp.ClientResponse, kind: Kind) -> bytes:
        """The bytes of an answer, none of which is read if its head says that they are too many, or of another kind."""
        _check_once(answer, "Content-Type")
        _check_type(answer.content_type if "Content-Type" in answer.headers else "", kind)
        if (coding := ", ".join(answer.headers.getall("Content-Encoding", ("identity",))).lower()) != "identity":
            raise RequestError(f"comes packed ({coding[:40]}), unasked; send it as a data: URL", code="invalid_media")
        if (length := answer.content_length) is not None:
            self._check_size(length)
        data = bytearray()
        try:
            async for piece in answer.content.iter_chunked(PIECE):
                data += piece
                self._held += len(piece)
                if len(data) > self.most:
                    self._check_size(len(data), "at least ")
                if self._held > MOST_HELD:
                    raise RequestError(
                        f"cannot be fetched now: {MOST_HELD} bytes of others are on their way; try again in a moment",
                        code="queue_full",
                        status=503,
                    )
        finally:
            self._held -= len(data)
        self._check_size(len(data))
        return bytes(data)

    # ── file: ────────────────────────────────────────────────────────────────────────────────

    def _file(self, source: str) -> bytes:
        """The bytes of a file below the root. Each folder on the way is opened from the one before, and no link is
        followed, so there is no moment at which another file can be put in its place."""
        if self._root is None:
            raise _not_allowed("is a file: URL, and this server reads no files (--media-root)")
        root, path = os.path.realpath(self._root), os.fsdecode(unquote_to_bytes(_path(source)))
        parts = _parts_below(path, root) or _parts_below(path, os.path.abspath(self._root))
        if ".." in path.split(os.sep) or not parts or "\0" in path:
            raise _not_allowed(f"is the file {shown(path)}, which is not below --media-root")
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for number, part in enumerate(parts, start=1):
                kind = os.O_DIRECTORY if number < len(parts) else os.O_NONBLOCK
                inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise _not_allowed(f"is {shown(path)}, which is no regular file")
            self._check_size(found.st_size)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                data = file.read(self.most + 1)
            self._check_size(len(data))
            return data
        except OSError as error:
            raise _unreachable(source, f"{error.strerror}, or a link on the way") from None
        finally:
            with suppress(OSError):
                os.close(descriptor)


def _parts_below(path: str, root: str) -> list[str]:
    """The names on the way from `root` to `path`; none where it is not below."""
    begin = root.rstrip(os.sep) + os.sep
    if not path.startswith(begin):
        return []
    return [name for name in path[len(begin) :].split(os.sep) if name not in ("", ".")]


def _path(source: str) -> str:
    """The path of a file: URL, still with its percent signs."""
    rest = source[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise _not_allowed(f"is a file on the host {host[:80]!r}; name one of this server as file:///path")
        rest = slash + path
    return rest


def _url(source: str) -> URL:
    """`source` as a URL that may be fetched."""
    try:
        url = URL(source)
    except (ValueError, IndexError) as error:  # yarl has both
        raise _not_allowed(f"is {shown(source)}, which is no URL ({error})") from None
    if url.scheme not in ("http", "https"):
        raise _not_allowed(f"leads to a {url.scheme[:40]!r} URL, and only http and https are followed")
    if not url.raw_host:
        raise _not_allowed(f"is {shown(source)}, which names no host")
    if url.raw_user is not None or url.raw_password is not None:
        raise _not_allowed("is a URL with a user or a password in it, which this server does not pass on")
    return url


def _check_once(answer: aiohttp.ClientResponse, name: str) -> None:
    """Raises RequestError where the header `name` comes with several values: others may read another one."""
    if len(values := set(answer.headers.getall(name, ()))) > 1:
        cause = f"it answers with {len(values)} values of {name}, where one is allowed"
        raise _unreachable(str(answer.url), cause)


def _check_type(media_type: str, kind: Kind) -> None:
    """Raises RequestError for a content type that is surely of something else."""
    said = media_type.partition(";")[0].strip().lower()
    if said not in WHATEVER and not said.startswith(TYPES[kind]):
        raise RequestError(
            f"is of the type {said[:80]!r}, and {NOUNS[kind]} is needed; send {TYPES[kind][0]}...",
            code="invalid_media",
        )


def _fresh(lines: Sequence[str]) -> float:
    """For how many seconds the Cache-Control headers of an answer let it be kept."""
    control = ", ".join(lines).lower()
    said = MAX_AGE.search(control)
    return 0.0 if said is None or UNKEPT.search(control) else min(float(said[1]), MOST_FRESH)


def _refusal_in(error: BaseException | None) -> RequestError | None:
    """The refusal that a connector has made an error of its own of."""
    while error is not None and not isinstance(error, RequestError):
        error = error.__cause__ or error.__context__
    return error


def _said(error: Exception) -> str:
    """`error` in words, without what a server has sent."""
    return f"{type(error).__name__}: {error}".splitlines()[0] if isinstance(error, OSError) else type(error).__name__


def _not_allowed(what: str) -> RequestError:
    return RequestError(f"{what}; send it as a data: URL", code="media_not_allowed")


def _unreachable(source: str, cause: str) -> RequestError:
    return RequestError(
        f"cannot be fetched from {shown(source)} ({cause[:200]}); check the URL, or send it as a data: URL",
        code="media_unreachable",
    )
