"""What backends over HTTP share: the event loop that one lives in, and a request with a whole answer."""

import asyncio
from abc import abstractmethod
from collections.abc import Set
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn, Self

import aiohttp
import anyio.from_thread
import msgspec
from anyio.from_thread import BlockingPortal

from engine.client.client import Client, cause_of, changed
from engine.client.events import refusal
from engine.errors import RequestError, WorkerError
from engine.lang.backend import Backend
from engine.params.sampling import SamplingParams


class Remote(Client, Backend):
    """A server at a URL. Use it as a context manager: with `async with` it lives in the running event loop, with `with`
    in one of its own."""

    _stack: ExitStack
    _portal: BlockingPortal | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    @property
    def portal(self) -> BlockingPortal | None:
        return self._portal

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return await super().__aenter__()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": True}))
            stack.enter_context(portal.wrap_async_context_manager(self))
            self._portal, self._stack = portal, stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal = None
        self._stack.close()

    # ── what it can do ───────────────────────────────────────────────────────────────────────

    @property
    @abstractmethod
    def _who(self) -> str:
        """What errors call it."""

    def _cannot(self, what: str) -> NoReturn:
        """Raise RequestError: it `what`, a template in which fields stand in braces."""
        raise RequestError(f"{{who}} {what}", facts={"who": self._who})

    def _check(self, params: SamplingParams, has: Set[str] | None = None) -> None:
        """Raise RequestError for what no body says and, if it `has` only some fields, for others."""
        if (grammar := params.grammar) is not None and (grammar.after or grammar.beside or grammar.tools):
            self._cannot(
                "takes no {grammar} of several parts; say it by a keyword, regex or json_schema, or use Engine"
            )
        if has is not None and (wrong := sorted(changed(params).keys() - has)):
            fields = ", ".join(f"{{{name}}}" for name in wrong)
            self._cannot(f"has no field for {fields}; leave it out, or use a server of ours")

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    async def _ask(self, path: str, body: dict[str, Any]) -> bytes:
        """The whole answer. Raises RequestError for an error answer."""
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.post(self.url + path, data=msgspec.json.encode(body), headers=headers) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerError(f"{self.url}{path} did not answer: {cause_of(error)}") from None
        if response.status != 200:
            raise RequestError(refusal(answer), status=response.status)
        return answer
