"""The keys of a router: those that clients must send, those that change the workers, and those that workers get.

The first two are as an engine's (`engine.http.keys`). A worker gets the client's own key, or the one that
`--worker-key-file` has for it. Then clients need no key of a worker's, so the router asks for one of its own.

Whoever has shown such a key is named to the worker in a header, so that a worker that asks for none, or gets the same
one for all clients, tells them apart. The name says nothing of the key to those who do not have the one that goes with
it. Routers with the same file agree on it, and when a key changes, its client or all are new ones to the worker.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from msgspec import Struct

from engine.errors import ConfigError, RequestError
from engine.http.keys import CLIENT, RELOAD_SECONDS, Keys, Stamp, client_name, stamp_of
from engine.http.origins import binds_loopback
from engine.options.listening import ListenOptions
from engine.router.options import RouterConfig

CREDENTIALS: Final = ("Authorization", "x-api-key")
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
log = logging.getLogger("engine.router")


def admin_keys(config: RouterConfig) -> "AdminKeys":
    """Raises ConfigError for a file of keys that is none."""
    options = ListenOptions(api_key=config.router.admin_key, api_key_file=config.router.admin_key_file)
    return AdminKeys(Keys(options, option="--admin-key-file"), local=binds_loopback(config.server.host))


class AdminKeys:
    """Whether whoever asks may change the workers. Without any keys, `local` callers alone may."""

    def __init__(self, keys: Keys, *, local: bool) -> None:
        self._keys = keys
        self._local = local

    def have(self, given: list[str]) -> bool:
        """Whether one of the keys `given` is an admin's."""
        return self._keys.asked and self._keys.have(given)

    def check(self, given: list[str]) -> None:
        """Raise RequestError unless one of the keys `given` is an admin's."""
        if not self._keys.asked:
            if self._local:
                return
            raise RequestError(
                "this router has no admin key, and listens beyond this machine, so nobody may change its workers; "
                "start it with --admin-key or --admin-key-file",
                code="admin_key_required",
                status=403,
            )
        if not self._keys.have(given):
            raise RequestError(
                "changing workers needs the router's admin key; send it as `Authorization: Bearer KEY`",
                code="admin_key_required",
                status=401,
            )


class Caller(Struct, frozen=True):
    """Whom a worker is asked for: `headers` by which it knows its client, and the way the request came; and the `key`
    that the client has shown, if it was asked for one."""

    headers: Mapping[str, str] = NOTHING
    key: str | None = None

    def towards(self, worker_key: str | None) -> dict[str, str]:
        """The headers for a worker that gets `worker_key`, if that is given, in place of the client's own."""
        kept = {name: value for name, value in self.headers.items() if worker_key is None or name not in CREDENTIALS}
        return kept | credentials(self.key, worker_key)


NOBODY: Final = Caller()


def credentials(key: str | None, worker_key: str | None) -> dict[str, str]:
    """The headers that tell a worker who asks, beside those of the client: `worker_key` in place of its own, if there
    is one, and a name for the client that has shown `key`, if it was asked for one."""
    said = {} if worker_key is None else {"Authorization": f"Bearer {worker_key}"}
    if key:
        said[CLIENT] = client_name(key, worker_key or key)
    return said


class WorkerKeys:
    """What `--worker-key-file` says. Raises ConfigError for a file that cannot be read."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._next = 0.0
        self._all: str | None = None
        self._each: dict[str, str] = {}
        if path is not None:
            self._read(path)

    def of(self, url: str) -> str | None:
        """The key of the worker at `url`; None where the client's own is passed on."""
        if self._path is None:
            return None
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + RELOAD_SECONDS
            try:
                if stamp_of(self._path) != self._stamp:
                    self._read(self._path)
            except ConfigError as error:
                log.error("%s; the keys that it had before stay", error)
        return self._each.get(url, self._all)

    def _read(self, path: str) -> None:
        self._stamp = stamp_of(path)
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--worker-key-file {path} cannot be read: {error}") from None
        found: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2 or (len(words) == 2 and "://" not in words[0]):
                raise ConfigError(f"line {number} of --worker-key-file {path} is not `KEY` and not `URL KEY`")
            found[words[0].rstrip("/") if len(words) == 2 else ""] = words[-1]
        if not found:
            raise ConfigError(f"--worker-key-file {path} has no key; write `KEY`, or `URL KEY` for each worker")
        self._all, self._each = found.pop("", None), found
