"""An engine tells routers that it is there: once it is ready and again and again, and that it leaves when it drains.

Saying it again costs a router nothing, and one that was started anew learns of its workers so. A router that cannot be
reached is asked again, and never stops the engine. Left out: the router's side (`admin`).
"""

import logging
from pathlib import Path
from typing import Final

import aiohttp
import anyio

from engine.errors import ConfigError
from engine.http.origins import binds_loopback
from engine.options.listening import ListenOptions
from engine.router.options import RegisterOptions

AGAIN_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 1.0
LEAVE_SECONDS: Final = 3.0
log = logging.getLogger("engine")


class Registration:
    """Raises ConfigError for options that cannot work."""

    def __init__(self, options: RegisterOptions, server: ListenOptions) -> None:
        self._routers = [url.rstrip("/") for url in options.register]
        for url in self._routers:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"--register names {url!r}, which is no URL; write http://host:port")
        self._url = options.register_as
        self._staying: anyio.CancelScope | None = None
        self._key = options.register_key
        if options.register_key_file is not None:
            try:
                self._key = Path(options.register_key_file).read_text(encoding="utf-8").split("\n")[0].strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--register-key-file {options.register_key_file} cannot be read: {error}") from None
        everywhere = server.host in ("", "0.0.0.0", "::")
        if self._routers and self._url is None and everywhere and not all(map(_is_here, self._routers)):
            raise ConfigError(
                f"--register needs --register-as where --host is {server.host!r}: say the URL by which the router "
                "reaches this engine"
            )

    async def run(self, url: str) -> None:
        """Register the engine, which listens at `url`, until it leaves."""
        self._url = self._url or url
        with anyio.CancelScope() as self._staying:
            async with anyio.create_task_group() as group:
                for router in self._routers:
                    group.start_soon(self._stay, router)

    async def _stay(self, router: str) -> None:
        said = ""
        async with self._session() as session:
            while True:
                body: dict[str, object] = {"url": self._url, "registered": True}
                now = await _status(session, "POST", f"{router}/workers", body)
                if now != said:
                    log.log(logging.INFO if now == "200" else logging.ERROR, "registering at %s: %s", router,
                            "done" if now == "200" else f"{now}; it is tried again")  # fmt: skip
                said = now
                await anyio.sleep(AGAIN_SECONDS if now == "200" else RETRY_SECONDS)

    async def leave(self) -> None:
        """Tell the routers to send no more requests; what runs here goes on."""
        if self._staying is None:
            return
        self._staying.cancel()
        with anyio.move_on_after(LEAVE_SECONDS):
            async with self._session() as session, anyio.create_task_group() as group:
                for router in self._routers:
                    query = f"{router}/workers?registered=true&wait=false&url={self._url}"
                    group.start_soon(_status, session, "DELETE", query, None)

    def _session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=LEAVE_SECONDS))


async def _status(session: aiohttp.ClientSession, method: str, url: str, body: dict[str, object] | None) -> str:
    """The status of the answer, or why there is none, in words."""
    try:
        async with session.request(method, url, json=body) as answer:
            return "200" if answer.status == 200 else f"{answer.status} {(await answer.text())[:300]}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return f"no answer ({type(error).__name__})"


def _is_here(url: str) -> bool:
    return binds_loopback(aiohttp.client.URL(url).host or "")
