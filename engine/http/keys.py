"""API keys: which ones the server takes, and the check of every request that needs one.

Keys are kept as digests under a secret of this process and compared with all of them, so the time of an answer tells
neither how long a key is, nor how much of it was right, nor which one matched. A file of keys is read again when it
has changed, so that a key can be given out or withdrawn without a restart.

A key is also the owner of sessions, programs, stored responses and running requests. A router shows its own key in
place of its client's, so it names the client in a header, and then key and name together are the owner. The header is
believed from anybody, also where no key is asked for. For a name can be made only from the key of its client, so to
name another client one has to know that client's key. Left out: what a router sends (`engine.router.keys`).
"""

import hashlib
import hmac
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.errors import ConfigError, RequestError
from engine.http.repeated import joined, once
from engine.options.listening import ListenOptions

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

RELOAD_SECONDS = 1.0  # how old what is known of the file may be
MOST_BYTES = 2**20
MOST_KEYS = 1000
log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
KEY = web.RequestKey("key", str)  # that a request has shown, one of the server's
CLIENT = "X-Engine-Client"  # by which a router tells its clients apart


def read_keys(path: str, option: str = "--api-key-file") -> list[str]:
    """The keys in the file at `path`, which `option` names: one a line, without blank lines and those that begin with
    `#`.

    Raises ConfigError, which quotes no line, for a file that cannot be read or has no keys."""
    origin = f"{option} {path}"
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode()
    except OSError as error:
        raise ConfigError(f"{origin} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{origin} is not UTF-8; write one key a line") from None
    lines = [line.strip() for line in text.removeprefix("\ufeff").splitlines()]
    for number, line in enumerate(lines, start=1):
        if not line.startswith("#") and len(line.split()) > 1:
            raise ConfigError(f"line {number} of {origin} has a space in it; write one key a line, comments behind #")
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{origin} has no keys; write one a line, or leave the option out to ask for none")
    if len(keys) > MOST_KEYS or len(text) > MOST_BYTES:
        raise ConfigError(f"{origin} has over {MOST_KEYS} keys or {MOST_BYTES} bytes; give out fewer")
    return keys


def own_key(options: ListenOptions) -> str | None:
    """The key that a client started with the server's own options sends: the first one."""
    if options.api_key:
        return options.api_key[0]
    return read_keys(options.api_key_file)[0] if options.api_key_file else None


class Keys:
    """The keys of one server. Raises ConfigError for a file of keys that is none."""

    def __init__(self, options: ListenOptions, *, option: str = "--api-key-file") -> None:
        self._option = option
        self._secret = secrets.token_bytes(32)
        self._given = [self._digest(key) for key in options.api_key or ()]
        self._path = options.api_key_file
        self._stamp = None if self._path is None else stamp_of(self._path)
        self._filed = [] if self._path is None else [self._digest(key) for key in read_keys(self._path, option)]
        self._next = time.monotonic() + RELOAD_SECONDS

    @property
    def asked(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._given) or self._path is not None

    def have(self, candidates: Iterable[str]) -> bool:
        """Whether one of `candidates` is a key, in a time that depends on how many there are alone."""
        self._reread()
        found = False
        for candidate in candidates:
            digest = self._digest(candidate)
            for known in (*self._given, *self._filed):
                found |= hmac.compare_digest(digest, known)
        return found

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(_bytes_of(key), key=self._secret, digest_size=32).digest()

    def _reread(self) -> None:
        """Take the file's keys anew if it has changed. What cannot be read is logged, and the keys before it stay."""
        if self._path is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + RELOAD_SECONDS
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = read_keys(self._path, self._option)
        except ConfigError as error:
            log.error("%s; the keys that it had before stay valid", error)
            return
        self._filed = [self._digest(key) for key in keys]
        log.info("read %d API keys from %s", len(keys), self._path)


def stamp_of(path: str) -> Stamp | None:
    """What changes when the file at `path` does; always None for what can be read once only, like a pipe."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def keys_in(request: web.Request) -> list[str]:
    """The keys that `request` carries, as a bearer token or as Anthropic's header.

    Raises RequestError for several of one kind."""
    scheme, _, bearer = (once(request.headers, "Authorization") or "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    key = once(request.headers, "x-api-key")
    return given if key is None else [*given, key.strip()]


def digest_of(key: str) -> bytes:
    """What stands for a key where fronts must agree on whose something is. It is never told to anyone."""
    return hashlib.blake2b(_bytes_of(key), digest_size=16, person=b"owner").digest()


def client_name(key: str, sent: str) -> str:
    """What a router calls its client with the API `key` towards a worker that is `sent` another one, or the same:
    HMAC-SHA256 of the first under the second (RFC 2104), in hexadecimal digits."""
    return hmac.digest(_bytes_of(sent), _bytes_of(key), "sha256").hex()


def owner_of(request: web.Request) -> bytes:
    """Whose sessions, programs, stored responses and running requests `request` may name: the key's that it has shown,
    or the client's that a router names beside it. Empty where neither is there.

    A client that is named by the key that was shown is that key's owner, as without a router."""
    key, client = request.get(KEY, ""), joined(request.headers, CLIENT)
    if key and (not client or client == client_name(key, key)):
        return digest_of(key)
    if not client:
        return b""
    return hashlib.blake2b(_bytes_of(client), key=digest_of(key), digest_size=16, person=b"client").digest()


def _bytes_of(key: str) -> bytes:
    return key.encode(errors="surrogateescape")


def key_check(keys: Keys, open_paths: frozenset[str]) -> "Middleware":
    """A middleware that refuses requests without a key, sent as a bearer token or as Anthropic's header does."""

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not keys.asked or request.path in open_paths:
            return await handler(request)
        given = keys_in(request)
        if found := [key for key in given if keys.have([key])]:
            request[KEY] = found[0]
            return await handler(request)
        said = "wrong" if given or "Authorization" in request.headers else "missing"
        message = f"the API key is {said}; send the server's key as `Authorization: Bearer KEY`"
        raise RequestError(message, code="invalid_api_key", status=401)

    return check_key
